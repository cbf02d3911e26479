"""The law of chains with diffusers' Gaussian schedulers: against the schedulers' own loops, and when speculated."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import mutations
import pytest
import scipy.stats
import torch
from analytic import DETECTED, FALSE_ALARM, BiasedDrafter, GaussianTarget, law_p_value

pytest.importorskip("diffusers")

from call_by_call import play_call_by_call
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    TCDScheduler,
)
from scheduler_cases import Case

import free_kernels.sampling.round
from benchmarks.sampler.scheduler_laws import GAUSSIAN, deviation, draws
from free_kernels import ancestral_sample, sample
from free_kernels.constants import TIME_TICKS, TransitionColumn

pytestmark = pytest.mark.filterwarnings("ignore")
DRAWS = 40_000
IMAGES, LABEL = 3000, 1
LABELS = torch.full((IMAGES,), LABEL)
UNCLIPPED = {"clip_sample": False}
LINSPACE = {**UNCLIPPED, "timestep_spacing": "linspace"}
FIRST_ORDER = {"solver_order": 1, "algorithm_type": "sde-dpmsolver++"}
# Deviations after 10, 50 and 200 steps with the exact network of N(0, 0.25).
LAWS = {
    "DDPM, `leading`": (0.333, 0.444, 0.483),
    "DDPM, `linspace`": (0.323, 0.443, 0.483),
    "DDIM, eta 1, `leading`": (0.333, 0.444, 0.483),
    "DDIM, eta 1, `linspace`": (0.356, 0.448, 0.483),
    "EulerAncestral": (0.323, 0.443, 0.483),
    "sde-dpmsolver++, order 1": (0.333, 0.444, 0.483),
    "TCD, eta 0.3": (0.382, 0.449, 0.467),
    "TCD, eta 1": (0.316, 0.357, 0.376),
    "LCM": (0.296, 0.331, 0.343),
    "FlowMatchEuler, stochastic": (0.305, 0.339, 0.348),
}


def deviation_p_value(states: torch.Tensor, std: float) -> float:
    """Of the mean square of centred normals, two-sided."""
    total = float(states.square().sum()) / std**2
    return 2 * min(scipy.stats.chi2.sf(total, len(states)), scipy.stats.chi2.cdf(total, len(states)))


@pytest.mark.parametrize("name", LAWS)
def test_what_chains_converge_to(name):
    """The data's .5 with an exact network, or less."""
    found = [deviation(GAUSSIAN[name], steps) for steps in (10, 50, 200)]
    assert found == pytest.approx(LAWS[name], abs=5.1e-4)


@pytest.mark.parametrize("steps", [10, 50])
@pytest.mark.parametrize("name", LAWS)
def test_chains_have_the_law_of_the_schedulers_own_loop(name, steps):
    chosen = GAUSSIAN[name]
    assert deviation_p_value(draws(chosen, steps, DRAWS), deviation(chosen, steps)) > FALSE_ALARM


@pytest.mark.parametrize(
    ("drawn", "other"),
    [
        ("DDIM, eta 1, `linspace`", "DDPM, `linspace`"),
        ("LCM", "TCD, eta 1"),
        ("DDPM, `linspace`", "DDPM, `leading`"),
    ],
)
def test_another_schedulers_law_is_found(drawn, other):
    """The comparison's negative control."""
    assert deviation_p_value(draws(GAUSSIAN[drawn], 10, DRAWS), deviation(GAUSSIAN[other], 10)) < DETECTED


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
    play_call_by_call(monkeypatch)
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
