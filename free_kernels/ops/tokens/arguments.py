"""What ``drafter_tokens`` takes; ``free_kernels.ops.tokens.api`` describes each argument."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class TokenArguments(NamedTuple):
    """Arguments of ``drafter_tokens``: states of C channels, tiled by T patches of p x q."""

    feature: Tensor  # float32, float16, bfloat16 or float64 [R, T, D]
    previous: Tensor  # float32 [R, C, H, W]
    state: Tensor  # float32 [R, C, H, W]
    t: Tensor  # int64 [R]
    change_rms: Tensor | None  # float32 [timesteps]; None where scaled_at is negative
    time_unit: int
    patch_height: int  # p, lines
    patch_width: int  # q, columns
    state_at: int
    unit_at: int
    scaled_at: int
