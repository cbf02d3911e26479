"""DDIM: steps against the paper and diffusers, its ends (deterministic, ancestral), exactness with eta above 0."""

from __future__ import annotations

import math

import mutations
import numpy as np
import pytest
import torch
from analytic import DETECTED, FALSE_ALARM, BiasedDrafter, GaussianTarget, PerfectDrafter, law_p_value
from call_by_call import play_call_by_call

import free_kernels.sampling.round
from free_dit import cli, load_bundled
from free_dit.generation import ChainSettings
from free_kernels import DDIMSchedule, DDPMSchedule, ancestral_sample, sample
from free_kernels.constants import TransitionColumn
from free_kernels.ops.coupling import gaussian_transition
from free_kernels.schedules.timesteps import spaced_timesteps

IMAGES, LABEL = 3000, 1
LABELS = torch.full((IMAGES,), LABEL)


def steps_of(schedule, eps_scale: float = 1.0):
    """Random states and predicted noises of every step, with the schedule's mean and deviation."""
    generator = torch.Generator().manual_seed(0)
    state, eps = torch.randn(2, schedule.num_steps, 1, 4, 4, generator=generator)
    eps = eps * eps_scale
    return state, eps, *gaussian_transition(state, eps, schedule.table(), clip=schedule.clip)


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_steps_are_those_of_the_paper(spacing, eta):
    """Equation 12, from the predicted clean sample."""
    schedule = DDIMSchedule(20, eta, timestep_spacing=spacing)
    state, eps, mean, std = steps_of(schedule)
    alphas = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    for k, t in enumerate(schedule.timesteps.tolist()):
        alpha = alphas[t]
        after = alphas[int(schedule.timesteps[k + 1])] if k < 19 else 1.0
        s = eta * math.sqrt((1 - after) / (1 - alpha)) * math.sqrt(1 - alpha / after)
        clean = (state[k].double() - math.sqrt(1 - alpha) * eps[k]) / math.sqrt(alpha)
        expected = math.sqrt(after) * clean + math.sqrt(max(1 - after - s**2, 0.0)) * eps[k]
        # The clean sample is many times the state at the noisiest steps, where float32 columns cancel.
        torch.testing.assert_close(mean[k].double(), expected, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(std[k].double(), torch.full_like(expected, s), rtol=1e-5, atol=1e-7)
    assert bool((std[-1] == 0).all())


def test_the_clipped_form_is_the_plain_one_where_nothing_is_clipped():
    schedule = DDIMSchedule(20, 0.7)
    state, eps, mean, _ = steps_of(schedule)
    clipped, _ = gaussian_transition(state, eps, schedule.table(), clip=1e6)
    torch.testing.assert_close(clipped, mean, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_steps_are_those_of_diffusers(spacing, eta, clip):
    """Its own loop steps from t to t - T // K, so that the two agree where timesteps are spaced so."""
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDIMScheduler(
        beta_start=1e-4, beta_end=0.02, clip_sample=clip, timestep_spacing=spacing, prediction_type="epsilon"
    )
    theirs.set_timesteps(50)
    schedule = DDIMSchedule(50, eta, timestep_spacing=spacing, clip_denoised=clip)
    assert theirs.timesteps.tolist() == schedule.timesteps.tolist()
    state, eps, mean, std = steps_of(schedule)
    noise = torch.randn(state.shape, generator=torch.Generator().manual_seed(1))
    for k, t in enumerate(theirs.timesteps):
        keywords = {"eta": eta, "variance_noise": noise[k], "use_clipped_model_output": clip}
        expected = theirs.step(eps[k], t, state[k], **keywords).prev_sample
        torch.testing.assert_close(mean[k] + std[k] * noise[k], expected, rtol=1e-4, atol=1e-4)


def test_eta_one_is_the_ancestral_sampler():
    """With all of the noise DDIM is DDPM with the posterior's variance."""
    for steps in (10, 250, 1000):
        ours, theirs = DDIMSchedule(steps, 1.0), DDPMSchedule(steps, variance="fixed_small")
        assert torch.equal(ours.timesteps, theirs.timesteps)
        # Float64's own cancellation at a thousand steps, read as float32.
        torch.testing.assert_close(ours.table().exp(), theirs.table("fixed_small").exp(), rtol=1e-4, atol=1e-4)


def test_deterministic_chains_approach_the_data():
    """Gaussian data, eta = 0: the map is linear and its spread approaches the data's as steps grow (no sampling)."""
    target = GaussianTarget()
    errors = []
    for steps in (10, 40, 160):
        schedule = DDIMSchedule(steps)
        slope = torch.ones(target.feature_shape[0], dtype=torch.float64)
        for row, t in zip(schedule.table().double(), schedule.timesteps, strict=True):
            a, b = row[TransitionColumn.MEAN_FROM_STATE], row[TransitionColumn.MEAN_FROM_OUTPUT]
            slope = (a + b * target.linear(t[None], torch.tensor([LABEL]))[0][0].double()) * slope
        errors.append(float((slope / target.stds[LABEL] - 1).abs().max()))
    assert errors[2] < errors[1] < errors[0]
    assert errors[2] < 0.03


@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_law_is_the_ordinary_samplers(eta, reuse):
    target = GaussianTarget()
    drafter, schedule = BiasedDrafter(target, eps_bias=0.4 if eta == 1.0 else 0.2), DDIMSchedule(8, eta)
    result = sample(target, LABELS, schedule=schedule, drafter=drafter, seed=11, reuse_refused=reuse)
    worst = 0.95 if reuse else 0.8
    assert 0.1 < result.stats.acceptance < worst, "the drafter has to be bad enough to exercise reflection"
    assert law_p_value(result.samples, *target.final_law(schedule, LABEL), drafter.direction) > FALSE_ALARM


@pytest.mark.parametrize(
    "mutation",
    [mutations.wrong_reflection_sign, mutations.fresh_sample_on_rejection, mutations.always_accept],
    ids=lambda value: value.__name__,
)
def test_wrong_couplings_are_found(mutation, monkeypatch):
    torch.manual_seed(0)
    target = GaussianTarget()
    drafter, schedule = BiasedDrafter(target, eps_bias=0.4), DDIMSchedule(8, 1.0)
    play_call_by_call(monkeypatch)
    monkeypatch.setattr(free_kernels.sampling.round, "couple", mutation)
    result = sample(target, LABELS, schedule=schedule, drafter=drafter, seed=11)
    assert law_p_value(result.samples, *target.final_law(schedule, LABEL), drafter.direction) < DETECTED


def test_a_perfect_drafter_returns_the_ordinary_images():
    target, schedule = GaussianTarget(learns_variance=True), DDIMSchedule(12, 0.8)
    expected = ancestral_sample(target, LABELS[:20], schedule=schedule, seed=3).samples
    result = sample(target, LABELS[:20], schedule=schedule, drafter=PerfectDrafter(target), seed=3)
    assert result.stats.acceptance == 1.0
    torch.testing.assert_close(result.samples, expected, rtol=1e-5, atol=1e-5)


def test_deterministic_steps_are_the_ordinary_samplers_only():
    target, schedule = GaussianTarget(), DDIMSchedule(10)
    expected = ancestral_sample(target, LABELS[:4], schedule=schedule, seed=1).samples
    got = sample(target, LABELS[:4], schedule=schedule, seed=1, draft_length=1).samples
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    for draft_length in (2, "auto"):
        with pytest.raises(ValueError, match=r"^sample: schedule must be one whose steps add noise \(draft_length=1"):
            sample(target, LABELS[:4], schedule=schedule, draft_length=draft_length)


def test_command_line(tmp_path):
    cli.sample(tmp_path / "x.npz", drafter="ddim", num=2, chain=ChainSettings(steps=5, seed=3))
    with np.load(tmp_path / "x.npz") as file:
        shown = file["arr_0"][..., 0]
    target, _ = load_bundled("digits")
    expected = ancestral_sample(target, torch.arange(2), schedule=DDIMSchedule(5), seed=3).samples
    assert np.abs(shown - ((expected.clamp(-1, 1) + 1) * 127.5).round()[:, 0].numpy()).max() <= 1


@pytest.mark.parametrize(
    ("spacing", "expected"),
    [("linspace", [0, 333, 666, 999]), ("leading", [0, 250, 500, 750]), ("trailing", [249, 499, 749, 999])],
)
def test_spacings(spacing, expected):
    assert spaced_timesteps(1000, 4, spacing) == expected
    assert DDIMSchedule(4, timestep_spacing=spacing).timesteps.tolist() == expected[::-1]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_steps": 1001}, ValueError, "num_steps must be an int in"),
        ({"eta": 1.5}, ValueError, "eta must be a finite number in"),
        ({"timestep_spacing": "even"}, ValueError, "timestep_spacing must be one of"),
        ({"clip_denoised": 1}, TypeError, "clip_denoised must be a bool"),
        ({"beta_end": 1.0}, ValueError, "beta_start, beta_end must be such that"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=f"^DDIMSchedule: {message}"):
        DDIMSchedule(**arguments)


def test_cosine_betas():
    """With eta = 1 over all timesteps a step is ancestral DDPM's, whose cosine schedule is tested elsewhere."""
    ancestral = DDPMSchedule(100, 100, "fixed_small", beta_schedule="squaredcos_cap_v2")
    schedule = DDIMSchedule(100, 1.0, 100, beta_schedule="squaredcos_cap_v2")
    assert np.array_equal(schedule.train_alphas_cumprod, ancestral.train_alphas_cumprod)
    state, eps, mean, std = steps_of(schedule)
    expected, deviation = gaussian_transition(state, eps, ancestral.table("fixed_small"))
    # The cumulative product is 2.4e-7 at the noisiest timestep, which the coefficients of its step divide by.
    torch.testing.assert_close(mean[1:], expected[1:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(std[:-1], deviation[:-1], rtol=1e-4, atol=1e-6)
    # Negative control: the linear schedule is another.
    linear = gaussian_transition(state, eps, DDIMSchedule(100, 1.0, 100).table())[0]
    assert (linear[1:] - expected[1:]).abs().max() > 0.1
    leading = DDIMSchedule(10, num_train_steps=100, timestep_spacing="leading", beta_schedule="squaredcos_cap_v2")
    assert leading.timesteps.tolist() == list(range(90, -1, -10))
    with pytest.raises(ValueError, match="^DDIMSchedule: beta_schedule must be one of 'linear', 'squaredcos_cap_v2'"):
        DDIMSchedule(beta_schedule="cosine")
