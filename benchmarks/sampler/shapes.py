"""A target and a drafter of given shapes that compute nothing to speak of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """What a target's tensors look like.

    Attributes:
        name: for the table.
        latent: (C, H, W).
        feature: (T, D).
        dtype: of features.
        guidance: scale.
        slots: S.
    """

    name: str
    latent: tuple[int, int, int]
    feature: tuple[int, int]
    dtype: torch.dtype
    guidance: float
    slots: int


SHAPES = (
    Shape("digits", (1, 8, 8), (16, 128), torch.float32, 1.0, 16),
    Shape("DiT-XL/2 at 256 x 256", (4, 32, 32), (256, 1152), torch.bfloat16, 4.0, 16),
    Shape("DiT-XL/2 at 512 x 512", (4, 64, 64), (1024, 1152), torch.bfloat16, 4.0, 16),
)


class ShapedTarget:
    """Returns tensors of a target's shapes: every call another number, so that drafts are refused.

    Args:
        shape: of the tensors.
    """

    num_classes, null_label, learns_variance = 10, 10, True

    def __init__(self, shape: Shape) -> None:
        self.latent_shape, self.feature_shape, self._dtype = shape.latent, shape.feature, shape.dtype
        self._random = torch.Generator().manual_seed(0)

    def features(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """``[R, T, D]``."""
        number = torch.randn((), generator=self._random).item()
        return torch.empty(len(x), *self.feature_shape, dtype=self._dtype).fill_(number)

    def head(self, h: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """``[R, 2C, H, W]``."""
        channels, *sides = self.latent_shape
        output = torch.empty(len(h), 2 * channels, *sides)
        return output.copy_(h[:, 0, 0].view(-1, 1, 1, 1)).mul_(5.0)


class ShapedDrafter:
    """Returns a tensor of the feature's shape."""

    def __call__(self, feature: Tensor, previous: Tensor, state: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """``[R, T, D]``."""
        return feature * 1.0
