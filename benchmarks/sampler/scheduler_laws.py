"""What chains with diffusers' schedulers converge to where the network is exact: data N(0, 1/4), one dimension.

Every output is then linear in the state, so that a Gaussian chain's law has a closed form from our table, and any
scheduler's law can be drawn with its own loop.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    TCDScheduler,
)
from torch import Tensor

from free_kernels import GaussianSchedule, schedule_from_diffusers
from free_kernels.constants import TransitionColumn

DATA_STD = 0.5


class Chosen(NamedTuple):
    """A scheduler as a user sets it up; its settings and the eta of its steps."""

    kind: type
    settings: dict[str, Any]
    eta: float | None = None

    def scheduler(self, steps: int) -> Any:
        """A new one that takes a number of steps, its timesteps set."""
        settings = dict(self.settings)
        if self.kind in (TCDScheduler, LCMScheduler):
            settings["original_inference_steps"] = max(50, steps)
        scheduler = self.kind(**settings)
        scheduler.set_timesteps(steps)
        return scheduler

    def schedule(self, steps: int) -> GaussianSchedule:
        """Its steps as a table."""
        return schedule_from_diffusers(self.scheduler(steps), steps, eta=self.eta)


def _sde(order: int) -> dict[str, Any]:
    return {"solver_order": order, "algorithm_type": "sde-dpmsolver++"}


_UNCLIPPED, _LINSPACE = {"clip_sample": False}, {"clip_sample": False, "timestep_spacing": "linspace"}
GAUSSIAN = {
    "DDPM, `leading`": Chosen(DDPMScheduler, _UNCLIPPED),
    "DDPM, `linspace`": Chosen(DDPMScheduler, _LINSPACE),
    "DDIM, eta 1, `leading`": Chosen(DDIMScheduler, _UNCLIPPED, 1.0),
    "DDIM, eta 1, `linspace`": Chosen(DDIMScheduler, _LINSPACE, 1.0),
    "EulerAncestral": Chosen(EulerAncestralDiscreteScheduler, {}),
    "sde-dpmsolver++, order 1": Chosen(DPMSolverMultistepScheduler, _sde(1)),
    "TCD, eta 0.3": Chosen(TCDScheduler, {}, 0.3),
    "TCD, eta 1": Chosen(TCDScheduler, {}, 1.0),
    "LCM": Chosen(LCMScheduler, {}),
    "FlowMatchEuler, stochastic": Chosen(FlowMatchEulerDiscreteScheduler, {"stochastic_sampling": True}),
}
MULTISTEP = {
    "sde-dpmsolver++, order 2": Chosen(DPMSolverMultistepScheduler, _sde(2)),
    "sde-dpmsolver++, order 3": Chosen(DPMSolverMultistepScheduler, _sde(3)),
}


def slopes(scheduler: Any) -> Tensor:
    """The exact network's output over its input at every step, float64 ``[K]``: noise, or noise minus data."""
    count = len(scheduler.timesteps)
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        sigma = scheduler.sigmas.double()[:count]
        signal = 1 - sigma
        return (sigma - signal * DATA_STD**2) / (signal.square() * DATA_STD**2 + sigma.square())
    if hasattr(scheduler, "sigmas"):
        alpha = 1 / (scheduler.sigmas.double()[:count].square() + 1)
    else:
        alpha = scheduler.alphas_cumprod.double()[scheduler.timesteps]
    return (1 - alpha).sqrt() / (alpha * DATA_STD**2 + 1 - alpha)


def deviation(chosen: Chosen, steps: int) -> float:
    """Of the last state of a Gaussian chain, in closed form from our table."""
    schedule, ratios = chosen.schedule(steps), slopes(chosen.scheduler(steps))
    # Flow targets answer with the velocity towards the data.
    ratios = -ratios if schedule.family == "flow" else ratios
    variance = torch.tensor(schedule.init_noise_sigma**2, dtype=torch.float64)
    for column, slope in zip(schedule.columns, ratios, strict=True):
        factor = column[TransitionColumn.MEAN_FROM_STATE] + column[TransitionColumn.MEAN_FROM_OUTPUT] * slope
        variance = factor**2 * variance + (2 * column[TransitionColumn.LOG_STD]).exp()
    return float(variance.sqrt())


def draws(chosen: Chosen, steps: int, count: int, seed: int = 0) -> Tensor:
    """Last states float64 ``[count]`` of the scheduler's own loop, used as it documents."""
    scheduler, generator = chosen.scheduler(steps), torch.Generator().manual_seed(seed)
    eta: dict[str, Any] = {} if chosen.eta is None else {"eta": chosen.eta}
    state = torch.randn(count, 1, 1, 1, generator=generator) * float(getattr(scheduler, "init_noise_sigma", 1.0))
    for t, slope in zip(scheduler.timesteps, slopes(scheduler).tolist(), strict=True):
        shown = scheduler.scale_model_input(state, t) if hasattr(scheduler, "scale_model_input") else state
        state = scheduler.step(slope * shown, t, state, generator=generator, **eta).prev_sample
    return state.flatten().double()
