"""Training losses on images: of noise prediction (DiT) and of a velocity (SiT)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from free_kernels.constants import TransitionColumn
from free_kernels.schedules import DDPMSchedule
from free_kernels.schedules.flow import INTERPOLANTS, interpolate
from free_kernels.validation import check_choice


def stratified_uniform(count: int, device: torch.device) -> Tensor:
    """``[N]`` in [0, 1), one in each of N equal parts, in random order: lowers the variance of the gradient."""
    return (torch.randperm(count, device=device) + torch.rand(count, device=device)) / count


class VelocityLoss(nn.Module):
    """Mean squared error of the velocity at random times (Ma et al. 2024, equation 5).

    Args:
        interpolant: ``"linear"`` or ``"gvp"``.
    """

    def __init__(self, interpolant: str = "linear") -> None:
        super().__init__()
        self.interpolant = check_choice("VelocityLoss", "interpolant", interpolant, INTERPOLANTS)

    def forward(self, model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Mean loss and its parts for ``images [N, C, H, W]`` and ``labels [N]``."""
        t = stratified_uniform(len(images), images.device)
        noise = torch.randn_like(images)
        alpha, sigma, d_alpha, d_sigma = (part.view(-1, 1, 1, 1) for part in interpolate(self.interpolant, t))
        velocity = model(alpha * images + sigma * noise, t, labels)
        loss = (velocity - d_alpha * images - d_sigma * noise).square().mean()
        return loss, {"mse": loss.item()}


class NoiseLoss(nn.Module):
    """Mean squared error of the noise at random timesteps plus, for a learned variance, the variational bound.

    Source: improved DDPM (Nichol & Dhariwal 2021).

    Args:
        schedule: its T training steps are the ones trained on.
        level_width: distance between neighbouring levels of the data, for the likelihood of the last step.
        learn_sigma: whether the model's second half of channels is a variance.
    """

    def __init__(self, schedule: DDPMSchedule, level_width: float, learn_sigma: bool) -> None:
        super().__init__()
        full = DDPMSchedule(
            schedule.num_train_steps,
            schedule.num_train_steps,
            beta_start=schedule.beta_start,
            beta_end=schedule.beta_end,
            beta_schedule=schedule.beta_schedule,
        )
        self.num_train_steps = schedule.num_train_steps
        self.level_width = level_width
        self.learn_sigma = learn_sigma
        # Flipped from sampling order: row t belongs to training timestep t.
        self.register_buffer("table", full.table("fixed_small").flip(0))
        self.register_buffer("log_variance", torch.stack(full.log_variance_range(), 1).float().flip(0))
        self.register_buffer("alphas_cumprod", torch.from_numpy(full.train_alphas_cumprod).float())

    def forward(self, model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Mean loss and its parts for ``images [N, C, H, W]`` and ``labels [N]``."""
        t = (stratified_uniform(len(images), images.device) * self.num_train_steps).long()
        t.clamp_(max=self.num_train_steps - 1)
        noise = torch.randn_like(images)
        alpha = self.alphas_cumprod[t].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * images + (1 - alpha).sqrt() * noise
        output = model(noisy, t, labels)
        if not self.learn_sigma:
            loss = (output - noise).square().mean()
            return loss, {"mse": loss.item()}
        eps, v = output.chunk(2, dim=1)
        mse = (eps - noise).square().mean()
        bound = self._bound(images, noisy, eps.detach(), v, t).mean()
        return mse + bound, {"mse": mse.item(), "bound_bits": bound.item()}

    def _bound(self, images: Tensor, noisy: Tensor, eps: Tensor, v: Tensor, t: Tensor) -> Tensor:
        """Variational bound per image, in bits per dimension, with gradient to the variance only."""
        row = self.table[t].view(len(t), -1, 1, 1, 1)
        low, high = self.log_variance[t].view(len(t), 2, 1, 1, 1).unbind(1)
        log_variance = low + (high - low) * (v + 1) / 2
        x0 = row[:, TransitionColumn.X0_FROM_STATE] * noisy + row[:, TransitionColumn.X0_FROM_OUTPUT] * eps
        weights = row[:, TransitionColumn.MEAN_FROM_X0], row[:, TransitionColumn.MEAN_FROM_STATE_GIVEN_X0]
        true_mean = weights[0] * images + weights[1] * noisy
        mean = weights[0] * x0.clamp(-1, 1) + weights[1] * noisy
        kl = 0.5 * (log_variance - low + (low - log_variance).exp() - 1)
        kl = kl + 0.5 * (true_mean - mean).square() * (-log_variance).exp()
        # At t = 0: likelihood of the data's grey level; the lowest and the highest level have no outer bound.
        std = (0.5 * log_variance).exp()
        half = self.level_width / 2
        upper = torch.where(images > 1 - half, torch.inf, (images + half - mean) / std)
        lower = torch.where(images < -1 + half, -torch.inf, (images - half - mean) / std)
        mass = torch.special.ndtr(upper) - torch.special.ndtr(lower)
        nll = -mass.clamp(min=1e-12).log()
        per_element = torch.where((t == 0).view(-1, 1, 1, 1), nll, kl)
        return per_element.flatten(1).mean(1) / math.log(2.0)
