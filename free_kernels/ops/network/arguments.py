"""What ``drafter_network`` takes; ``free_kernels.ops.network.api`` describes each argument."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

# Weights before the first block, of a block, and behind the last; modulations of a block and behind the last.
FIRST_WEIGHTS, BLOCK_WEIGHTS, LAST_WEIGHTS = 2, 8, 2
BLOCK_ROWS, LAST_ROWS = 6, 2


class NetworkArguments(NamedTuple):
    """Arguments of ``drafter_network``: R rows of T tokens; N blocks of width W."""

    feature: Tensor  # [R, T, D]
    tokens: Tensor  # [R, T, I]
    modulations: Tensor  # [R, 6 N + 2 or 3, W]
    weights: list[Tensor]  # 4 + 8 N
    heads: int  # divides W
    eps: float  # above 0
