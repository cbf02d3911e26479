"""Masks of loads and stores, for the kernels of every op."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def where_also(mask, condition):
    """A block's mask where a scalar condition holds too; Triton 3.9's interpreter refuses ``mask & condition``."""
    return tl.where(condition, mask, False)
