"""``drafter_tokens`` in plain PyTorch; differentiable, so training takes it."""

from __future__ import annotations

import torch
from torch import Tensor

from free_kernels.ops.tokens.arguments import TokenArguments

# What keeps the size of a change that is zero from being divided by.
SMALLEST_SQUARE = 1e-12


def tiles(images: Tensor, patch: tuple[int, int]) -> Tensor:
    """Patches of p x q of images ``[R, C, H, W]``, ``[R, T, C p q]``."""
    rows, channels, height, width = images.shape
    (p, q), down, across = patch, height // patch[0], width // patch[1]
    cut = images.view(rows, channels, down, p, across, q).permute(0, 2, 4, 1, 3, 5)
    return cut.reshape(rows, down * across, channels * p * q)


def drafter_tokens(a: TokenArguments) -> Tensor:
    """See ``free_kernels.ops.tokens.api.drafter_tokens``."""
    change = a.state - a.previous
    parts = {}
    if a.state_at >= 0:
        parts[a.state_at] = a.state
    if a.unit_at >= 0:
        mean_sq = change.square().mean((1, 2, 3), keepdim=True)
        parts[a.unit_at] = change * mean_sq.add_(SMALLEST_SQUARE).rsqrt_()
    if a.scaled_at >= 0:
        step = a.t if a.time_unit == 1 else a.t.div(a.time_unit, rounding_mode="floor")
        parts[a.scaled_at] = change / a.change_rms.index_select(0, step).view(-1, 1, 1, 1)
    patches = tiles(torch.cat([parts[place] for place in sorted(parts)], dim=1), (a.patch_height, a.patch_width))
    return torch.cat([a.feature, patches.to(a.feature.dtype)], dim=-1)
