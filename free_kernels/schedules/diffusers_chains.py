"""The steps of diffusers' schedulers as Gaussian transitions, read from a scheduler after its ``set_timesteps``.

Everything is computed in float64 from the scheduler's own float32 tables (``alphas_cumprod``, ``sigmas``), so that the
steps are those of the scheduler as installed, whatever betas, spacing or rescaling it was made with.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from free_kernels.constants import TIME_TICKS
from free_kernels.schedules.gaussian import Chain
from free_kernels.validation import check_choice, check_float, fail

PREDICTIONS = ("epsilon", "v_prediction", "sample")
# What DDPMScheduler's step reads as a variance. "fixed_large_log" is read as one too, but is its logarithm: NaN.
VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "learned_range")
# The data's deviation of the boundary conditions of latent consistency models, fixed in diffusers.
LCM_DATA_STD = 0.5


class Read(NamedTuple):
    """What a scheduler's steps are, besides their coefficients.

    Attributes:
        chain: the coefficients.
        timesteps: float64 ``[K]``, what the network is shown.
        clip: whether ``clip_sample`` is in force.
        variance: ``"fixed"`` or ``"learned_range"``.
        is_flow: whether the network predicts a velocity.
        init_noise_sigma: deviation of the first state, in the units of the network's input.
    """

    chain: Chain
    timesteps: Tensor
    clip: bool = False
    variance: str = "fixed"
    is_flow: bool = False
    init_noise_sigma: float = 1.0


def _read(values: Any) -> Tensor:
    """Numbers of a scheduler, float64 on the CPU, whatever the default device is."""
    values = values if isinstance(values, Tensor) else torch.as_tensor(values, device="cpu")
    return values.double().cpu()


def _timesteps(scheduler: Any) -> Tensor:
    """Timesteps ``[K]`` without the one at -1 that rounding can append to a ``"trailing"`` grid."""
    timesteps = _read(scheduler.timesteps)
    return timesteps[:-1] if len(timesteps) > 1 and timesteps[-1] < 0 else timesteps


def _sigmas(scheduler: Any, count: int) -> tuple[Tensor, Tensor]:
    """Noise levels at and after each of ``count`` steps, float64."""
    sigmas = _read(scheduler.sigmas)
    return sigmas[:count], torch.cat([sigmas[1:count], sigmas[-1:]])


def _levels(scheduler: Any, where: str) -> tuple[Tensor, Tensor, Tensor]:
    """Timesteps int64 ``[K]``, all cumulative products float64 ``[T]`` and those of the steps ``[K]``."""
    steps = _timesteps(scheduler).long()
    every = _read(scheduler.alphas_cumprod)
    alphas = every[steps]
    if bool((alphas == 0).any()) and scheduler.config.prediction_type == "epsilon":
        # The clean sample is the state less the noise over sqrt(abar).
        reason = "'v_prediction' or 'sample' where the terminal signal is zero (rescale_betas_zero_snr)"
        fail(where, "prediction_type", reason, "epsilon")
    return steps, every, alphas


def _predicted(scheduler: Any, alpha: Tensor, sigma: Tensor, where: str) -> tuple[Tensor, Tensor]:
    """x0 as coefficients of state and output, of a state ``alpha x0 + sigma noise``."""
    kind = check_choice(where, "prediction_type", scheduler.config.prediction_type, PREDICTIONS)
    if kind == "epsilon":
        return 1 / alpha, -sigma / alpha
    if kind == "v_prediction":
        return alpha, -sigma
    return torch.zeros_like(alpha), torch.ones_like(alpha)


def _predicted_by_velocity(sigma: Tensor) -> tuple[Tensor, Tensor]:
    """x0 as coefficients of state and velocity, of a state ``(1 - sigma) x0 + sigma noise``.

    The velocity is that of flow targets, towards the data; diffusers' is its negative.
    """
    return torch.ones_like(sigma), sigma.clone()


def ddpm(scheduler: Any, where: str) -> Read:
    """Posterior of the clean sample (Ho et al. 2020, equation 7), with the variance of ``variance_type``."""
    variance = check_choice(where, "variance_type", scheduler.config.variance_type, VARIANCES)
    steps, _, alphas = _levels(scheduler, where)
    before = torch.cat([alphas[1:], torch.ones(1, dtype=torch.float64, device="cpu")])
    kept = alphas / before
    beta = 1 - kept
    posterior = (1 - before) / (1 - alphas) * beta
    # diffusers bounds the posterior variance from below before it takes the logarithm.
    log_small, log_large = posterior.clamp(min=1e-20).log(), beta.log()
    slope = None
    if variance == "learned_range":
        log_std, slope = (log_small + log_large) / 4, (log_large - log_small) / 4
    else:
        log_std = (log_large if variance == "fixed_large" else posterior.log()) / 2
    if steps[-1] == 0:
        log_std[-1] = -torch.inf
        if slope is not None:
            slope[-1] = 0.0
    from_x0, from_state = before.sqrt() * beta / (1 - alphas), kept.sqrt() * (1 - before) / (1 - alphas)
    x0 = _predicted(scheduler, alphas.sqrt(), (1 - alphas).sqrt(), where)
    chain = Chain(from_state, from_x0, log_std.exp(), *x0, slope)
    kind = "learned_range" if slope is not None else "fixed"
    return Read(chain, steps.double(), bool(scheduler.config.clip_sample), kind)


def ddim(scheduler: Any, where: str, eta: float | None) -> Read:
    """Equation 12 of Song et al. 2021, from t to t - T // K as diffusers steps, wherever the next timestep lies."""
    eta = check_float(where, "eta", 0.0 if eta is None else eta, 0.0, 1.0)
    if eta == 0:
        remedy = "give eta above 0, or draw with ancestral_sample and DDIMSchedule"
        reason = f"one with noise: with eta 0 there is no fresh noise in their steps to speculate on; {remedy}"
        fail(where, "scheduler", reason, f"{type(scheduler).__name__} with eta 0")
    if scheduler.config.clip_sample:
        # Its step clips the clean sample and keeps the noise of the unclipped one, a third term of the mean.
        remedy = "DDIMSchedule(clip_denoised=True) takes the noise that the clipped sample implies"
        fail(where, "clip_sample", f"False for DDIMScheduler ({remedy})", True)
    steps, every, alphas = _levels(scheduler, where)
    earlier = steps - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    last = _read(scheduler.final_alpha_cumprod)
    before = torch.where(earlier >= 0, every[earlier.clamp(min=0)], last)
    std = eta * ((1 - before) / (1 - alphas) * (1 - alphas / before)).clamp(min=0).sqrt()
    from_noise = (1 - before - std.square()).clamp(min=0).sqrt()
    sigma = (1 - alphas).sqrt()
    # The noise is (x - sqrt(abar) x0) / sqrt(1 - abar).
    x0 = _predicted(scheduler, alphas.sqrt(), sigma, where)
    chain = Chain(from_noise / sigma, before.sqrt() - from_noise * alphas.sqrt() / sigma, std, *x0)
    return Read(chain, steps.double())


