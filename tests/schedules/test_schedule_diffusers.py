"""Transitions, step by step, against the installed diffusers' DDPMScheduler."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from analytic import GaussianTarget, PerfectDrafter

from free_kernels import DDPMSchedule, ancestral_sample, sample
from free_kernels.constants import TransitionColumn
from free_kernels.ops.coupling import gaussian_transition

pytest.importorskip("diffusers")

import diffusers.schedulers.scheduling_ddpm as scheduling_ddpm
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler

VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "learned_range")
PREDICTIONS = ("epsilon", "v_prediction", "sample")
# Spacing and offset; the last two end above timestep 0, so that their last step may add noise.
SPACINGS = (("linspace", 0), ("leading", 0), ("leading", 1), ("trailing", 0))
CLIPS = (None, 1.0, 0.4)
STEPS = 9


def double(scheduler: DDPMScheduler) -> DDPMScheduler:
    """The scheduler with its tables in float64: what is left is the formula."""
    scheduler.alphas_cumprod = (1 - scheduler.betas.double()).cumprod(0)
    scheduler.one = torch.tensor(1.0, dtype=torch.float64)
    return scheduler


def their_steps(monkeypatch, scheduler, num_steps, states, outputs, noise) -> torch.Tensor:
    """``scheduler.step`` at every step, each from its own state and with its own noise: ``[K, C, H, W]``."""
    scheduler.set_timesteps(num_steps)
    results = []
    for k, t in enumerate(scheduler.timesteps):
        monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, k=k, **__: noise[k : k + 1])
        results.append(scheduler.step(outputs[k : k + 1], t, states[k : k + 1]).prev_sample)
    return torch.cat(results)


def our_steps(schedule: DDPMSchedule, states, outputs, noise) -> torch.Tensor:
    table = schedule.table(schedule.resolve_variance(outputs.shape[1] == 2 * states.shape[1]))
    mean, std = gaussian_transition(states, outputs, table, clip=schedule.clip)
    return mean + std * noise


def random_inputs(num_steps: int, learned: bool):
    generator = torch.Generator().manual_seed(num_steps)
    states, prediction, v, noise = torch.randn(4, num_steps, 2, 3, 3, generator=generator)
    return states, torch.cat([prediction, v.tanh()], 1) if learned else prediction, noise


def every_setting(variance, prediction):
    for (spacing, offset), beta_schedule, clip in itertools.product(
        SPACINGS, ("linear", "scaled_linear", "squaredcos_cap_v2"), CLIPS
    ):
        yield {
            "variance_type": variance,
            "prediction_type": prediction,
            "timestep_spacing": spacing,
            "steps_offset": offset,
            "beta_schedule": beta_schedule,
            "clip_sample": clip is not None,
            "clip_sample_range": clip or 1.0,
        }


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("variance", VARIANCES)
def test_every_step_is_theirs(monkeypatch, variance, prediction):
    """The formulas: their tables in float64, ours in float32."""
    states, outputs, noise = random_inputs(STEPS, variance == "learned_range")
    for settings in every_setting(variance, prediction):
        scheduler = double(DDPMScheduler(**settings))
        schedule = DDPMSchedule.from_diffusers(scheduler, STEPS)
        expected = their_steps(monkeypatch, scheduler, STEPS, states.double(), outputs.double(), noise.double())
        assert schedule.timesteps.tolist() == scheduler.timesteps.tolist()
        ours = our_steps(schedule, states, outputs, noise).double()
        # Relative to a step's own scale: without clipping, a clean sample can be thousands at the noisiest step.
        scale = 1 + expected.abs().amax((1, 2, 3), keepdim=True)
        # Their float32 betas of up to 0.999 leave the cosine schedule's alphas with five digits.
        tolerance = 2e-5 if settings["beta_schedule"] == "squaredcos_cap_v2" else 2e-6
        assert float(((ours - expected).abs() / scale).max()) < tolerance, settings


def test_every_step_is_stock_diffusers_to_float32_rounding(monkeypatch):
    """As installed, with 250 and 1000 steps: their cumulative products are float32."""
    for steps, learned in ((250, False), (250, True), (1000, True)):
        variance = "learned_range" if learned else "fixed_small"
        scheduler = DDPMScheduler(variance_type=variance, timestep_spacing="linspace", clip_sample=False)
        states, outputs, noise = random_inputs(steps, learned)
        expected = their_steps(monkeypatch, scheduler, steps, states, outputs, noise)
        torch.testing.assert_close(
            our_steps(DDPMSchedule.from_diffusers(scheduler, steps), states, outputs, noise),
            expected,
            rtol=2e-4,
            atol=2e-4,
        )


@pytest.mark.parametrize(
    "change",
    [
        {"prediction_type": "v_prediction"},
        {"timestep_spacing": "trailing"},
        {"variance": "fixed_large"},
        {"clip_denoised": True},
        {"beta_schedule": "scaled_linear"},
    ],
)
def test_a_wrong_setting_is_seen(monkeypatch, change):
    """The comparison's negative control: any one setting that differs gives steps that differ."""
    scheduler = double(DDPMScheduler(timestep_spacing="linspace", clip_sample=False))
    states, outputs, noise = random_inputs(STEPS, False)
    expected = their_steps(monkeypatch, scheduler, STEPS, states.double(), outputs.double(), noise.double())
    ours = our_steps(
        DDPMSchedule(STEPS, timestep_spacing=change.pop("timestep_spacing", "linspace"), **change),
        states,
        outputs,
        noise,
    )
    assert float((ours - expected).abs().max()) > 1e-2


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
def test_timesteps_are_theirs_for_any_number_of_steps(spacing):
    for train in (1000, 250):
        scheduler = DDPMScheduler(num_train_timesteps=train, timestep_spacing=spacing)
        for steps in (1, 2, 3, 7, 20, 21, 50, 100, 123, 125, 167, 211, 249, 250):
            scheduler.set_timesteps(steps)
            theirs = scheduler.timesteps.tolist()
            if theirs[-1] < 0:
                # Their trailing grid can run one point too far by rounding; that point is no timestep.
                theirs = theirs[:-1]
            assert DDPMSchedule.from_diffusers(scheduler, steps).timesteps.tolist() == theirs, (train, steps)


