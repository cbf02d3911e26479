"""``table_rows`` in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from free_kernels.ops.tables.arguments import TableArguments


def table_rows(a: TableArguments) -> Tensor:
    """See ``free_kernels.ops.tables.api.table_rows``."""
    row = a.row_of_timestep.index_select(0, a.t).add_(a.row_of_label.index_select(0, a.y))
    return a.rows.index_select(0, row)
