"""The law of chains with diffusers' Gaussian schedulers: against the schedulers' own loops, and when speculated."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import mutations
import pytest
import scipy.stats
import torch
from analytic import DETECTED, FALSE_ALARM, BiasedDrafter, GaussianTarget, law_p_value

pytest.importorskip("diffusers")

from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    TCDScheduler,
)
from scheduler_cases import Case, input_scale

import free_kernels.sampling.round
from free_kernels import ancestral_sample, sample
from free_kernels.constants import TIME_TICKS, TransitionColumn

pytestmark = pytest.mark.filterwarnings("ignore")
STD, DRAWS = 0.5, 40_000
IMAGES, LABEL = 3000, 1
LABELS = torch.full((IMAGES,), LABEL)
UNCLIPPED = {"clip_sample": False}
LINSPACE = {**UNCLIPPED, "timestep_spacing": "linspace"}
FIRST_ORDER = {"solver_order": 1, "algorithm_type": "sde-dpmsolver++"}


def consistency(steps: int) -> dict[str, int]:
    return {"original_inference_steps": max(50, steps)}


# Deviations of 10, 50 and 200 steps that start from pure noise, with the exact network of N(0, 0.25).
LAWS = {
    "DDPM, leading": (DDPMScheduler, UNCLIPPED, None, (0.333, 0.444, 0.483)),
    "DDPM, linspace": (DDPMScheduler, LINSPACE, None, (0.323, 0.443, 0.483)),
    "DDIM 1, leading": (DDIMScheduler, UNCLIPPED, 1.0, (0.333, 0.444, 0.483)),
    "DDIM 1, linspace": (DDIMScheduler, LINSPACE, 1.0, (0.356, 0.448, 0.483)),
    "EulerAncestral": (EulerAncestralDiscreteScheduler, {}, None, (0.323, 0.443, 0.483)),
    "SDE-DPM-Solver++ 1": (DPMSolverMultistepScheduler, FIRST_ORDER, None, (0.333, 0.444, 0.483)),
    "TCD 1": (TCDScheduler, {}, 1.0, (0.316, 0.357, 0.376)),
    "TCD 0.3": (TCDScheduler, {}, 0.3, (0.382, 0.449, 0.467)),
    "LCM": (LCMScheduler, {}, None, (0.296, 0.331, 0.343)),
    "FlowMatchEuler": (FlowMatchEulerDiscreteScheduler, {"stochastic_sampling": True}, None, (0.305, 0.339, 0.348)),
}  # fmt: skip


def case_of(name: str, steps: int) -> Case:
    kind, settings, eta, _ = LAWS[name]
    if kind in (TCDScheduler, LCMScheduler):
        settings = {**settings, **consistency(steps)}
    return Case(kind, settings, {"num_inference_steps": steps}, eta)


def slopes(case: Case) -> torch.Tensor:
    """Network output over its input at every step: noise, or for flow schedulers the velocity towards the data."""
    scheduler = case.scheduler()
    scheduler.set_timesteps(**case.call)
    steps = len(scheduler.timesteps)
    if case.kind is FlowMatchEulerDiscreteScheduler:
        sigma = scheduler.sigmas.double()[:steps]
        return ((1 - sigma) * STD**2 - sigma) / ((1 - sigma).square() * STD**2 + sigma.square())
    if hasattr(scheduler, "sigmas"):
        alpha = 1 / (scheduler.sigmas.double()[:steps].square() + 1)
    else:
        alpha = scheduler.alphas_cumprod.double()[scheduler.timesteps]
    return (1 - alpha).sqrt() / (alpha * STD**2 + 1 - alpha)


def deviation(case: Case) -> float:
    """Of the last state, in closed form: every step is linear in the state."""
    schedule = case.schedule()
    variance = schedule.init_noise_sigma**2
    for column, slope in zip(schedule.columns, slopes(case), strict=True):
        factor = column[TransitionColumn.MEAN_FROM_STATE] + column[TransitionColumn.MEAN_FROM_OUTPUT] * slope
        variance = factor**2 * variance + (2 * column[TransitionColumn.LOG_STD]).exp()
    return float(variance**0.5)


def their_draws(case: Case) -> torch.Tensor:
    """Last states ``[DRAWS]`` of the scheduler's own loop with the same network."""
    scheduler = case.scheduler()
    scheduler.set_timesteps(**case.call)
    generator = torch.Generator().manual_seed(0)
    state = torch.randn(DRAWS, 1, 1, 1, generator=generator) * float(getattr(scheduler, "init_noise_sigma", 1.0))
    sign = -1 if case.kind is FlowMatchEulerDiscreteScheduler else 1
    eta: dict[str, Any] = {} if case.eta is None else {"eta": case.eta}
    for k, (t, slope) in enumerate(zip(scheduler.timesteps, slopes(case).tolist(), strict=True)):
        output = sign * slope * state / input_scale(scheduler, k)
        state = scheduler.step(output, t, state, generator=generator, **eta).prev_sample
    return state.flatten().double()


def deviation_p_value(draws: torch.Tensor, std: float) -> float:
    """Of the mean square of centred normals, two-sided."""
    total = float(draws.square().sum()) / std**2
    return 2 * min(scipy.stats.chi2.sf(total, len(draws)), scipy.stats.chi2.cdf(total, len(draws)))


@pytest.mark.parametrize("name", LAWS)
def test_deviations_are_those_of_the_page(name):
    """What every scheduler converges to with an exact network: the data's .5, or less."""
    found = [deviation(case_of(name, steps)) for steps in (10, 50, 200)]
    assert found == pytest.approx(LAWS[name][3], abs=5.1e-4)


