"""Public op of a table that depends on timestep and label."""

from __future__ import annotations

import torch
from torch import Tensor

from free_kernels.ops.checks import INT64, Layouts
from free_kernels.ops.declaration import KernelOp
from free_kernels.ops.tables import reference
from free_kernels.ops.tables.arguments import TableArguments as TableArguments
from free_kernels.validation import fail


def _check(a: TableArguments) -> None:
    op = "table_rows"
    if not isinstance(a.rows, Tensor) or a.rows.ndim < 1 or not a.rows.is_contiguous():
        fail(
            op, "rows", "a contiguous tensor [N, ...]", a.rows, ValueError if isinstance(a.rows, Tensor) else TypeError
        )
    layouts = Layouts(op, a.rows.device, {})
    layouts.check("row_of_timestep", a.row_of_timestep, INT64, "[timesteps]")
    layouts.check("row_of_label", a.row_of_label, INT64, "[labels]")
    layouts.check("t", a.t, INT64, "[R]")
    layouts.sizes = {"R": a.t.shape[0]}
    layouts.check("y", a.y, INT64, "[R]")


def _fake(a: TableArguments) -> Tensor:
    return a.rows.new_empty(a.t.shape[0], *a.rows.shape[1:])


def _run(a: TableArguments) -> Tensor:
    if a.rows.is_cpu and a.t.numel() and not torch.compiler.is_compiling():
        for name, values, table in (("t", a.t, a.row_of_timestep), ("y", a.y, a.row_of_label)):
            low, high = int(values.min()), int(values.max())
            if low < 0 or high >= len(table):
                fail("table_rows", name, f"in [0, {len(table)})", low if low < 0 else high)
    return reference.table_rows(a)


OP = KernelOp("table_rows", TableArguments, _run, _fake, _check, folder="tables")


def table_rows(arguments: TableArguments, backend: str = "auto") -> Tensor:
    """Row ``row_of_timestep[t] + row_of_label[y]`` of a table for each of R pairs, ``[R, ...]``; no gradient.

    Args:
        arguments: ``rows [N, ...]`` contiguous, of any dtype; the others int64.
        backend: ``"auto"`` (Triton on a GPU, else the extension if it is there), ``"reference"``, ``"extension"`` or
            ``"triton"``.

    Raises:
        ValueError, TypeError: a wrong argument; values are checked on the CPU only.
        RuntimeError: the backend cannot be used; the message says why.
    """
    return OP(arguments, arguments.rows, backend)
