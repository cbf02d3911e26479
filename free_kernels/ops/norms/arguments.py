"""What ``adaptive_norm`` takes; ``free_kernels.ops.norms.api`` describes each argument."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class NormArguments(NamedTuple):
    """Arguments of ``adaptive_norm``: R rows of T tokens of D values. Floats: float32, float16 or bfloat16."""

    x: Tensor  # floats [R, T, D]
    update: Tensor | None  # floats [R, T, D] or [1, T, D]
    modulations: Tensor  # floats [R, K, D]
    skip: Tensor | None  # of x's dtype [R, T, D]; None where gain_at is negative
    gate_at: int  # in [-1, K)
    shift_at: int  # in [0, K)
    scale_at: int  # in [0, K)
    gain_at: int  # in [-1, K)
    eps: float  # above 0