def test_improved_ddpm_and_linspace_differ_at_ties_only():
    """Both round an even grid; they part where a point lies halfway, which happens for odd numbers of steps."""
    for steps in (10, 20, 50, 100, 250, 500, 1000):
        ours, theirs = DDPMSchedule(steps), DDPMSchedule(steps, timestep_spacing="linspace")
        assert ours.timesteps.tolist() == theirs.timesteps.tolist()
    gap = DDPMSchedule(21).timesteps - DDPMSchedule(21, timestep_spacing="linspace").timesteps
    assert gap.abs().sum() == 1
    assert np.linspace(0, 999, 21)[10] == 499.5


def test_betas_are_theirs_at_other_lengths():
    for beta_schedule, train in itertools.product(("linear", "scaled_linear", "squaredcos_cap_v2"), (50, 1000, 4000)):
        scheduler = DDPMScheduler(train, beta_schedule=beta_schedule)
        ours = torch.from_numpy(DDPMSchedule.from_diffusers(scheduler, 10).train_betas)
        torch.testing.assert_close(ours.float(), scheduler.betas, rtol=2e-6, atol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"thresholding": True}, "thresholding must be False"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr must be False"),
        ({"trained_betas": [0.1] * 10}, "trained_betas must be None"),
        ({"variance_type": "fixed_large_log"}, "variance_type must be one of"),
        ({"variance_type": "learned"}, "variance_type must be one of"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule must be one of"),
    ],
)
def test_unsupported_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=rf"^DDPMSchedule\.from_diffusers: {message}"):
        DDPMSchedule.from_diffusers(DDPMScheduler(**settings), 10)


@pytest.mark.parametrize("kind", [DPMSolverMultistepScheduler])
def test_schedulers_without_noise_are_refused_with_the_reason(kind):
    with pytest.raises(
        ValueError, match=r"no fresh noise in their steps to speculate on; use DDPMScheduler\.from_config"
    ):
        DDPMSchedule.from_diffusers(kind(), 10)


@pytest.mark.parametrize("wrong", [None, 3, DDPMScheduler, "ddpm"])
def test_other_objects_are_refused(wrong):
    with pytest.raises(TypeError, match=r"^DDPMSchedule\.from_diffusers: scheduler must be a diffusers DDPMScheduler"):
        DDPMSchedule.from_diffusers(wrong, 10)


def test_more_offset_than_timesteps_is_refused():
    with pytest.raises(ValueError, match="steps_offset must be such that every timestep is below 1000"):
        DDPMSchedule.from_diffusers(DDPMScheduler(steps_offset=1), 1000)


@pytest.mark.parametrize("learned", [False, True])
def test_a_last_step_with_noise_is_sampled_alike(learned):
    """Trailing timesteps end above 0: a noise tensor then has an entry for the last step, and all samplers use it."""
    target, labels = GaussianTarget(learns_variance=learned), torch.arange(3)
    schedule = DDPMSchedule(8, timestep_spacing="trailing", variance="learned_range" if learned else "fixed_large")
    assert float(schedule.table(schedule.variance)[-1, TransitionColumn.LOG_STD]) > -torch.inf
    noise = torch.randn(3, 9, *target.latent_shape, generator=torch.Generator().manual_seed(0))
    expected = ancestral_sample(target, labels, schedule=schedule, noise=noise).samples
    for settings in ({"drafter": "frozen", "draft_length": 1}, {"drafter": PerfectDrafter(target), "draft_length": 4}):
        images = sample(target, labels, schedule=schedule, noise=noise, **settings).samples
        torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-5)
    changed = noise.clone()
    changed[:, -1] += 1
    other = ancestral_sample(target, labels, schedule=schedule, noise=changed).samples
    assert float((other - expected).abs().max()) > 1e-2
    with pytest.raises(ValueError, match=r"noise must be float32 \[3, 1, 4, 4\] or \[3, 9, 1, 4, 4\]"):
        ancestral_sample(target, labels, schedule=schedule, noise=noise[:, :8])
