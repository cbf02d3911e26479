"""The accelerated pipeline with every Gaussian scheduler against ``DiTPipeline`` as installed, on the same noise."""

from __future__ import annotations

import copy
import functools
import sys

import pytest
import torch
from analytic import PerfectDrafter
from originals import randomised

pytest.importorskip("diffusers")

import diffusers.pipelines.dit.pipeline_dit as pipeline_dit
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    TCDScheduler,
)

import free_kernels.integrations.diffusers as integration
from free_kernels import DiffusersDiTTarget, DiffusersFlowTarget, ancestral_sample, sample, schedule_from_diffusers
from free_kernels.constants import TransitionColumn
from free_kernels.integrations.diffusers import accelerate

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS, LABELS = 10, [3, 999, 0]
FIRST_ORDER = {"solver_order": 1, "algorithm_type": "sde-dpmsolver++"}
# Schedulers, and the eta of their steps.
SCHEDULERS = [
    (DDPMScheduler(variance_type="fixed_small_log", clip_sample=False), None),
    (DDIMScheduler(clip_sample=False, timestep_spacing="linspace"), 0.7),
    (DPMSolverMultistepScheduler(**FIRST_ORDER), None),
    (DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", **FIRST_ORDER), None),
    (TCDScheduler(), None),
    (TCDScheduler(), 0.8),
    (LCMScheduler(), None),
]
# Which DiTPipeline does not step as they are meant to: see `stepped`. At 7 steps timesteps are not whole numbers.
MISUSED = [
    (EulerAncestralDiscreteScheduler(timestep_spacing="leading"), None, STEPS),
    (EulerAncestralDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012), None, 7),
    (FlowMatchEulerDiscreteScheduler(stochastic_sampling=True, shift=3.0), None, STEPS),
]


