"""DDIM transitions (Song et al. 2021, arXiv 2010.02502): from deterministic (eta = 0) to ancestral (eta = 1)."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from free_kernels.constants import TransitionColumn
from free_kernels.schedules.ddpm import cosine_betas
from free_kernels.schedules.timesteps import SPACINGS, linear_betas, spaced_timesteps
from free_kernels.validation import check_choice, check_float, check_int, fail


@dataclass(frozen=True)
class DDIMSchedule:
    """DDIM sampling of a noise-prediction model over a subsequence of its training timesteps.

    A step is ``sqrt(abar') x0 + sqrt(1 - abar' - s^2) e + s z`` with ``s = eta sqrt((1 - abar') / (1 - abar))
    sqrt(1 - abar / abar')`` and abar' = 1 after the last one, which adds no noise (equations 12 and 16).

    With ``eta = 0`` no step has noise: ``ancestral_sample`` draws with it, and ``sample`` refuses it, because a draft
    of a deterministic step is either identical or wrong. With ``eta > 0`` steps are Gaussian and ``sample`` is
    lossless. A learned variance is not used.

    Args:
        num_steps: K, in ``[1, num_train_steps]``.
        eta: share of the ancestral noise, in ``[0, 1]``.
        num_train_steps: T, the number of timesteps that the network was trained on.
        timestep_spacing: as in :class:`DDPMSchedule`.
        clip_denoised: clamp the predicted clean sample to ``[-1, 1]``; e is then the noise that this sample implies.
        beta_start: first beta of the linear schedule, for T = 1000.
        beta_end: last beta of the linear schedule, for T = 1000.
        beta_schedule: ``"linear"`` or ``"squaredcos_cap_v2"`` (cosine), which has its own betas.

    Raises:
        ValueError, TypeError: an argument is out of range or of another type.
    """

    num_steps: int = 50
    eta: float = 0.0
    num_train_steps: int = 1000
    timestep_spacing: str = "improved_ddpm"
    clip_denoised: bool = False
    beta_start: float = 1e-4
    beta_end: float = 0.02
    beta_schedule: str = "linear"

    def __post_init__(self) -> None:
        where = "DDIMSchedule"
        check_int(where, "num_train_steps", self.num_train_steps, 1)
        check_int(where, "num_steps", self.num_steps, 1, self.num_train_steps)
        check_float(where, "eta", self.eta, 0.0, 1.0)
        check_choice(where, "timestep_spacing", self.timestep_spacing, SPACINGS)
        check_float(where, "beta_start", self.beta_start, 0.0, 1.0)
        check_float(where, "beta_end", self.beta_end, self.beta_start, 1.0)
        if not isinstance(self.clip_denoised, bool):
            fail(where, "clip_denoised", "a bool", self.clip_denoised, TypeError)
        check_choice(where, "beta_schedule", self.beta_schedule, ("linear", "squaredcos_cap_v2"))
        betas = self._train_betas
        if not (betas.min() > 0 and betas.max() < 1):
            fail(where, "beta_start, beta_end", "such that every scaled beta lies in (0, 1)", f"{betas.max():g}")

    @property
    def _train_betas(self) -> np.ndarray:
        if self.beta_schedule == "squaredcos_cap_v2":
            return cosine_betas(self.num_train_steps)
        return linear_betas(self.num_train_steps, self.beta_start, self.beta_end)

    @functools.cached_property
    def train_alphas_cumprod(self) -> np.ndarray:
        """Cumulative product of ``1 - beta`` over the T training steps, float64."""
        return np.cumprod(1.0 - self._train_betas)

    @functools.cached_property
    def timesteps(self) -> Tensor:
        """Training timestep shown to the network at step k = 0 (noise) ... K-1 (last); int64 ``[K]``, descending."""
        return torch.tensor(
            spaced_timesteps(self.num_train_steps, self.num_steps, self.timestep_spacing)[::-1], device="cpu"
        )

    def resolve_variance(self, learns_variance: bool) -> str:
        """The variance type in force: that of eta, whatever the network learns."""
        return "fixed"

    def table(self, variance: str = "fixed") -> Tensor:
        """Transition coefficients, float32 ``[K, 8]``, rows in sampling order, columns of :class:`TransitionColumn`."""
        alpha = torch.from_numpy(self.train_alphas_cumprod)[self.timesteps]
        after = torch.cat([alpha[1:], torch.ones(1, dtype=torch.float64, device="cpu")])
        std = self.eta * ((1 - after) / (1 - alpha) * (1 - alpha / after)).sqrt()
        # With eta = 1 this is zero up to rounding, which could make it negative.
        towards_noise = (1 - after - std.square()).clamp(min=0.0).sqrt()
        columns = torch.zeros(self.num_steps, len(TransitionColumn), dtype=torch.float64, device="cpu")
        columns[:, TransitionColumn.X0_FROM_STATE] = alpha.rsqrt()
        columns[:, TransitionColumn.X0_FROM_OUTPUT] = -(1 / alpha - 1).sqrt()
        columns[:, TransitionColumn.MEAN_FROM_STATE] = (after / alpha).sqrt()
        columns[:, TransitionColumn.MEAN_FROM_OUTPUT] = towards_noise - (after * (1 / alpha - 1)).sqrt()
        columns[:, TransitionColumn.MEAN_FROM_STATE_GIVEN_X0] = towards_noise * (1 - alpha).rsqrt()
        columns[:, TransitionColumn.MEAN_FROM_X0] = after.sqrt() - towards_noise * (alpha / (1 - alpha)).sqrt()
        columns[:, TransitionColumn.LOG_STD] = std.log()
        return columns.float()

    @property
    def clip(self) -> float:
        """Bound of the predicted clean sample; infinite where nothing is clipped."""
        return 1.0 if self.clip_denoised else math.inf
