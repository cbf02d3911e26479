"""What ``drafter_tokens`` takes; ``free_kernels.ops.tokens.api`` describes each argument."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class TokenArguments(NamedTuple):
    """Arguments of ``drafter_tokens``: states of C channels, tiled by T patches of p x p."""

    feature: Tensor  # float32, float16, bfloat16 or float64 [R, T, D]
    previous: Tensor  # float32 [R, C, H, W]
    state: Tensor  # float32 [R, C, H, W]
    t: Tensor  # int64 [R]
    change_rms: Tensor | None  # float32 [timesteps]; None where scaled_at is negative
    time_unit: int
    patch: int
    state_at: int
    unit_at: int
    scaled_at: int
