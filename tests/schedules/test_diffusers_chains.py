"""Every Gaussian scheduler, step by step, against the installed diffusers."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("diffusers")

from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    TCDScheduler,
)
from scheduler_cases import KINDS, Case, Inputs, cases, our_steps, prepared, terms, their_steps

from free_kernels.ops.coupling import gaussian_transition

pytestmark = pytest.mark.filterwarnings("ignore")
# Roundings of a step: clean sample, direction and mean take a dozen products and sums.
ROUNDINGS = 16
# Schedulers whose step makes its state float32, whatever it is given.
SINGLE = ("EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler")


def spacing_of(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def size(case: Case, inputs: Inputs) -> torch.Tensor:
    """Sum of the absolute terms of every step, which bounds what its roundings are relative to."""
    schedule = case.schedule()
    part = {name: value.abs() for name, value in terms(schedule, inputs).items()}
    x0 = part["x0 from state"] + part["x0 from output"]
    # Some write the step as the state plus a difference, in their own scale.
    root = 1.0
    if case.kind.__name__ == SINGLE[0]:
        scale = (prepared(case, True).sigmas.square() + 1).sqrt()[: schedule.num_steps + 1]
        root = (scale[:-1] / scale[1:]).view(-1, 1, 1, 1)
        x0 = x0 + part["x0 from state"]
    return part["state"] + part["x0"] * x0 + part["noise"] + 2 * root * inputs.states.abs()


def conditioning(case: Case) -> torch.Tensor:
    """By how much a rounding of the tables is magnified: their differences from 1, of levels and from step to step."""
    scheduler, steps = prepared(case, True), case.schedule().num_steps
    if case.kind.__name__ == SINGLE[2]:
        return torch.ones(steps, 1, 1, 1, dtype=torch.float64)
    if hasattr(scheduler, "sigmas"):
        sigmas = scheduler.sigmas[: steps + 1]
        alphas = (1 - sigmas).square() if case.schedule().family == "flow" else 1 / (sigmas.square() + 1)
        now, after = alphas[:-1], alphas[1:]
    else:
        now = scheduler.alphas_cumprod[scheduler.timesteps[:steps]]
        after = torch.cat([now[1:], now.new_ones(1)])
    gaps = torch.stack([1 - now, (1 - after).where(after < 1, 1), (1 - now / after).where(now != after, 1)])
    return (1 / gaps.abs().amin(0)).view(-1, 1, 1, 1)


def root_error(case: Case, inputs: Inputs) -> torch.Tensor | float:
    """DDIM's direction is the root of ``1 - abar' - s^2``, which can cancel to nothing: then a rounding's root."""
    if case.kind is not DDIMScheduler:
        return 0.0
    part, schedule = terms(case.schedule(), inputs), case.schedule()
    scheduler = prepared(case, True)
    alpha = scheduler.alphas_cumprod[scheduler.timesteps[: schedule.num_steps]].view(-1, 1, 1, 1)
    x0 = part["x0 from state"].abs() + part["x0 from output"].abs()
    noise = (inputs.states.abs() + alpha.sqrt() * x0) / (1 - alpha).sqrt()
    return math.sqrt(ROUNDINGS * spacing_of(torch.float32)) * noise


def worst(difference: torch.Tensor, bound: torch.Tensor) -> float:
    """The largest difference over its bound."""
    return float((difference.abs() / bound).max())


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_step_is_theirs(monkeypatch, kind):
    """The formula, on their own tables: float64, or float32 where their step makes the state float32."""
    count = 0
    for case in cases(kind):
        schedule = case.schedule()
        inputs = Inputs.random(schedule.num_steps, schedule.variance == "learned_range")
        expected = their_steps(monkeypatch, case, inputs, double=True)
        unit = spacing_of(torch.float32 if kind.__name__ in SINGLE else torch.float64)
        bound = ROUNDINGS * (unit + spacing_of(torch.float64) * conditioning(case)) * size(case, inputs)
        # A fixed variance that ends above timestep 0 is bounded from below by 1e-20 there.
        assert worst(our_steps(schedule, inputs) - expected, bound + 1e-9) <= 1, case
        count += 1
    assert count >= 10


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_step_is_the_installed_schedulers(monkeypatch, kind):
    """As installed, everything in float32, coefficients included, and ours as the ops compute it."""
    for case in cases(kind):
        schedule = case.schedule()
        inputs = Inputs.random(schedule.num_steps, schedule.variance == "learned_range")
        expected = their_steps(monkeypatch, case, inputs, double=False)
        bound = ROUNDINGS * spacing_of(torch.float32) * (1 + conditioning(case)) * size(case, inputs)
        bound = bound + root_error(case, inputs) * (case.eta == 1.0)
        mean, std = gaussian_transition(
            inputs.states.float(), inputs.outputs.float(), schedule.table(schedule.variance), clip=schedule.clip
        )
        # A variance that cancels to nothing has a deviation of the root of a rounding.
        assert worst((mean + std * inputs.noise).double() - expected, bound + 1e-9) <= 1, case


NINE, LINSPACE = {"num_inference_steps": 9}, {"timestep_spacing": "linspace", "clip_sample": False}
FIRST_ORDER = {"solver_order": 1, "algorithm_type": "sde-dpmsolver++"}
FLOW = {"stochastic_sampling": True}
# Ours of the one, theirs of the other.
CONFUSED = [
    (Case(DDPMScheduler, LINSPACE, NINE), Case(DDIMScheduler, LINSPACE, NINE, 1.0)),
    (Case(DDPMScheduler, {**LINSPACE, "variance_type": "fixed_large"}, NINE), Case(DDPMScheduler, LINSPACE, NINE)),
    (Case(TCDScheduler, {}, NINE, 1.0), Case(LCMScheduler, {}, NINE)),
    (Case(TCDScheduler, {}, NINE, 0.3), Case(TCDScheduler, {}, NINE, 0.4)),
    (
        Case(DPMSolverMultistepScheduler, FIRST_ORDER, NINE),
        Case(DPMSolverMultistepScheduler, {**FIRST_ORDER, "solver_order": 2}, NINE),
    ),
    (
        Case(FlowMatchEulerDiscreteScheduler, FLOW, NINE),
        Case(FlowMatchEulerDiscreteScheduler, {**FLOW, "shift": 3.0}, NINE),
    ),
]


@pytest.mark.parametrize(("ours", "theirs"), CONFUSED)
def test_another_schedulers_steps_are_seen(monkeypatch, ours, theirs):
    """The comparison's negative control: a thousand times the bound."""
    schedule = ours.schedule()
    inputs = Inputs.random(schedule.num_steps)
    expected = their_steps(monkeypatch, theirs, inputs, double=True)
    bound = ROUNDINGS * spacing_of(torch.float32) * (1 + conditioning(ours)) * size(ours, inputs)
    assert worst(our_steps(schedule, inputs) - expected, bound + 1e-9) > 1000
