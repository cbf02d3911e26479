"""What ``feature_attention`` takes; ``free_kernels.ops.feature_attention`` describes each argument."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class AttentionArguments(NamedTuple):
    """Arguments of ``feature_attention``; q, k, v and the cache have one dtype: float32, float16 or bfloat16.

    The reference takes float64 too.
    """

    q: Tensor  # [R, T, H, Dh]
    k: Tensor  # [R, T, H, Dh]
    v: Tensor  # [R, T, H, Dh]
    cache_k: Tensor | None = None  # [R, C, T, H, Dh]
    cache_v: Tensor | None = None  # [R, C, T, H, Dh]
    cache_length: Tensor | None = None  # int64 [R]
    cache_position: Tensor | None = None  # int64 [R]
    scale: float | None = None  # Dh ** -0.5 if None
    window: int | None = None  # C + 1 if None