def make_pipe(scheduler) -> DiTPipeline:
    """A pipeline of ImageNet's classes with a latent of 4 x 8 x 8 and a small network."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(4, 16, 4, 8, num_layers=2, sample_size=8, num_embeds_ada_norm=1000)
    randomised(transformer, scale=0.1)
    for parameter in transformer.proj_out_2.parameters():
        parameter.mul_(0.3)
    vae = AutoencoderKL(latent_channels=4, norm_num_groups=4, block_out_channels=(8,), sample_size=8).eval()
    pipe = DiTPipeline(transformer, vae, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tape(monkeypatch, scheduler, steps: int, eta: float | None) -> torch.Tensor:
    """Noise ``[N, K + 1, C, H, W]`` that pipeline and scheduler are given, the first at the scheduler's deviation."""
    held, drawn = torch.randn(len(LABELS), steps + 1, 4, 8, 8, generator=torch.Generator().manual_seed(3)), 0
    timed = copy.deepcopy(scheduler)
    timed.set_timesteps(steps)
    deviation = float(getattr(timed, "init_noise_sigma", 1.0))

    def first(**_):
        nonlocal drawn
        drawn = 0
        return held[:, 0] * deviation

    def following(shape, **_):
        nonlocal drawn
        drawn += 1
        return held[:, drawn].repeat(shape[0] // len(held), 1, 1, 1)

    monkeypatch.setattr(pipeline_dit, "randn_tensor", first)
    monkeypatch.setattr(sys.modules[type(scheduler).__module__], "randn_tensor", following)
    if eta is not None:
        scheduler.step = functools.partial(scheduler.step, eta=eta)
    return held


@torch.no_grad()
def stepped(pipe: DiTPipeline, steps: int, guidance: float) -> torch.Tensor:
    """Images of DiTPipeline's loop with the scheduler used as it documents: the first latents at its deviation, the
    network shown the scaled state and the step taken from the state itself (DiTPipeline steps from the scaled one)."""
    scheduler, labels = pipe.scheduler, torch.tensor(LABELS)
    state = pipeline_dit.randn_tensor()
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(state, t) if hasattr(scheduler, "scale_model_input") else state
        one, null = (
            pipe.transformer(scaled, timestep=t.expand(3), class_labels=y).sample[:, :4]
            for y in (labels, torch.full_like(labels, 1000))
        )
        output = null + guidance * (one - null) if guidance > 1 else one
        state = scheduler.step(output, t, state).prev_sample
    return accelerate(pipe)._decoded(state, "pt")


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize(
    ("scheduler", "eta", "steps"),
    [(*one, STEPS) for one in SCHEDULERS] + MISUSED,
    ids=lambda value: getattr(type(value), "__name__", None),
)
def test_every_way_of_sampling_gives_the_schedulers_images(monkeypatch, scheduler, eta, steps, guidance):
    """DiTPipeline's own loop, our ordinary steps, and a perfect drafter."""
    pipe = make_pipe(copy.deepcopy(scheduler))
    fast_pipe = make_pipe(copy.deepcopy(scheduler))
    held = tape(monkeypatch, pipe.scheduler, steps, eta)
    call = {"guidance_scale": guidance, "num_inference_steps": steps, "output_type": "pt"}
    is_misused = (scheduler, eta, steps) in MISUSED
    expected = stepped(pipe, steps, guidance) if is_misused else pipe(LABELS, **call).images
    assert expected.std() > 0.01
    schedule = schedule_from_diffusers(fast_pipe.scheduler, steps, eta=eta)
    last = schedule.table(schedule.variance)[-1, TransitionColumn.LOG_STD]
    noise = held[:, : steps + int(last > -torch.inf)]
    monkeypatch.setattr(integration, "_randomness", lambda *_: {"noise": noise})
    kind = DiffusersFlowTarget if schedule.family == "flow" else DiffusersDiTTarget
    target = kind(fast_pipe.transformer)
    if schedule.shown_timesteps is not None:
        target = target.showing(schedule.timesteps, schedule.shown_timesteps)
    for arguments in ({"draft_length": 1}, {"drafter": PerfectDrafter(target), "draft_length": 4}):
        fast = accelerate(fast_pipe, eta=eta, **arguments)
        images = fast(LABELS, **call).images
        torch.testing.assert_close(images, expected, rtol=1e-3, atol=1e-3)
    assert fast.stats.acceptance == 1
    assert fast.stats.call_reduction > 2


def test_dit_pipeline_itself_is_wrong_there(monkeypatch):
    """The comparison's negative control: the same noise through DiTPipeline as it is."""
    scheduler = EulerAncestralDiscreteScheduler(timestep_spacing="leading")
    held = tape(monkeypatch, scheduler, STEPS, None)
    call = {"num_inference_steps": STEPS, "output_type": "pt"}
    pipe = make_pipe(scheduler)
    at_its_deviation = pipe(LABELS, **call).images
    at_deviation, deviation = pipeline_dit.randn_tensor, float(scheduler.init_noise_sigma)
    assert deviation > 50
    monkeypatch.setattr(pipeline_dit, "randn_tensor", lambda **_: at_deviation() / deviation)
    unscaled = pipe(LABELS, **call).images
    monkeypatch.setattr(integration, "_randomness", lambda *_: {"noise": held[:, :STEPS]})
    images = accelerate(pipe, draft_length=1)(LABELS, **call).images
    for wrong in (at_its_deviation, unscaled):
        assert float((images - wrong).abs().max()) > 1e-2


def test_timesteps_that_are_not_whole_are_shown_as_they_are():
    """The network's answers at the scheduler's timesteps, not at the whole ones that stand for them."""
    transformer = make_pipe(DDPMScheduler()).transformer
    schedule = schedule_from_diffusers(EulerAncestralDiscreteScheduler(), 7)
    assert schedule.shown_timesteps.tolist()[1:3] == [832.5, 666.0]
    whole = DiffusersDiTTarget(transformer)
    target = whole.showing(schedule.timesteps, schedule.shown_timesteps)
    x, y = torch.randn(7, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(7)
    expected = transformer(x, timestep=schedule.shown_timesteps, class_labels=y).sample
    for network in (target, target.hoisted(schedule.timesteps, y)):
        output = network.head(network.features(x, schedule.timesteps, y), schedule.timesteps, y)
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    rounded = whole.head(whole.features(x, schedule.timesteps, y), schedule.timesteps, y)
    assert float((rounded - expected).abs().max()) > 1e-3


def test_a_target_of_whole_timesteps_is_told_which_grid_to_take():
    from analytic import GaussianTarget

    schedule = schedule_from_diffusers(EulerAncestralDiscreteScheduler(), 7)
    with pytest.raises(ValueError, match=r"^sample: schedule must be one with whole timesteps .*'leading'.*got 832\.5"):
        sample(GaussianTarget(), torch.arange(3), schedule=schedule)


def test_a_velocity_network_needs_a_flow_schedule_and_the_other_way_round():
    transformer = make_pipe(DDPMScheduler()).transformer
    flow = schedule_from_diffusers(FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), 5)
    noise = schedule_from_diffusers(DDPMScheduler(), 5)
    with pytest.raises(ValueError, match="schedule must be one for a diffusion model"):
        ancestral_sample(transformer, torch.tensor([1]), schedule=flow)
    with pytest.raises(ValueError, match="schedule must be one for a flow model"):
        ancestral_sample(DiffusersFlowTarget(transformer), torch.tensor([1]), schedule=noise)
    with torch.no_grad():
        x, y, ticks = torch.randn(2, 4, 8, 8), torch.tensor([1, 2]), torch.tensor([0, 75_000])
        expected = transformer(x, timestep=torch.tensor([1000.0, 250.0]), class_labels=y).sample[:, :4]
        target = DiffusersFlowTarget(transformer)
        torch.testing.assert_close(target.head(target.features(x, ticks, y), ticks, y), -expected, rtol=1e-4, atol=1e-5)


def test_ddim_needs_an_eta():
    pipe = make_pipe(DDIMScheduler(clip_sample=False))
    with pytest.raises(ValueError, match="with eta 0 there is no fresh noise in their steps"):
        accelerate(pipe)
    assert (
        accelerate(pipe, eta=1.0, draft_length=2)([3], num_inference_steps=4, output_type="pt").images.isfinite().all()
    )


def test_the_generator_is_all_there_is_to_the_noise():
    """DiTPipeline draws the first latents with it, and the noise of steps from the global state."""
    pipe = make_pipe(DDPMScheduler(clip_sample=False))
    call = {"num_inference_steps": 4, "output_type": "pt"}

    def images(pipeline, global_seed):
        torch.manual_seed(global_seed)
        return pipeline(LABELS, generator=torch.Generator().manual_seed(7), **call).images

    assert float((images(pipe, 1) - images(pipe, 2)).abs().max()) > 1e-2
    fast = accelerate(pipe, draft_length=2)
    torch.testing.assert_close(images(fast, 1), images(fast, 2), rtol=0, atol=0)
