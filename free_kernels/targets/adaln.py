"""What DiT families share: blocks with adaLN-Zero, whose modulations depend on (timestep, label) only."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from free_kernels.conditioning import ConditioningTable, TimestepTable, table_fits
from free_kernels.protocols import TargetDefaults
from free_kernels.validation import fail

# Shift, scale and gate of attention and of the MLP; shift and scale of the head.
BLOCK_CHUNKS, HEAD_CHUNKS = 6, 2


class BlockParts(NamedTuple):
    """The four maps ``[R, T, D] -> [R, T, D]`` of a block."""

    norm1: Callable[[Tensor], Tensor]
    attention: Callable[[Tensor], Tensor]
    norm2: Callable[[Tensor], Tensor]
    mlp: Callable[[Tensor], Tensor]


def run_blocks(blocks: Sequence[BlockParts], h: Tensor, modulations: Tensor) -> Tensor:
    """Tokens ``[R, T, D]`` through blocks whose modulations ``[R, 6 depth, 1, D]`` are at hand, scales with 1 added."""
    rows = modulations.unbind(1)
    for index, block in enumerate(blocks):
        shift1, scale1, gate1, shift2, scale2, gate2 = rows[BLOCK_CHUNKS * index : BLOCK_CHUNKS * (index + 1)]
        h = torch.addcmul(h, gate1, block.attention(torch.addcmul(shift1, block.norm1(h), scale1)))
        h = torch.addcmul(h, gate2, block.mlp(torch.addcmul(shift2, block.norm2(h), scale2)))
    return h


def stack_block_modulations(rows: Sequence[Tensor]) -> Tensor:
    """Outputs ``[M, 6 D]`` of each block's modulation layer as ``[M, 6 depth, 1, D]``, with 1 added to the scales."""
    stacked = torch.stack([row.unflatten(1, (BLOCK_CHUNKS, 1, -1)) for row in rows], 1)
    stacked[:, :, 1] += 1
    stacked[:, :, 4] += 1
    return stacked.flatten(1, 2)


class AdaLNTarget(TargetDefaults):
    """Base of the adapters for DiT families; a :class:`free_kernels.protocols.Target` once a family fills it in.

    A family gives ``dtype``, ``device`` and the methods below that raise; ``self.blocks`` is None where a block has
    other parts than the family's, and its own forward is then all that is used of it.

    Args:
        name: of the class, for error messages.
        module: the network, in evaluation mode.
        blocks: its blocks' parts, or None.
        compile: run blocks and head through ``torch.compile``.

    Raises:
        ValueError: the module is in training mode, or cannot be compiled block by block.
    """

    # Must equal the schedule's `family`.
    family = "diffusion"
    latent_shape: tuple[int, int, int]
    feature_shape: tuple[int, int]
    num_classes: int
    learns_variance: bool

    def __init__(self, name: str, module: nn.Module, blocks: list[BlockParts] | None, compile: bool) -> None:
        if module.training:
            fail(name, "module", "in evaluation mode (call .eval())", "training mode")
        if not isinstance(compile, bool):
            fail(name, "compile", "a bool", compile, TypeError)
        if compile and blocks is None:
            fail(name, "compile", "False for blocks with parts of another kind", compile)
        self.module: Any = module
        self.blocks = blocks
        self.compile = compile
        self._block_table: ConditioningTable | None = None
        self._final_table: ConditioningTable | None = None
        self._time_tables: list[TimestepTable] | None = None
        # A copy made by `hoisted` shares these, and so what has been compiled.
        self._run_blocks = torch.compile(run_blocks) if compile else run_blocks
        self._run_head = torch.compile(self._modulated_head) if compile else self._modulated_head

    @property
    def dtype(self) -> torch.dtype:
        """The module's dtype."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """The module's device."""
        raise NotImplementedError

    def features(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Top-block features ``[R, T, D]``."""
        h = self._embed(x.to(self.dtype))
        if self._block_table is not None:
            return self._run_blocks(self.blocks, h, self._block_table(t, y))
        if self.compile:
            return self._run_blocks(self.blocks, h, self._block_modulations(t, y))
        return self._plain_blocks(h, t, y)

    def head(self, h: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Network output ``[R, C or 2C, H, W]``."""
        h = h.to(self.dtype)
        if self._final_table is not None:
            return self._run_head(h, self._final_table(t, y))
        if self.compile:
            return self._run_head(h, self._final_modulations(t, y))
        return self._plain_head(h, t, y)

    def hoisted(self, timesteps: Tensor, labels: Tensor) -> AdaLNTarget:
        """A copy on which what depends on (t, y) only is computed once.

        All adaLN modulations, where they fit into the memory allowed for them; else the embeddings of the timesteps.
        """
        clone = copy.copy(self)
        if self.blocks is not None:
            chunks = BLOCK_CHUNKS * len(self.blocks) + HEAD_CHUNKS
            if table_fits(timesteps, labels, chunks * self.feature_shape[1] * self.dtype.itemsize):
                clone._block_table = ConditioningTable(self._block_modulations, timesteps, labels)
                clone._final_table = ConditioningTable(self._final_modulations, timesteps, labels)
                return clone
        clone._time_tables = [TimestepTable(embed, timesteps) for embed in self._time_embedders()]
        return clone

    def _time_embedding(self, index: int, t: Tensor) -> Tensor:
        """``[R, D]`` of the family's ``index``-th timestep embedder."""
        return self._time_embedders()[index](t) if self._time_tables is None else self._time_tables[index](t)

    def _time_embedders(self) -> list[Callable[[Tensor], Tensor]]:
        """The maps from timesteps ``[R]`` to ``[R, D]``."""
        raise NotImplementedError

    def _embed(self, x: Tensor) -> Tensor:
        """States ``[R, C, H, W]`` to tokens ``[R, T, D]``, positions added."""
        raise NotImplementedError

    def _plain_blocks(self, h: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Tokens through the blocks, nothing hoisted."""
        raise NotImplementedError

    def _plain_head(self, h: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The head, nothing hoisted."""
        raise NotImplementedError

    def _modulated_head(self, h: Tensor, modulations: Tensor) -> Tensor:
        """The head with its modulations ``[R, 2, 1, D]``."""
        raise NotImplementedError

    def _block_modulations(self, t: Tensor, y: Tensor) -> Tensor:
        """``[M, 6 depth, 1, D]``: shift, 1 + scale, gate of attention and MLP, block by block."""
        raise NotImplementedError

    def _final_modulations(self, t: Tensor, y: Tensor) -> Tensor:
        """``[M, 2, 1, D]``: shift and 1 + scale of the head."""
        raise NotImplementedError
