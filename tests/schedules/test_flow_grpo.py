"""The SDE that reinforcement learning of flow models samples with, and its window, against plain float64 loops."""

from __future__ import annotations

import math

import mutations
import numpy as np
import pytest
import torch
from analytic import DETECTED, FALSE_ALARM, BiasedDrafter, law_p_value
from call_by_call import play_call_by_call
from test_flow import LABEL, LABELS, GaussianFlow

import free_kernels.sampling.round
from free_kernels import FlowSDESchedule, ancestral_sample, sample
from free_kernels.constants import TransitionColumn
from free_kernels.sampling.job import Job
from free_kernels.schedules.flow import shifted

ETA = 0.7
# Noise levels as a pipeline with shift 3 makes them, from pure noise, to ticks of 1e-5.
SIGMAS = [round(float(1 - t), 5) for t in shifted(torch.linspace(0, 0.95, 12, dtype=torch.float64), 3.0)]


def grpo(sigma: float, after: float, eta: float, x, v, first_after: float):
    """Mean and deviation of a step from noise level ``sigma`` to ``after``; v is noise minus data (Flow-GRPO)."""
    std = math.sqrt(sigma / (1 - (first_after if sigma == 1 else sigma))) * eta
    dt = after - sigma
    mean = x * (1 + std**2 / (2 * sigma) * dt) + v * (1 + std**2 * (1 - sigma) / (2 * sigma)) * dt
    return mean, std * math.sqrt(-dt)


def dance(sigma: float, after: float, eta: float, x, v, _):
    """The same of DanceGRPO: the score by way of the predicted data, a deviation that does not depend on sigma."""
    dt, clean = after - sigma, x - sigma * v
    score = -(x - clean * (1 - sigma)) / sigma**2
    return x + dt * v - 0.5 * eta**2 * score * dt, eta * math.sqrt(-dt)


