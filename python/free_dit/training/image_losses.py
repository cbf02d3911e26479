"""Training loss of a DiT: noise prediction plus, for a learned variance, the variational bound.

Source: improved DDPM (Nichol & Dhariwal 2021).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from free_kernels.schedule import DDPMSchedule, TransitionColumn


class DiffusionLoss(nn.Module):
    """Loss of one batch of clean images at random timesteps.

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
        # Sampling order is flipped here: row t belongs to training timestep t.
        self.register_buffer("table", full.table("fixed_small").flip(0))
        self.register_buffer("log_variance", torch.stack(full.log_variance_range(), 1).float().flip(0))
        self.register_buffer("alphas_cumprod", torch.from_numpy(full.train_alphas_cumprod).float())

    def forward(self, model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Mean loss and its parts for ``images [N, C, H, W]`` and ``labels [N]``."""
        # Stratified timesteps: one in each of N equal parts of [0, T), which lowers the gradient's variance.
        count = len(images)
        strata = (torch.randperm(count, device=images.device) + torch.rand(count, device=images.device)) / count
        t = (strata * self.num_train_steps).long().clamp_(max=self.num_train_steps - 1)
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
        # At t = 0: likelihood of the data's own level under the Gaussian, open at both ends of the scale.
        std = (0.5 * log_variance).exp()
        half = self.level_width / 2
        upper = torch.where(images > 1 - half, torch.inf, (images + half - mean) / std)
        lower = torch.where(images < -1 + half, -torch.inf, (images - half - mean) / std)
        mass = torch.special.ndtr(upper) - torch.special.ndtr(lower)
        nll = -mass.clamp(min=1e-12).log()
        per_element = torch.where((t == 0).view(-1, 1, 1, 1), nll, kl)
        return per_element.flatten(1).mean(1) / math.log(2.0)
