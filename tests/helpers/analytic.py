"""Targets whose chain law is known in closed form, drafters that are wrong on purpose, and statistics with bounds."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import scipy.stats
import torch

from free_kernels.constants import TransitionColumn
from free_kernels.schedules import DDPMSchedule

# Chance of a false alarm of one statistical test, and how small a negative control's p-value has to be.
FALSE_ALARM = 1e-3
DETECTED = 1e-6


@dataclass
class GaussianTarget:
    """The exact noise predictor of data ``N(class mean, class std^2)``; linear in x, so every chain state is Gaussian.

    Features hold (predicted noise, variance channel) per element: ``[T, D] = [C H W, 2]``. The variance channel depends
    on timestep, label and element only, which keeps the chain Gaussian.
    """

    latent_shape: tuple[int, int, int] = (1, 4, 4)
    num_classes: int = 3
    learns_variance: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        elements = math.prod(self.latent_shape)
        self.feature_shape = (elements, 2)
        self.means = torch.randn(self.num_classes + 1, elements, generator=generator) * 0.7
        self.stds = torch.rand(self.num_classes + 1, elements, generator=generator) * 0.6 + 0.3
        self.tilt = torch.randn(self.num_classes + 1, elements, generator=generator)
        self.alphas = torch.from_numpy(DDPMSchedule().train_alphas_cumprod).float()

    def linear(self, t: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Slope and offset of the predicted noise, ``[R, elements]`` each."""
        alpha = self.alphas[t].unsqueeze(1)
        slope = (1 - alpha).sqrt() / (alpha * self.stds[y] ** 2 + 1 - alpha)
        return slope, -slope * alpha.sqrt() * self.means[y]

    def variance_channel(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.tilt[y] + t.unsqueeze(1) / 500 - 1)

    def features(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        slope, offset = self.linear(t, y)
        return torch.stack([slope * x.flatten(1) + offset, self.variance_channel(t, y)], dim=-1)

    def head(self, h: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        eps, v = (part.reshape(-1, *self.latent_shape) for part in h.unbind(-1))
        return torch.cat([eps, v], dim=1) if self.learns_variance else eps

    def final_law(
        self, schedule: DDPMSchedule, label: int, guidance: float | list[float] = 1.0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation per element of the ordinary sampler's images, float64.

        ``guidance`` is one scale or that of every step.
        """
        scales = guidance if isinstance(guidance, list) else [guidance] * schedule.num_steps
        table = schedule.table(schedule.resolve_variance(self.learns_variance)).double()
        mean = torch.zeros(self.feature_shape[0], dtype=torch.float64)
        variance = torch.ones_like(mean)
        y = torch.tensor([label])
        null = torch.tensor([self.num_classes])
        for k, (t, scale) in enumerate(zip(schedule.timesteps, scales, strict=True)):
            slope, offset = (part[0].double() for part in self.linear(t[None], y))
            if scale != 1.0:
                slope_u, offset_u = (part[0].double() for part in self.linear(t[None], null))
                slope = slope_u + scale * (slope - slope_u)
                offset = offset_u + scale * (offset - offset_u)
            a, b = table[k, TransitionColumn.MEAN_FROM_STATE], table[k, TransitionColumn.MEAN_FROM_OUTPUT]
            v = self.variance_channel(t[None], y)[0].double()
            log_std = table[k, TransitionColumn.LOG_STD] + table[k, TransitionColumn.LOG_STD_SLOPE] * v
            mean, variance = (a + b * slope) * mean + b * offset, (a + b * slope) ** 2 * variance + (2 * log_std).exp()
        return mean.numpy(), variance.sqrt().numpy()


@dataclass
class BiasedDrafter:
    """Predicts the target's own features, then spoils them by a constant amount: half of its drafts are refused."""

    target: GaussianTarget
    eps_bias: float = 0.6
    variance_bias: float = 0.0

    @property
    def direction(self) -> np.ndarray:
        """Unit vector along which drafts and target differ."""
        signs = np.where(np.arange(self.target.feature_shape[0]) % 3 == 0, -1.0, 1.0)
        return signs / np.linalg.norm(signs)

    def __call__(
        self,
        feature: torch.Tensor,
        previous: torch.Tensor,
        state: torch.Tensor,
        t: torch.Tensor,
        y: torch.Tensor,
    ) -> torch.Tensor:
        exact = self.target.features(state, t, y)
        # The bias follows the noise level, so that the whitened gap stays alike over the chain.
        level = (1 - self.target.alphas[t]).sqrt().view(-1, 1)
        eps = exact[..., 0] + self.eps_bias * level * torch.from_numpy(self.direction).float()
        return torch.stack([eps, exact[..., 1] + self.variance_bias], dim=-1)


class SwingingDrafter(BiasedDrafter):
    """Off to the side to which the last step did not go: an error that differs between rows of a step."""

    def __call__(self, feature, previous, state, t, y):
        biased = super().__call__(feature, previous, state, t, y)
        axis = torch.from_numpy(self.direction).float()
        forth = ((state - previous).flatten(1) @ axis > 0).view(-1, 1, 1)
        return torch.where(forth, 2 * self.target.features(state, t, y) - biased, biased)


class PerfectDrafter:
    """Predicts the target's own features."""

    def __init__(self, target: object) -> None:
        self.target = target

    def __call__(self, feature, previous, state, t, y):
        return self.target.features(state, t, y)


def projection_p_value(samples: torch.Tensor, mean: np.ndarray, std: np.ndarray, direction: np.ndarray) -> float:
    """KS p-value of samples projected on a direction, against the exact Gaussian of independent elements."""
    values = samples.flatten(1).double().numpy() @ direction
    return float(scipy.stats.kstest(values, "norm", (mean @ direction, np.sqrt((std**2) @ direction**2))).pvalue)


def energy_p_value(samples: torch.Tensor, mean: np.ndarray, std: np.ndarray) -> float:
    """p-value of the mean squared whitened norm: chi-square with n D degrees of freedom under the exact law."""
    whitened = (samples.flatten(1).double().numpy() - mean) / std
    total, freedom = float((whitened**2).sum()), whitened.size
    return 2 * min(scipy.stats.chi2.sf(total, freedom), scipy.stats.chi2.cdf(total, freedom))


def law_p_value(samples: torch.Tensor, mean: np.ndarray, std: np.ndarray, direction: np.ndarray) -> float:
    """The smaller of the directed and the energy test's p-values, doubled (Bonferroni)."""
    pair = projection_p_value(samples, mean, std, direction), energy_p_value(samples, mean, std)
    return min(1.0, 2 * min(pair))
