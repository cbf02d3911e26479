"""What ``final_layer`` takes; ``free_kernels.ops.final_layer.api`` describes each argument."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class FinalLayerArguments(NamedTuple):
    """Arguments of ``final_layer``: R rows of T tokens, D wide; O values of a token."""

    h: Tensor  # [R, T, D]
    rows: Tensor  # [N, 2, 1, D]
    row_of_timestep: Tensor  # int64 [timesteps]
    row_of_label: Tensor  # int64 [labels]
    t: Tensor  # int64 [R]
    y: Tensor  # int64 [R]
    weight: Tensor  # [O, D]
    bias: Tensor | None  # [O]
    eps: float  # above 0
    grid_rows: int  # divides T
    patch_rows: int
    patch_columns: int  # patch_rows * patch_columns divides O
