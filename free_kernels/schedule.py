"""Gaussian transition schedules: what a sampler step does with the network's output.

Every step is ``x_{k+1} ~ N(mean(x_k, output), diag(variance(output)))``. A schedule is a table of ``K`` rows of
coefficients (:class:`TransitionColumn`), so that rows at different steps can be handled in one vectorised call.
"""

from __future__ import annotations

import enum
import functools
import math
from dataclasses import dataclass

import numpy as np
import torch

from free_kernels.validation import check_choice, check_float, check_int, fail

VARIANCES = ("auto", "fixed_small", "fixed_large", "learned_range")


class TransitionColumn(enum.IntEnum):
    """Columns of a transition table ``[K, 8]``.

    Without clipping, ``mean = MEAN_FROM_STATE x + MEAN_FROM_OUTPUT e``; with clipping, ``x0 = clamp(X0_FROM_STATE x +
    X0_FROM_OUTPUT e)`` and ``mean = MEAN_FROM_X0 x0 + MEAN_FROM_STATE_GIVEN_X0 x``. In both,
    ``log std = LOG_STD + LOG_STD_SLOPE v`` with v the network's variance channels; a fixed variance has slope 0, and
    the last step has ``LOG_STD = -inf``: it adds no noise.
    """

    MEAN_FROM_STATE = 0
    MEAN_FROM_OUTPUT = 1
    LOG_STD = 2
    LOG_STD_SLOPE = 3
    X0_FROM_STATE = 4
    X0_FROM_OUTPUT = 5
    MEAN_FROM_X0 = 6
    MEAN_FROM_STATE_GIVEN_X0 = 7


def linear_betas(num_train_steps: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> np.ndarray:
    """The linear beta schedule of Ho et al. 2020, scaled to any length as in improved DDPM; float64 ``[T]``."""
    scale = 1000 / num_train_steps
    return np.linspace(scale * beta_start, scale * beta_end, num_train_steps, dtype=np.float64)


def respaced_timesteps(num_train_steps: int, num_steps: int) -> list[int]:
    """The ``num_steps`` training timesteps kept by improved DDPM's even respacing, ascending.

    The first and the last training step are always kept (one step keeps only the first); the points between are
    accumulated strides rounded half to even, as in Nichol & Dhariwal 2021.
    """
    if num_steps == 1:
        return [0]
    stride = (num_train_steps - 1) / (num_steps - 1)
    position, kept = 0.0, []
    for _ in range(num_steps):
        kept.append(round(position))
        position += stride
    return kept


@dataclass(frozen=True)
class DDPMSchedule:
    """Ancestral DDPM sampling over respaced timesteps (Ho et al. 2020; Nichol & Dhariwal 2021).

    Args:
        num_steps: K, the sampler's steps, in ``[1, num_train_steps]``.
        num_train_steps: T, the number of timesteps that the network was trained on.
        variance: ``"fixed_small"`` (posterior variance), ``"fixed_large"`` (beta), ``"learned_range"`` (the network's
            interpolation between the two, in the log), or ``"auto"``: learned if the target learns one, else
            ``"fixed_small"``.
        clip_denoised: clamp the predicted clean sample to ``[-1, 1]`` (pixel-space models; latents are not clipped).
        beta_start: first beta of the linear schedule, for T = 1000.
        beta_end: last beta of the linear schedule, for T = 1000.

    Raises:
        ValueError, TypeError: an argument is out of range or of another type.
    """

    num_steps: int = 250
    num_train_steps: int = 1000
    variance: str = "auto"
    clip_denoised: bool = False
    beta_start: float = 1e-4
    beta_end: float = 0.02

    def __post_init__(self) -> None:
        where = "DDPMSchedule"
        check_int(where, "num_train_steps", self.num_train_steps, 1)
        check_int(where, "num_steps", self.num_steps, 1, self.num_train_steps)
        check_choice(where, "variance", self.variance, VARIANCES)
        check_float(where, "beta_start", self.beta_start, 0.0, 1.0)
        check_float(where, "beta_end", self.beta_end, self.beta_start, 1.0)
        if not isinstance(self.clip_denoised, bool):
            fail(where, "clip_denoised", "a bool", self.clip_denoised, TypeError)
        betas = self.train_betas
        if not (betas.min() > 0 and betas.max() < 1):
            fail(where, "beta_start, beta_end", "such that every scaled beta lies in (0, 1)", f"{betas.max():g}")

    @functools.cached_property
    def train_betas(self) -> np.ndarray:
        """Betas of the T training steps, float64."""
        return linear_betas(self.num_train_steps, self.beta_start, self.beta_end)

    @functools.cached_property
    def train_alphas_cumprod(self) -> np.ndarray:
        """Cumulative product of ``1 - beta`` over the T training steps, float64."""
        return np.cumprod(1.0 - self.train_betas)

    @functools.cached_property
    def _kept(self) -> np.ndarray:
        return np.array(respaced_timesteps(self.num_train_steps, self.num_steps))

    @functools.cached_property
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
        betas, alphas_cumprod, before = (torch.from_numpy(a[::-1].copy()) for a in self._betas)
        low, high = self.log_variance_range()
        fixed = {"fixed_small": low, "fixed_large": high}
        bias = fixed[variance] / 2 if variance in fixed else (low + high) / 4
        slope = torch.zeros_like(low) if variance in fixed else (high - low) / 4
        bias[-1], slope[-1] = -torch.inf, 0.0

        columns = torch.empty(self.num_steps, len(TransitionColumn), dtype=torch.float64)
        columns[:, TransitionColumn.MEAN_FROM_STATE] = (1.0 - betas).rsqrt()
        columns[:, TransitionColumn.MEAN_FROM_OUTPUT] = -betas * ((1.0 - alphas_cumprod) * (1.0 - betas)).rsqrt()
        columns[:, TransitionColumn.LOG_STD] = bias
        columns[:, TransitionColumn.LOG_STD_SLOPE] = slope
        columns[:, TransitionColumn.X0_FROM_STATE] = alphas_cumprod.rsqrt()
        columns[:, TransitionColumn.X0_FROM_OUTPUT] = -(1.0 / alphas_cumprod - 1.0).sqrt()
        columns[:, TransitionColumn.MEAN_FROM_X0] = betas * before.sqrt() / (1.0 - alphas_cumprod)
        columns[:, TransitionColumn.MEAN_FROM_STATE_GIVEN_X0] = (
            (1.0 - before) * (1.0 - betas).sqrt() / (1.0 - alphas_cumprod)
        )
        return columns.float()

    @property
    def clip(self) -> float:
        """Bound of the predicted clean sample; infinite where nothing is clipped."""
        return 1.0 if self.clip_denoised else math.inf
