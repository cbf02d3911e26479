"""Training loss of a velocity model, and the schedule that a target is sampled with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from free_kernels.flow_schedule import INTERPOLANTS, FlowSDESchedule, interpolate
from free_kernels.schedule import DDPMSchedule
from free_kernels.types import Target
from free_kernels.validation import check_choice


class VelocityLoss(nn.Module):
    """Mean squared error of the velocity at uniform times (Ma et al. 2024, equation 5).

    Args:
        interpolant: ``"linear"`` or ``"gvp"``.
    """

    def __init__(self, interpolant: str = "linear") -> None:
        super().__init__()
        self.interpolant = check_choice("VelocityLoss", "interpolant", interpolant, INTERPOLANTS)

    def forward(self, model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Mean loss and its parts for ``images [N, C, H, W]`` and ``labels [N]``."""
        # Stratified times: one in each of N equal parts of [0, 1), which lowers the gradient's variance.
        count = len(images)
        t = (torch.randperm(count, device=images.device) + torch.rand(count, device=images.device)) / count
        noise = torch.randn_like(images)
        alpha, sigma, d_alpha, d_sigma = (part.view(-1, 1, 1, 1) for part in interpolate(self.interpolant, t))
        velocity = model(alpha * images + sigma * noise, t, labels)
        loss = (velocity - d_alpha * images - d_sigma * noise).square().mean()
        return loss, {"mse": loss.item()}


def schedule_for(target: Target, num_steps: int) -> DDPMSchedule | FlowSDESchedule:
    """The default schedule of a target's family: of a flow model the SDE's, else the DDPM's."""
    if getattr(target, "family", None) == "flow":
        return FlowSDESchedule(num_steps, num_train_steps=target.num_train_steps)  # type: ignore[attr-defined]
    return DDPMSchedule(num_steps)
