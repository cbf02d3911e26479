"""Tables of whatever depends on (timestep, label) only, computed once per chain instead of once per call."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor

from free_kernels.ops.tables import TableArguments, table_rows
from free_kernels.protocols import TargetDefaults

MAX_TABLE_BYTES = 1 << 30
# Bounds the intermediate activations while a table is made.
CHUNK_ROWS = 512


def _joined(parts: list[Tensor]) -> Tensor:
    """Parts of a table one below the other; a single one is not copied."""
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts)


class ConditioningTable:
    """Rows of ``compute(t, y)`` for every pair of the given timesteps and labels.

    Args:
        compute: maps int64 ``[M]`` timesteps and labels to ``[M, ...]``.
        timesteps: int64 ``[K]``, distinct.
        labels: int64 ``[Y]``, distinct.

    Attributes:
        parts: the first three of :class:`~free_kernels.ops.tables.TableArguments`.
    """

    def __init__(self, compute: Callable[[Tensor, Tensor], Tensor], timesteps: Tensor, labels: Tensor) -> None:
        device = timesteps.device
        row_of_timestep = torch.zeros(int(timesteps.max()) + 1, dtype=torch.int64, device=device)
        row_of_timestep[timesteps] = torch.arange(len(timesteps), device=device) * len(labels)
        row_of_label = torch.zeros(int(labels.max()) + 1, dtype=torch.int64, device=device)
        row_of_label[labels] = torch.arange(len(labels), device=device)
        t, y = timesteps.repeat_interleave(len(labels)), labels.repeat(len(timesteps))
        parts = zip(t.split(CHUNK_ROWS), y.split(CHUNK_ROWS), strict=True)
        self.parts = _joined([compute(*part) for part in parts]), row_of_timestep, row_of_label

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        """Rows ``[R, ...]`` for timesteps and labels ``[R]`` that the table holds."""
        return table_rows(TableArguments(*self.parts, t.contiguous(), y.contiguous()))


class TimestepTable:
    """Rows of ``compute(t)`` for the given timesteps.

    Args:
        compute: maps int64 ``[M]`` timesteps to ``[M, ...]``.
        timesteps: int64 ``[K]``, distinct.
    """

    def __init__(self, compute: Callable[[Tensor], Tensor], timesteps: Tensor) -> None:
        self._row = torch.zeros(int(timesteps.max()) + 1, dtype=torch.int64, device=timesteps.device)
        self._row[timesteps] = torch.arange(len(timesteps), device=timesteps.device)
        self._rows = _joined([compute(part) for part in timesteps.split(CHUNK_ROWS)])

    def __call__(self, t: Tensor) -> Tensor:
        """Rows ``[R, ...]`` for timesteps ``[R]`` that the table holds."""
        return self._rows.index_select(0, self._row.index_select(0, t))


class ShowsTimesteps:
    """For targets: a copy that shows its network other timesteps than the whole ones that it is called with."""

    # Float32, what is shown at each timestep; None: the timestep itself.
    _shown_table: Tensor | None = None
    device: torch.device

    def showing(self, timesteps: Tensor, shown: Tensor) -> Self:
        """A copy that shows its network ``shown[k]``, float32 ``[K]``, where it is called with ``timesteps[k]``."""
        timesteps, clone = timesteps.to(self.device), copy.copy(self)
        clone._shown_table = torch.arange(int(timesteps.max()) + 1, dtype=torch.float32, device=timesteps.device)
        clone._shown_table[timesteps] = shown.to(clone._shown_table)
        return clone

    def _timestep(self, t: Tensor) -> Tensor:
        """What the network is shown of timesteps ``[R]``."""
        return t if self._shown_table is None else self._shown_table.index_select(0, t)


def table_fits(timesteps: Tensor, labels: Tensor, bytes_per_row: int) -> bool:
    """Whether a table of every pair stays within the memory allowed for it."""
    return len(timesteps) * len(labels) * bytes_per_row <= MAX_TABLE_BYTES


def hoisted(network: Any, timesteps: Tensor, labels: Tensor) -> Any:
    """``network.hoisted(timesteps, labels)`` of a target or drafter; without such a method itself."""
    return TargetDefaults.read(network, "hoisted")(timesteps, labels)