def settings_of(step, eta: float) -> dict[str, object]:
    if step is grpo:
        return {"diffusion": "grpo", "diffusion_norm": eta}
    return {"diffusion": "constant", "diffusion_norm": eta**2 / 2}


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("step", [grpo, dance])
def test_steps_are_the_published_ones(step, eta):
    schedule = FlowSDESchedule(times=[1 - sigma for sigma in SIGMAS], **settings_of(step, eta))
    table = schedule.table().double()
    ends = [*SIGMAS[1:], 0.0]
    for k, (sigma, after) in enumerate(zip(SIGMAS, ends, strict=True)):
        # This library's velocity runs towards the data.
        from_state, std = step(sigma, after, eta, 1.0, 0.0, SIGMAS[1])
        from_output, _ = step(sigma, after, eta, 0.0, -1.0, SIGMAS[1])
        found = table[k]
        # Coefficients are rounded to float32 once, after sums of at most four terms of order one.
        assert float(found[TransitionColumn.MEAN_FROM_STATE]) == pytest.approx(from_state, abs=1e-6)
        assert float(found[TransitionColumn.MEAN_FROM_OUTPUT]) == pytest.approx(from_output, abs=1e-6)
        wanted = math.log(std) if k < len(SIGMAS) - 1 else -math.inf
        assert float(found[TransitionColumn.LOG_STD]) == pytest.approx(wanted, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("window", [None, (0, 5), (3, 7), (11, 12), (0, 0)])
@pytest.mark.parametrize("step", [grpo, dance])
def test_chains_are_a_plain_loop(step, window):
    """Whole chains on given noise, in float64: the SDE's steps in the window, Euler's outside."""
    schedule = FlowSDESchedule(times=[1 - sigma for sigma in SIGMAS], window=window, **settings_of(step, ETA))
    target, count = GaussianFlow(), len(SIGMAS)
    noise = torch.randn(5, count, *target.latent_shape, generator=torch.Generator().manual_seed(2))
    labels = torch.full((5,), LABEL)
    found = ancestral_sample(target, labels, schedule=schedule, noise=noise).samples
    first, end = window or (0, count)
    x, variance, mean = noise[:, 0].double().flatten(1), target.stds[LABEL].double() ** 2, target.means[LABEL].double()
    for k, (sigma, after) in enumerate(zip(SIGMAS, [*SIGMAS[1:], 0.0], strict=True)):
        gain = (1 - sigma) * variance / ((1 - sigma) ** 2 * variance + sigma**2)
        data = mean + gain * (x - (1 - sigma) * mean)
        v = (x - data) / sigma
        if first <= k < end:
            middle, std = step(sigma, after, ETA, x, v, SIGMAS[1])
            x = middle + (std * noise[:, k + 1].double().flatten(1) if k < count - 1 else 0.0)
        else:
            x = x + (after - sigma) * v
    # Twelve steps in float32 of a chain that contracts towards the data: a few ulps of states of size 4.
    torch.testing.assert_close(found.double().flatten(1), x, rtol=0, atol=12 * 4 * 2.0**-22)


def test_windows_leave_other_steps_without_noise():
    schedule, whole = FlowSDESchedule(10, diffusion="grpo", window=(2, 5)), FlowSDESchedule(10, diffusion="grpo")
    silent = schedule.table()[:, TransitionColumn.LOG_STD].isneginf()
    assert silent.tolist() == [True, True, False, False, False, True, True, True, True, True]
    assert torch.equal(schedule.table()[2:5], whole.table()[2:5])
    euler = schedule.table()[[0, 1, 5, 6, 7, 8, 9]]
    assert torch.equal(euler[:, TransitionColumn.MEAN_FROM_STATE], torch.ones(7))
    dt = torch.cat([schedule.times[1:], torch.ones(1, dtype=torch.float64)]) - schedule.times
    assert torch.equal(euler[:, TransitionColumn.MEAN_FROM_OUTPUT], dt[[0, 1, 5, 6, 7, 8, 9]].float())
    # Both ways to the mean, from the velocity and from the clean sample.
    x = torch.tensor(0.7)
    for row in euler.double():
        clean = row[TransitionColumn.X0_FROM_STATE] * x + row[TransitionColumn.X0_FROM_OUTPUT] * 0.3
        mean = row[TransitionColumn.MEAN_FROM_STATE_GIVEN_X0] * x + row[TransitionColumn.MEAN_FROM_X0] * clean
        plain = row[TransitionColumn.MEAN_FROM_STATE] * x + row[TransitionColumn.MEAN_FROM_OUTPUT] * 0.3
        assert float(mean) == pytest.approx(float(plain), abs=1e-5)


@pytest.mark.parametrize(
    ("window", "error", "message"),
    [
        (3, TypeError, r"window must be None or \(first, end\) with 0 <= first <= end <= 8, got 3"),
        ((1, 2, 3), TypeError, "window must be None or"),
        ((5, 3), ValueError, r"window must be None or .* got \(5, 3\)"),
        ((0, 9), ValueError, r"window must be an int in \[0, 8\], got 9"),
        ((0.0, 4), TypeError, r"window must be an int in \[0, 8\], got 0.0"),
    ],
)
def test_wrong_windows_are_named(window, error, message):
    with pytest.raises(error, match=f"^FlowSDESchedule: {message}"):
        FlowSDESchedule(8, window=window)


def test_copies_keep_their_window():
    schedule = FlowSDESchedule(8, window=[1, 4])
    assert schedule.window == (1, 4)
    assert hash(schedule) == hash(FlowSDESchedule(8, window=(1, 4)))


class TestLaw:
    """The law of whole runs in closed form, with a drafter that is wrong half of the time."""

    WINDOWS = ((0, 8), (2, 6), (3, 5), (4, 5), (0, 3))

    @pytest.mark.parametrize("window", WINDOWS)
    @pytest.mark.parametrize("options", [{}, {"reuse_refused": False}, {"verification": "block"}], ids=str)
    def test_law_is_the_ordinary_samplers(self, window, options):
        target, schedule = GaussianFlow(), FlowSDESchedule(8, diffusion="grpo", diffusion_norm=ETA, window=window)
        drafter = BiasedDrafter(target, eps_bias=2.0)
        result = sample(target, LABELS, schedule=schedule, drafter=drafter, seed=11, **options)
        tested, silent = result.stats.tested_by_step, schedule.table()[:, TransitionColumn.LOG_STD].isneginf().numpy()
        assert not tested[silent].any()
        assert tested[1:][~silent[1:]].all(), "every step with noise is drafted now and then"
        assert 0.1 < result.stats.acceptance < 0.95
        law = target.final_law(schedule, LABEL)
        assert law_p_value(result.samples, *law, drafter.direction) > FALSE_ALARM

    @pytest.mark.parametrize("mutation", [mutations.wrong_reflection_sign, mutations.always_accept])
    def test_wrong_couplings_are_found(self, mutation, monkeypatch):
        target, schedule = GaussianFlow(), FlowSDESchedule(8, diffusion="grpo", diffusion_norm=ETA, window=(2, 6))
        drafter = BiasedDrafter(target, eps_bias=2.0)
        play_call_by_call(monkeypatch)
        monkeypatch.setattr(free_kernels.sampling.round, "couple", mutation)
        result = sample(target, LABELS, schedule=schedule, drafter=drafter, seed=11)
        assert law_p_value(result.samples, *target.final_law(schedule, LABEL), drafter.direction) < DETECTED

    def test_without_the_rule_steps_without_noise_are_drafted(self, monkeypatch):
        """What the rule is for: such drafts are tested, all of them in vain."""
        monkeypatch.setattr(Job, "room", property(lambda job: list(range(len(job.timesteps), 0, -1))))
        target, schedule = GaussianFlow(), FlowSDESchedule(8, diffusion="grpo", diffusion_norm=ETA, window=(2, 6))
        stats = sample(target, LABELS, schedule=schedule, drafter=BiasedDrafter(target, eps_bias=2.0), seed=11).stats
        assert stats.tested_by_step[[1, 6]].all()
        assert not stats.accepted_by_step[[1, 6]].any()

    def test_automatic_lengths(self):
        target, schedule = GaussianFlow(), FlowSDESchedule(40, diffusion="grpo", diffusion_norm=ETA, window=(5, 30))
        drafter = BiasedDrafter(target, eps_bias=0.5)
        result = sample(target, LABELS, schedule=schedule, drafter=drafter, draft_length="auto", seed=3)
        assert not result.stats.tested_by_step[np.r_[0:5, 30:40]].any()
        assert law_p_value(result.samples, *target.final_law(schedule, LABEL), drafter.direction) > FALSE_ALARM

    def test_a_round_ends_with_a_step_without_noise(self):
        """A perfect drafter: rounds of 1, 1 and then 2 + 4 + 1 ... rows, as the window says."""
        target, labels = GaussianFlow(), torch.full((4,), LABEL)
        schedule = FlowSDESchedule(12, diffusion="grpo", window=(3, 8))
        result = sample(target, labels, schedule=schedule, drafter=BiasedDrafter(target, 0.0, 0.0), draft_length=6)
        # Steps 0, 1 and 2 alone; 3 ... 8, the last of which has no noise; 9, 10 and 11 alone.
        assert result.stats.rounds_per_image.tolist() == [7] * 4
        assert result.stats.acceptance == 1.0

    def test_chains_without_noise_are_refused(self):
        target, labels = GaussianFlow(), LABELS[:2]
        schedule = FlowSDESchedule(8, window=(0, 0))
        with pytest.raises(ValueError, match=r"^sample: schedule must be one whose steps add noise \(draft_length=1"):
            sample(target, labels, schedule=schedule)
        one = sample(target, labels, schedule=schedule, draft_length=1).samples
        torch.testing.assert_close(one, ancestral_sample(target, labels, schedule=schedule).samples)