def tcd(scheduler: Any, where: str, eta: float | None) -> Read:
    """To level s = floor((1 - eta) t') without noise, from there to t' with it (Zheng et al. 2024).

    ``clip_sample`` and ``thresholding`` are in its configuration; its step reads neither.
    """
    eta = check_float(where, "eta", 0.3 if eta is None else eta, 0.0, 1.0)
    if eta == 0:
        fail(where, "eta", "above 0: with eta 0 there is no fresh noise in their steps to speculate on", 0.0)
    steps, every, alphas = _levels(scheduler, where)
    following = torch.cat([steps[1:], steps.new_zeros(1)])
    # In float32, as there: the floor of a product can depend on it.
    between = every[torch.floor((1 - eta) * following).long()]
    kept = every[following] / between
    std = (1 - kept).clamp(min=0).sqrt()
    kept[-1], std[-1] = 1.0, 0.0
    sigma = (1 - alphas).sqrt()
    from_noise = (1 - between).sqrt() / sigma
    x0 = _predicted(scheduler, alphas.sqrt(), sigma, where)
    chain = Chain(kept.sqrt() * from_noise, kept.sqrt() * (between.sqrt() - from_noise * alphas.sqrt()), std, *x0)
    return Read(chain, steps.double())


def lcm(scheduler: Any, where: str) -> Read:
    """The consistency function's sample, noised anew to the next level (Luo et al. 2023)."""
    steps, _, alphas = _levels(scheduler, where)
    scaled = steps.double() * scheduler.config.timestep_scaling
    total = scaled.square() + LCM_DATA_STD**2
    from_state, from_x0 = LCM_DATA_STD**2 / total, scaled / total.sqrt()
    # The last step keeps the sample.
    one = torch.ones(1, dtype=torch.float64, device="cpu")
    signal, std = torch.cat([alphas[1:].sqrt(), one]), torch.cat([(1 - alphas[1:]).sqrt(), 0 * one])
    x0 = _predicted(scheduler, alphas.sqrt(), (1 - alphas).sqrt(), where)
    chain = Chain(signal * from_state, signal * from_x0, std, *x0)
    return Read(chain, steps.double(), bool(scheduler.config.clip_sample))


