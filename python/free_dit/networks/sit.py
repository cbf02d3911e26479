"""Scalable Interpolant Transformer (Ma et al. 2024, arXiv 2401.08740): a DiT that predicts a velocity."""

from __future__ import annotations

from torch import Tensor

from free_dit.networks.dit import DiT


class SiT(DiT):
    """``(x [R, C, H, W], t [R], y [R]) -> [R, C, H, W]``, the velocity at float times t from 0 (noise) to 1 (data).

    Names and shapes are the DiT's; with ``learn_sigma`` the head has C more channels, which forward drops.

    Args:
        config: the shape.
    """

    # By this attribute free_kernels.targets.as_target recognises a SiT.
    family = "flow"

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The velocity."""
        return super().forward(x, t, y)[:, : self.in_channels]
