"""What ``table_rows`` takes; ``free_kernels.ops.tables.api`` describes each argument."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class TableArguments(NamedTuple):
    """Arguments of ``table_rows``: N rows of E elements."""

    rows: Tensor  # of any dtype [N, ...]
    row_of_timestep: Tensor  # int64 [timesteps]
    row_of_label: Tensor  # int64 [labels]
    t: Tensor  # int64 [R]
    y: Tensor  # int64 [R]