def euler_ancestral(scheduler: Any, where: str) -> Read:
    """Ancestral steps in sigmas (Karras et al. 2022), as a chain of the network's input ``x / sqrt(sigma^2 + 1)``.

    That is x itself after the last step, where sigma is 0.
    """
    timesteps = _timesteps(scheduler)
    now, after = _sigmas(scheduler, len(timesteps))
    up = (after.square() * (now.square() - after.square()) / now.square()).clamp(min=0).sqrt()
    down = (after.square() - up.square()).clamp(min=0).sqrt()
    root, next_root = (now.square() + 1).sqrt(), (after.square() + 1).sqrt()
    check_choice(where, "prediction_type", scheduler.config.prediction_type, PREDICTIONS[:2])
    # x / root is alpha x0 + sigma noise with alpha = 1 / root.
    x0 = _predicted(scheduler, 1 / root, now / root, where)
    chain = Chain(down / now * root / next_root, (1 - down / now) / next_root, up / next_root, *x0)
    return Read(chain, timesteps, init_noise_sigma=float(scheduler.init_noise_sigma) / float(root[0]))


def sde_dpm_solver(scheduler: Any, where: str) -> Read:
    """First-order steps of SDE-DPM-Solver(++) (Lu et al. 2022); of higher orders the outputs before enter."""
    config = scheduler.config
    timesteps = _timesteps(scheduler)
    now, after = _sigmas(scheduler, len(timesteps))
    if config.variance_type is not None:
        fail(where, "variance_type", "None (the scheduler cuts outputs to three channels)", config.variance_type)
    is_flow = config.prediction_type == "flow_prediction"
    if is_flow != bool(config.use_flow_sigmas) or (is_flow and config.algorithm_type != "sde-dpmsolver++"):
        expected = "'flow_prediction' exactly with use_flow_sigmas and 'sde-dpmsolver++'"
        fail(where, "prediction_type", expected, config.prediction_type)
    if is_flow:
        (alpha, sigma), (next_alpha, next_sigma) = (1 - now, now), (1 - after, after)
        x0 = _predicted_by_velocity(now)
    else:
        alpha, next_alpha = (now.square() + 1).rsqrt(), (after.square() + 1).rsqrt()
        sigma, next_sigma = now * alpha, after * next_alpha
        x0 = _predicted(scheduler, alpha, sigma, where)
    # exp(-h), h the step of log(alpha / sigma).
    shrunk = alpha / next_alpha * (next_sigma / sigma)
    if config.algorithm_type == "sde-dpmsolver++":
        std = next_sigma * (1 - shrunk.square()).clamp(min=0).sqrt()
        chain = Chain(next_sigma / sigma * shrunk, next_alpha * (1 - shrunk.square()), std, *x0)
    else:
        # In terms of the noise, (x - alpha x0) / sigma.
        from_noise = -2 * (next_sigma / shrunk - next_sigma)
        std = (next_sigma / shrunk) * (1 - shrunk.square()).clamp(min=0).sqrt()
        from_state = next_alpha / alpha + from_noise / sigma
        chain = Chain(from_state, -from_noise * alpha / sigma, std, *x0)
    return Read(chain, timesteps, is_flow=is_flow)


def flow_match_euler(scheduler: Any, where: str) -> Read:
    """``(1 - s') x0 + s' noise``: all of the noise is drawn anew in every step."""
    timesteps = _timesteps(scheduler)
    now, after = _sigmas(scheduler, len(timesteps))
    if scheduler.config.invert_sigmas:
        fail(where, "invert_sigmas", "False: with stochastic_sampling such a chain ends in noise", True)
    chain = Chain(torch.zeros_like(now), 1 - after, after.clone(), *_predicted_by_velocity(now))
    return Read(chain, timesteps, is_flow=True)


def flow_ticks(timesteps: Tensor, num_train_timesteps: int) -> Tensor:
    """Timesteps of a flow scheduler, from T at noise down to 0 at data, as a flow target's ticks, 0 at noise."""
    return ((1 - timesteps / num_train_timesteps) * TIME_TICKS).round().long()