@pytest.mark.parametrize("steps", [10, 50])
@pytest.mark.parametrize("name", LAWS)
def test_chains_have_the_law_of_the_schedulers_own_loop(name, steps):
    case = case_of(name, steps)
    assert deviation_p_value(their_draws(case), deviation(case)) > FALSE_ALARM


@pytest.mark.parametrize(
    ("drawn", "other"), [("DDIM 1, linspace", "DDPM, linspace"), ("LCM", "TCD 1"), ("DDPM, linspace", "DDPM, leading")]
)
def test_another_schedulers_law_is_found(drawn, other):
    """The comparison's negative control."""
    assert deviation_p_value(their_draws(case_of(drawn, 10)), deviation(case_of(other, 10))) < DETECTED


@dataclass
class FlowTarget(GaussianTarget):
    """The exact velocity towards the data of ``N(class mean, class std^2)``."""

    family = "flow"
    num_train_steps = TIME_TICKS

    def __post_init__(self) -> None:
        super().__post_init__()
        # What the biased drafter scales its bias by.
        self.alphas = torch.arange(TIME_TICKS) / TIME_TICKS

    def linear(self, t: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        signal = t.double().unsqueeze(1) / TIME_TICKS
        variance = self.stds[y].double() ** 2
        slope = (signal * variance - (1 - signal)) / (signal**2 * variance + (1 - signal) ** 2)
        return slope.float(), ((1 - slope * signal) * self.means[y]).float()


EIGHT = {"num_inference_steps": 8}
# The betas of the analytic target.
LINEAR = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
# Schedulers, and how far off the drafter is so that it is refused often.
SPECULATED = {
    "DDPM, fixed_large": (Case(DDPMScheduler, {**UNCLIPPED, "variance_type": "fixed_large"}, EIGHT), 0.6),
    "DDIM, linspace": (Case(DDIMScheduler, LINSPACE, EIGHT, 1.0), 0.4),
    "DDIM 0.6, leading": (Case(DDIMScheduler, UNCLIPPED, EIGHT, 0.6), 0.3),
    "EulerAncestral": (Case(EulerAncestralDiscreteScheduler, {"timestep_spacing": "leading"}, EIGHT), 0.4),
    "SDE-DPM-Solver++ 1": (Case(DPMSolverMultistepScheduler, FIRST_ORDER, EIGHT), 0.4),
    "TCD 0.5": (Case(TCDScheduler, LINEAR, EIGHT, 0.5), 0.6),
    "TCD 1": (Case(TCDScheduler, LINEAR, EIGHT, 1.0), 1.0),
    "LCM": (Case(LCMScheduler, LINEAR, EIGHT), 1.0),
    "FlowMatchEuler": (Case(FlowMatchEulerDiscreteScheduler, {"stochastic_sampling": True}, EIGHT), 1.0),
}


def speculated(name: str, schedule=None):
    """Images of a biased drafter, and what the test of their law needs: result, final law, direction."""
    case, bias = SPECULATED[name]
    target = FlowTarget() if case.kind is FlowMatchEulerDiscreteScheduler else GaussianTarget()
    drafter = BiasedDrafter(target, eps_bias=bias)
    result = sample(target, LABELS, schedule=schedule or case.schedule(), drafter=drafter, seed=11)
    return result, target.final_law(case.schedule(), LABEL), drafter.direction


@pytest.mark.parametrize("name", SPECULATED)
def test_speculation_keeps_the_law(name):
    result, law, direction = speculated(name)
    assert 0.1 < result.stats.acceptance < 0.97, "the drafter has to be bad enough to exercise reflection"
    assert law_p_value(result.samples, *law, direction) > FALSE_ALARM


@pytest.mark.parametrize("name", SPECULATED)
def test_a_coupling_that_accepts_everything_is_found(name, monkeypatch):
    monkeypatch.setattr(free_kernels.sampling.round, "couple", mutations.always_accept)
    result, law, direction = speculated(name)
    assert law_p_value(result.samples, *law, direction) < DETECTED


@pytest.mark.parametrize("name", SPECULATED)
def test_ordinary_chains_have_the_law(name):
    case, _ = SPECULATED[name]
    target = FlowTarget() if case.kind is FlowMatchEulerDiscreteScheduler else GaussianTarget()
    result = ancestral_sample(target, LABELS, schedule=case.schedule(), seed=5)
    law, direction = target.final_law(case.schedule(), LABEL), BiasedDrafter(target).direction
    assert law_p_value(result.samples, *law, direction) > FALSE_ALARM


def test_the_law_of_ddpms_steps_is_not_ddims_on_that_grid():
    ddpm = Case(DDPMScheduler, LINSPACE, EIGHT).schedule()
    result, law, direction = speculated("DDIM, linspace", ddpm)
    assert law_p_value(result.samples, *law, direction) < DETECTED


def test_the_noise_scale_of_lcm_is_not_tcds():
    schedule = SPECULATED["TCD 0.5"][0].schedule()
    columns = schedule.columns.clone()
    columns[:, TransitionColumn.LOG_STD] = SPECULATED["LCM"][0].schedule().columns[:, TransitionColumn.LOG_STD]
    result, law, direction = speculated("TCD 0.5", dataclasses.replace(schedule, columns=columns))
    assert law_p_value(result.samples, *law, direction) < DETECTED
