"""``drafter_network`` in plain PyTorch: differentiable, so training takes it, and made of parts that can be others."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from free_kernels.ops.attention.arguments import AttentionArguments
from free_kernels.ops.attention.reference import feature_attention
from free_kernels.ops.network.arguments import BLOCK_ROWS, BLOCK_WEIGHTS, LAST_ROWS, NetworkArguments
from free_kernels.ops.norms.arguments import NormArguments
from free_kernels.ops.norms.reference import adaptive_norm

# Mixes queries, keys and values [R, T, H, Dh] of a block, whose number it is given.
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
Normalize = Callable[[NormArguments], tuple[Tensor, Tensor]]


def composed(a: NetworkArguments, attend: Attend, normalize: Normalize) -> Tensor:
    """The network with attention and norms of the caller's choice."""
    enter, positions, *layers, leave, leave_bias = a.weights
    rows, tokens, _ = a.tokens.shape
    depth, (_, placed, width) = len(layers) // BLOCK_WEIGHTS, a.modulations.shape

    def normalized(
        x: Tensor, update: Tensor, gate: int, shift: int, skip: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        # The scale stands behind the shift, a skip's gain behind that.
        places = gate, shift, shift + 1, -1 if skip is None else shift + 2
        return normalize(NormArguments(x, update, a.modulations, skip, *places, a.eps))

    embedded, y = normalized(F.linear(a.tokens, enter), positions, -1, 0)
    x = embedded
    for block in range(depth):
        qkv, qkv_bias, proj, proj_bias, fc1, fc1_bias, fc2, fc2_bias = layers[BLOCK_WEIGHTS * block :][:BLOCK_WEIGHTS]
        first, behind = BLOCK_ROWS * block, BLOCK_ROWS * (block + 1)
        joint = F.linear(y, qkv, qkv_bias).view(rows, tokens, 3, a.heads, width // a.heads)
        mixed = attend(block, *joint.unbind(2)).view(rows, tokens, width)
        x, y = normalized(x, F.linear(mixed, proj, proj_bias), first + 2, first + 3)
        update = F.linear(F.gelu(F.linear(y, fc1, fc1_bias)), fc2, fc2_bias)
        # Normalisation removes the scale of its input; the skip, a linear path, keeps it.
        skips = block == depth - 1 and placed > behind + LAST_ROWS
        x, y = normalized(x, update, behind - 1, behind, embedded if skips else None)
    return a.feature + F.linear(y, leave, leave_bias)


def drafter_network(a: NetworkArguments) -> Tensor:
    """See ``free_kernels.ops.network.api.drafter_network``."""
    return composed(a, _attend, adaptive_norm)


def _attend(block: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return feature_attention(AttentionArguments(q, k, v, None, None, None, None, None, None))
