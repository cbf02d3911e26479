"""Gaussian transition schedules: what a sampler step does with the network's output.

Every step is ``x_{k+1} ~ N(mean(x_k, output), diag(variance(output)))``. A schedule is a table of ``K`` rows of
coefficients (:class:`TransitionColumn`), so that rows at different steps can be handled in one vectorised call.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from free_kernels.constants import TransitionColumn
from free_kernels.schedules.diffusers import (
    READERS,
    check_lineage,
    is_gaussian,
    is_scheduler,
    kind_of_scheduler,
    refuse,
)
from free_kernels.schedules.timesteps import SPACINGS, linear_betas, spaced_timesteps
from free_kernels.validation import check_choice, check_float, check_int, describe, fail

VARIANCES = ("auto", "fixed_small", "fixed_large", "learned_range")
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
PREDICTIONS = ("epsilon", "v_prediction", "sample")

# diffusers bounds a variance from below before it takes the logarithm.
SMALLEST_VARIANCE = 1e-20
# The cosine schedule bounds its betas from above, where the cumulative product comes near zero.
LARGEST_COSINE_BETA = 0.999


def scaled_linear_betas(num_train_steps: int, beta_start: float, beta_end: float) -> np.ndarray:
    """Betas whose square roots are evenly spaced (Rombach et al. 2022), scaled alike; float64 ``[T]``."""
    scale = 1000 / num_train_steps
    return np.linspace((scale * beta_start) ** 0.5, (scale * beta_end) ** 0.5, num_train_steps, dtype=np.float64) ** 2


def cosine_betas(num_train_steps: int) -> np.ndarray:
    """Betas of the squared-cosine cumulative product of Nichol & Dhariwal 2021, equation 17; float64 ``[T]``."""
    edges = np.arange(num_train_steps + 1, dtype=np.float64) / num_train_steps
    alphas_cumprod = np.cos((edges + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1.0 - alphas_cumprod[1:] / alphas_cumprod[:-1], LARGEST_COSINE_BETA)


@dataclass(frozen=True)
class DDPMSchedule:
    """Ancestral DDPM sampling over respaced timesteps (Ho et al. 2020; Nichol & Dhariwal 2021).

    Args:
        num_steps: K, the sampler's steps, in ``[1, num_train_steps]``.
        num_train_steps: T, the number of timesteps that the network was trained on.
        variance: ``"fixed_small"`` (posterior variance), ``"fixed_large"`` (beta), ``"learned_range"`` (the network's
            interpolation between the two, in the log), or ``"auto"``: learned if the target learns one, else
            ``"fixed_small"``, as diffusers takes it. The original DiT's ``create_diffusion(learn_sigma=False)`` is
            ``"fixed_large"``: a model without a learned variance that is to be sampled as there is asked for that.
        clip_denoised: clamp the predicted clean sample to ``[-clip_range, clip_range]`` (pixel-space models; latents
            are not clipped).
        beta_start: first beta, for T = 1000; the cosine schedule has its own.
        beta_end: last beta, for T = 1000.
        beta_schedule: ``"linear"``, ``"scaled_linear"`` (in the square root) or ``"squaredcos_cap_v2"`` (cosine).
        prediction_type: what the network predicts: the noise (``"epsilon"``), the velocity ``sqrt(abar) noise -
            sqrt(1 - abar) x0`` (``"v_prediction"``) or the clean sample (``"sample"``).
        timestep_spacing: ``"improved_ddpm"`` (its even respacing), or one of diffusers' rules ``"linspace"``,
            ``"leading"`` and ``"trailing"``; see :func:`spaced_timesteps`.
        steps_offset: added to every timestep of ``"leading"``.
        clip_range: bound of the clean sample under ``clip_denoised``.

    The step at timestep 0 adds no noise. Where a spacing ends above it, the last step is diffusers': noise with
    variance beta for ``"fixed_large"``, a learned share of that for ``"learned_range"``, none for ``"fixed_small"``.

    Raises:
        ValueError, TypeError: an argument is out of range or of another type.
    """

    num_steps: int = 250
    num_train_steps: int = 1000
    variance: str = "auto"
    clip_denoised: bool = False
    beta_start: float = 1e-4
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    prediction_type: str = "epsilon"
    timestep_spacing: str = "improved_ddpm"
    steps_offset: int = 0
    clip_range: float = 1.0

    def __post_init__(self) -> None:
        where = "DDPMSchedule"
        check_int(where, "num_train_steps", self.num_train_steps, 1)
        check_int(where, "num_steps", self.num_steps, 1, self.num_train_steps)
        check_choice(where, "variance", self.variance, VARIANCES)
        check_float(where, "beta_start", self.beta_start, 0.0, 1.0)
        check_float(where, "beta_end", self.beta_end, self.beta_start, 1.0)
        if not isinstance(self.clip_denoised, bool):
            fail(where, "clip_denoised", "a bool", self.clip_denoised, TypeError)
        check_choice(where, "beta_schedule", self.beta_schedule, BETA_SCHEDULES)
        check_choice(where, "prediction_type", self.prediction_type, PREDICTIONS)
        check_choice(where, "timestep_spacing", self.timestep_spacing, SPACINGS)
        check_int(where, "steps_offset", self.steps_offset, 0)
        if not check_float(where, "clip_range", self.clip_range, 0.0) > 0:
            fail(where, "clip_range", "above 0", self.clip_range)
        if self.steps_offset and self.timestep_spacing != "leading":
            fail(where, "steps_offset", f"0 with timestep_spacing {self.timestep_spacing!r}", self.steps_offset)
        if self._kept[-1] >= self.num_train_steps:
            expectation = f"such that every timestep is below {self.num_train_steps}"
            fail(where, "steps_offset", expectation, f"{self.steps_offset}, a timestep {self._kept[-1]}")
        betas = self.train_betas
        if not (betas.min() > 0 and betas.max() < 1):
            fail(where, "beta_start, beta_end", "such that every scaled beta lies in (0, 1)", f"{betas.max():g}")

    @functools.cached_property
    def train_betas(self) -> np.ndarray:
        """Betas of the T training steps, float64."""
        if self.beta_schedule == "squaredcos_cap_v2":
            return cosine_betas(self.num_train_steps)
        betas = linear_betas if self.beta_schedule == "linear" else scaled_linear_betas
        return betas(self.num_train_steps, self.beta_start, self.beta_end)

    @functools.cached_property
    def train_alphas_cumprod(self) -> np.ndarray:
        """Cumulative product of ``1 - beta`` over the T training steps, float64."""
        return np.cumprod(1.0 - self.train_betas)

    @functools.cached_property
    def _kept(self) -> np.ndarray:
        return np.array(
            spaced_timesteps(self.num_train_steps, self.num_steps, self.timestep_spacing, self.steps_offset)
        )

    @property
    def timesteps(self) -> torch.Tensor:
        """Training timestep shown to the network at step k = 0 (noise) ... K-1 (last); int64 ``[K]``, descending."""
        return torch.from_numpy(self._kept[::-1].copy())

    def resolve_variance(self, learns_variance: bool) -> str:
        """The variance type in force for a target.

        Raises:
            ValueError: ``"learned_range"`` asked of a target that learns no variance.
        """
        if self.variance == "auto":
            return "learned_range" if learns_variance else "fixed_small"
        if self.variance == "learned_range" and not learns_variance:
            fail("DDPMSchedule", "variance", "a fixed variance for a target that learns no variance", self.variance)
        return self.variance

    @functools.cached_property
    def _betas(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Respaced betas with the cumulative products at and before each kept step, ascending in time."""
        alphas_cumprod = self.train_alphas_cumprod[self._kept]
        before = np.append(1.0, alphas_cumprod[:-1])
        return 1.0 - alphas_cumprod / before, alphas_cumprod, before

    def log_variance_range(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Ends of the learned range: log of the posterior variance and of beta; float64 ``[K]`` in sampling order.

        The posterior variance is 0 at the last step, so its log is taken from the step before, as in improved DDPM.
        """
        betas, alphas_cumprod, before = self._betas
        posterior = betas * (1.0 - before) / (1.0 - alphas_cumprod)
        clipped = np.append(posterior[1], posterior[1:]) if len(posterior) > 1 else betas
        return torch.from_numpy(np.log(clipped)[::-1].copy()), torch.from_numpy(np.log(betas)[::-1].copy())

    def table(self, variance: str) -> torch.Tensor:
        """Transition coefficients for a resolved variance type; float32 ``[K, 8]``, rows in sampling order.

        Columns are those of :class:`TransitionColumn`.
        """
        check_choice("DDPMSchedule.table", "variance", variance, VARIANCES[1:])
        if variance in self._tables:
            return torch.from_numpy(self._tables[variance].copy())
        made = self._make_table(variance)
        # Not one of a mode that pretends.
        if type(made) is torch.Tensor:
            self._tables[variance] = made.numpy().copy()
        return made

    @functools.cached_property
    def _tables(self) -> dict[str, np.ndarray]:
        """Tables by variance: every run asks for one."""
        return {}

    def _make_table(self, variance: str) -> torch.Tensor:
        """See :meth:`table`."""
        betas, alphas_cumprod, before = (torch.from_numpy(a[::-1].copy()) for a in self._betas)
        low, high = self.log_variance_range()
        ends_with_noise = self._kept[0] > 0 and variance != "fixed_small"
        if ends_with_noise:
            low[-1] = math.log(SMALLEST_VARIANCE)
        fixed = {"fixed_small": low, "fixed_large": high}
        bias = fixed[variance] / 2 if variance in fixed else (low + high) / 4
        slope = torch.zeros_like(low) if variance in fixed else (high - low) / 4
        if not ends_with_noise:
            bias[-1], slope[-1] = -torch.inf, 0.0

        from_x0 = betas * before.sqrt() / (1.0 - alphas_cumprod)
        from_state_given_x0 = (1.0 - before) * (1.0 - betas).sqrt() / (1.0 - alphas_cumprod)
        columns = torch.empty(self.num_steps, len(TransitionColumn), dtype=torch.float64, device="cpu")
        columns[:, TransitionColumn.LOG_STD] = bias
        columns[:, TransitionColumn.LOG_STD_SLOPE] = slope
        columns[:, TransitionColumn.MEAN_FROM_X0] = from_x0
        columns[:, TransitionColumn.MEAN_FROM_STATE_GIVEN_X0] = from_state_given_x0
        if self.prediction_type == "epsilon":
            x0_from_state, x0_from_output = alphas_cumprod.rsqrt(), -(1.0 / alphas_cumprod - 1.0).sqrt()
            mean_from_state = (1.0 - betas).rsqrt()
            mean_from_output = -betas * ((1.0 - alphas_cumprod) * (1.0 - betas)).rsqrt()
        else:
            if self.prediction_type == "v_prediction":
                x0_from_state, x0_from_output = alphas_cumprod.sqrt(), -(1.0 - alphas_cumprod).sqrt()
            else:
                x0_from_state, x0_from_output = torch.zeros_like(betas), torch.ones_like(betas)
            mean_from_state = from_state_given_x0 + from_x0 * x0_from_state
            mean_from_output = from_x0 * x0_from_output
        columns[:, TransitionColumn.X0_FROM_STATE] = x0_from_state
        columns[:, TransitionColumn.X0_FROM_OUTPUT] = x0_from_output
        columns[:, TransitionColumn.MEAN_FROM_STATE] = mean_from_state
        columns[:, TransitionColumn.MEAN_FROM_OUTPUT] = mean_from_output
        return columns.float()

    @property
    def clip(self) -> float:
        """Bound of the predicted clean sample; infinite where nothing is clipped."""
        return float(self.clip_range) if self.clip_denoised else math.inf

    @classmethod
    def from_diffusers(cls, scheduler: Any, num_steps: int) -> DDPMSchedule:
        """The schedule whose steps are those of a diffusers ``DDPMScheduler`` after ``set_timesteps(num_steps)``.

        Args:
            scheduler: the scheduler; it is read, not changed.
            num_steps: K.

        Raises:
            TypeError: not a scheduler.
            ValueError: a scheduler of another kind, or a setting that has no Gaussian transition here.
        """
        where = "DDPMSchedule.from_diffusers"
        if not is_scheduler(scheduler):
            fail(where, "scheduler", "a diffusers DDPMScheduler", describe(scheduler), TypeError)
        kind, config = kind_of_scheduler(scheduler), scheduler.config
        if kind != "DDPMScheduler":
            if kind in READERS and is_gaussian(scheduler):
                other = "free_kernels.schedule_from_diffusers reads this one"
                fail(where, "scheduler", f"a DDPMScheduler ({other})", type(scheduler).__name__)
            refuse(where, scheduler, "a DDPMScheduler, not another")
        check_lineage(where, scheduler)
        for name in ("thresholding", "rescale_betas_zero_snr"):
            if config.get(name):
                fail(where, name, "False (not supported)", config[name])
        if config.get("trained_betas") is not None:
            fail(where, "trained_betas", "None (not supported)", "a list of betas")
        variance = config.get("variance_type", "fixed_small")
        # diffusers undoes the logarithm for fixed_small_log only; fixed_large_log gives NaN there.
        variance = "fixed_small" if variance == "fixed_small_log" else variance
        check_choice(where, "variance_type", variance, VARIANCES[1:])
        check_choice(where, "beta_schedule", config.get("beta_schedule", "linear"), BETA_SCHEDULES)
        spacing = config.get("timestep_spacing", "leading")
        train = config["num_train_timesteps"]
        # diffusers takes the ends as they are at any length; ours are for T = 1000.
        scale = train / 1000
        return cls(
            num_steps=num_steps,
            num_train_steps=train,
            variance=variance,
            clip_denoised=bool(config.get("clip_sample", True)),
            beta_start=config["beta_start"] * scale,
            beta_end=config["beta_end"] * scale,
            beta_schedule=config.get("beta_schedule", "linear"),
            prediction_type=config.get("prediction_type", "epsilon"),
            timestep_spacing=spacing,
            steps_offset=config.get("steps_offset", 0) if spacing == "leading" else 0,
            clip_range=config.get("clip_sample_range", 1.0),
        )
