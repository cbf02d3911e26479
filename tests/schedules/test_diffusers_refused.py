"""Schedulers and settings that are no chain of Gaussian steps, and what is said of them."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers")

import diffusers
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    TCDScheduler,
    UniPCMultistepScheduler,
)

from free_kernels import DDPMSchedule, schedule_from_diffusers
from free_kernels.schedules.diffusers import READERS, REFUSED

pytestmark = pytest.mark.filterwarnings("ignore")
FIRST_ORDER = {"solver_order": 1, "algorithm_type": "sde-dpmsolver++"}
NO_NOISE = "there is no fresh noise in their steps to speculate on"


def scheduler_names() -> list[str]:
    """Every scheduler that diffusers exports."""
    return [name for name in dir(diffusers) if name.endswith("Scheduler") and not name.startswith("Flax")]


def message(function, *arguments, **keywords) -> str:
    """What a ValueError says."""
    with pytest.raises(ValueError) as caught:
        function(*arguments, **keywords)
    return str(caught.value)


@pytest.mark.parametrize(
    "scheduler",
    [
        EulerAncestralDiscreteScheduler(),
        DDIMScheduler(),
        LCMScheduler(),
        TCDScheduler(),
        DPMSolverMultistepScheduler(**FIRST_ORDER),
        FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_a_noisy_scheduler_is_not_said_to_have_no_noise(scheduler):
    said = message(DDPMSchedule.from_diffusers, scheduler, 10)
    assert "free_kernels.schedule_from_diffusers reads this one" in said
    assert "noise" not in said
    assert said.endswith(f"got {type(scheduler).__name__}")


@pytest.mark.parametrize("read", [schedule_from_diffusers, DDPMSchedule.from_diffusers])
@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(),
        EDMEulerScheduler(),
        EDMDPMSolverMultistepScheduler(),
        UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
        DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_no_other_family_is_sent_to_a_scheduler_of_noise(read, scheduler):
    """What it would be converted to takes a velocity for a noise."""
    said = message(read, scheduler, 10)
    assert NO_NOISE in said
    assert "DDPMScheduler.from_config" not in said


@pytest.mark.parametrize("read", [schedule_from_diffusers, DDPMSchedule.from_diffusers])
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            FlowMatchEulerDiscreteScheduler(shift=3.0).config,
            "not converted from flow matching, got DDPMScheduler with shift 3.0",
        ),
        (EDMEulerScheduler(sigma_data=1.0).config, "not converted from EDM, got DDPMScheduler with sigma_data 1.0"),
        (
            DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True).config,
            "prediction_type must be one of 'epsilon', 'v_prediction', 'sample', got 'flow_prediction'",
        ),
    ],
)
def test_a_scheduler_converted_from_another_family_is_refused(read, settings, said):
    assert said in message(read, DDPMScheduler.from_config(settings), 10)


def test_a_flow_scheduler_made_of_a_noise_scheduler_is_refused():
    config = DDPMScheduler(prediction_type="v_prediction").config
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config, stochastic_sampling=True)
    said = message(schedule_from_diffusers, scheduler, 10)
    assert "prediction_type must be 'flow_prediction' for a scheduler of velocities, got v_prediction" in said


def test_every_scheduler_is_read_or_refused_in_a_line():
    """None is sampled that is not known, and each refusal says why."""
    seen = set()
    for name in scheduler_names():
        try:
            scheduler = getattr(diffusers, name)()
            scheduler.config, scheduler.set_timesteps  # noqa: B018
        except (ImportError, TypeError, AttributeError):
            continue
        if name in READERS:
            continue
        said = message(schedule_from_diffusers, scheduler, 10)
        assert said.startswith("schedule_from_diffusers: scheduler must be one whose steps are Gaussian")
        assert said.endswith(f"got {name}")
        assert "\n" not in said
        if name in REFUSED:
            assert REFUSED[name][0] in said
            seen.add(name)
        else:
            assert "its steps are not read here" in said
            assert "; use" not in said
    assert len(seen) >= 17


@pytest.mark.parametrize("name", ["CosineDPMSolverMultistepScheduler", "DPMSolverSDEScheduler"])
def test_brownian_trees_are_named(name):
    """These two need torchsde, so that their names stand for them."""
    kind = type(name, (), {"step": None, "set_timesteps": None, "config": {}})
    assert "difference of a Brownian tree" in message(schedule_from_diffusers, kind(), 10)


@pytest.mark.parametrize("order", [2, 3])
def test_multistep_orders_are_refused_by_the_output_that_enters(order):
    scheduler = DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", solver_order=order)
    said = message(schedule_from_diffusers, scheduler, 10)
    assert f"the outputs of the steps before enter a step of order {order}; use solver_order=1" in said


def test_a_subclass_with_another_step_is_another_scheduler():
    class Own(DDPMScheduler):
        def step(self, *arguments, **keywords):
            return super().step(*arguments, **keywords)

    class Renamed(DDPMScheduler):
        pass

    assert "its steps are not read here" in message(schedule_from_diffusers, Own(), 10)
    assert schedule_from_diffusers(Renamed(), 10).name == "Renamed"


@pytest.mark.parametrize(
    ("scheduler", "keywords", "said"),
    [
        (DDIMScheduler(), {}, f"with eta 0 {NO_NOISE}"),
        (DDIMScheduler(), {"eta": 0.5}, "clip_sample must be False for DDIMScheduler"),
        (DDIMScheduler(clip_sample=False), {"eta": 1.5}, r"eta must be a finite number in [0, 1], got 1.5"),
        (TCDScheduler(), {"eta": 0.0}, f"eta must be above 0: with eta 0 {NO_NOISE}"),
        (DDPMScheduler(), {"eta": 0.5}, "eta must be None for DDPMScheduler"),
        (DDPMScheduler(thresholding=True), {}, "thresholding must be False: its bound is a quantile"),
        (LCMScheduler(thresholding=True), {}, "thresholding must be False: its bound is a quantile"),
        (DPMSolverMultistepScheduler(thresholding=True, **FIRST_ORDER), {}, "thresholding must be False"),
        (DDPMScheduler(variance_type="fixed_large_log"), {}, "variance_type must be one of"),
        (DDPMScheduler(variance_type="learned"), {}, "variance_type must be one of"),
        (DPMSolverMultistepScheduler(variance_type="learned_range", **FIRST_ORDER), {}, "variance_type must be None"),
        (DDPMScheduler(), {"num_steps": 0}, "num_steps must be an int in [1, 1000]"),
        (DDPMScheduler(), {"num_steps": 10, "timesteps": [9, 3]}, "arguments must be what the scheduler takes"),
        (DDPMScheduler(), {"num_steps": None, "timesteps": [3, 9]}, "must be in descending order"),
        (DDPMScheduler(), {"sigmas": [1.0]}, "sigmas must be None for DDPMScheduler"),
        (TCDScheduler(), {"num_steps": 51}, "arguments must be what the scheduler takes, got num_inference_steps=51"),
        (EulerAncestralDiscreteScheduler(prediction_type="sample"), {}, "prediction_type must be one of"),
        (
            DDPMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing"),
            {},
            "prediction_type must be 'v_prediction' or 'sample' where the terminal signal is zero",
        ),
        (
            FlowMatchEulerDiscreteScheduler(stochastic_sampling=True, invert_sigmas=True),
            {},
            "invert_sigmas must be False: with stochastic_sampling such a chain ends in noise",
        ),
        (
            FlowMatchEulerDiscreteScheduler(stochastic_sampling=True, use_dynamic_shifting=True),
            {},
            "`mu` must be passed when `use_dynamic_shifting` is set",
        ),
        (
            DPMSolverMultistepScheduler(use_flow_sigmas=True, **FIRST_ORDER),
            {},
            "must be 'flow_prediction' for a scheduler of velocities",
        ),
        (
            DPMSolverMultistepScheduler(use_karras_sigmas=True, **FIRST_ORDER),
            {"num_steps": 100},
            "timesteps must be distinct and at least 0, of DPMSolverMultistepScheduler (try fewer steps)",
        ),
    ],
)
def test_settings_without_a_transition_are_named(scheduler, keywords, said):
    assert said in message(schedule_from_diffusers, scheduler, **{"num_steps": 10, **keywords})


def test_other_objects_are_refused():
    for wrong in (None, 3, DDPMScheduler, "ddpm"):
        with pytest.raises(TypeError, match="^schedule_from_diffusers: scheduler must be a diffusers scheduler"):
            schedule_from_diffusers(wrong, 10)
    with pytest.raises(TypeError, match="num_steps must be an int where neither timesteps nor sigmas are given"):
        schedule_from_diffusers(DDPMScheduler())


def test_a_scheduler_is_left_as_it_was():
    scheduler = EulerAncestralDiscreteScheduler()
    scheduler.set_timesteps(7)
    before = scheduler.sigmas.clone()
    schedule_from_diffusers(scheduler, 20)
    assert torch.equal(scheduler.sigmas, before)


@pytest.mark.parametrize(
    ("scheduler", "eta"),
    [
        (DDPMScheduler(timestep_spacing="trailing"), None),
        (DDIMScheduler(timestep_spacing="trailing", clip_sample=False), 0.5),
        (EulerAncestralDiscreteScheduler(timestep_spacing="trailing"), None),
        (DPMSolverMultistepScheduler(timestep_spacing="trailing", **FIRST_ORDER), None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_timestep_at_minus_one_is_left_out(scheduler, eta):
    """A chain ends in data after the last real timestep; theirs reads the noisiest level or repeats the last one."""
    schedule = schedule_from_diffusers(scheduler, 61, eta=eta)
    scheduler.set_timesteps(61)
    assert scheduler.timesteps[-1] < 0
    assert schedule.timesteps.tolist() == [int(t) for t in scheduler.timesteps[:-1]]
    table = schedule.table()
    assert float(table[-1, 2].exp()) < 1e-9, "the last step adds no noise"
