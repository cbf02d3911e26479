"""Forecasts of speculation: the chain of rounds against simulation, and forecasts against real runs."""

from __future__ import annotations

import json
import math
import time

import numpy as np
import pytest
import torch
from analytic import BiasedDrafter, GaussianTarget, PerfectDrafter

from free_dit.networks.denoiser import DenoiserTarget, photograph_crops
from free_kernels import DDIMSchedule, DDPMSchedule, Feasibility, FlowSDESchedule, RowCosts, feasibility, sample
from free_kernels.constants import TransitionColumn
from free_kernels.sampling.feasibility_probes import reach_places
from free_kernels.sampling.job import make_job
from free_kernels.sampling.noise import Purpose
from free_kernels.sampling.options import Options
from free_kernels.sampling.target_call import TargetCall
from free_kernels.steering.round_chain import CLASSES, RoundChain, classify

COSTS = RowCosts({1: 1.0, 32: 1.0})
# What forecasts may be off by here, where drafts are not as poor as in the worst line of docs/feasibility.md. Steps per
# call of 16 images have a standard error of up to 3 %, and a forecast from 16 places of up to 4 % (half its interval):
# two standard errors of their difference.
TOLERANCE = 0.10


def simulated(acceptance: np.ndarray, length: int, first: int, reuse: bool, images: int) -> np.ndarray:
    """Rounds of images, played draft by draft: counts how often each step was asked about, and nothing else."""
    generator, num_steps, rounds = np.random.default_rng(0), len(acceptance), np.zeros(images)
    for image in range(images):
        step, asked, reach = 0, np.zeros(num_steps, int), 0
        while step < num_steps:
            rows = min(length, num_steps - step) if step >= first else 1
            seen = max(0, reach - step) if reuse else 0
            again = sum(asked[step : step + seen] > 1)
            kinds, places = classify(rows - 1, seen, again)
            asked[step : step + rows] += 1
            draws = generator.random(rows - 1)
            taken = draws < acceptance[np.arange(step, step + rows - 1), kinds, places]
            accepted = int(taken.cumprod().sum())
            # A round without a refusal leaves no row behind the last one.
            reach = step + rows if accepted < rows - 1 else 0
            step += accepted + 1
            rounds[image] += 1
    return rounds


@pytest.mark.parametrize(("length", "first", "reuse"), [(2, 1, True), (5, 1, True), (9, 0, True), (5, 1, False)])
def test_expected_rounds_are_those_of_a_simulation(length, first, reuse):
    acceptance = np.random.default_rng(1).uniform(0.2, 0.5, (23, len(CLASSES), 12))
    # Rows seen are worth more, so that it shows whether they are counted.
    acceptance += 0.15 * np.arange(len(CLASSES))[:, None] / 2
    rounds = simulated(acceptance, length, first, reuse, 1000)
    expected, _ = RoundChain(23, length, first, reuse).expected_rounds(acceptance)
    error = rounds.std() / len(rounds) ** 0.5
    # Four standard errors: a false alarm in 16,000.
    assert abs(rounds.mean() - expected) < 4 * error
    wrong, _ = RoundChain(23, length, first, not reuse).expected_rounds(acceptance)
    assert abs(rounds.mean() - wrong) > 4 * error


def test_equal_acceptance_in_closed_form():
    """Without refused rows and far from the end, a round commits ``(1 - p^L) / (1 - p)`` steps."""
    p, length, num_steps = 0.7, 4, 4000
    acceptance = np.full((num_steps, len(CLASSES), length), p)
    for reuse in (True, False):
        rounds, _ = RoundChain(num_steps, length, 0, reuse).expected_rounds(acceptance)
        # The two ends of the chain are less than a round each.
        assert abs(rounds - num_steps * (1 - p) / (1 - p**length)) < 2


def test_the_gradient_is_that_of_differences():
    acceptance = np.random.default_rng(2).uniform(0.2, 0.9, (9, len(CLASSES), 4))
    chain = RoundChain(9, 5)
    rounds, gradient = chain.expected_rounds(acceptance)
    for index in np.ndindex(acceptance.shape):
        moved = acceptance.copy()
        moved[index] += 1e-4
        # One probability stands at most once in a round's product but in several rounds: curvature is below K^2.
        assert abs((chain.expected_rounds(moved)[0] - rounds) / 1e-4 - gradient[index]) < 1e-4 * 81


def check(target, schedule, drafter, lengths, images=16, **settings) -> None:
    """Forecasts against ``sample``, and the control: that of the other draft length is far off."""
    found = feasibility(target, schedule, drafter=drafter, draft_lengths=lengths, row_costs=COSTS, **settings)
    name = "frozen" if drafter is None else "learned"
    labels = torch.arange(images) % target.num_classes
    forecasts = found.drafters[name].lengths
    for forecast, other in zip(forecasts, forecasts[::-1], strict=True):
        used = {"drafter": drafter or "frozen", "draft_length": forecast.draft_length, "seed": 1}
        real = sample(target, labels, schedule=schedule, **used).stats.call_reduction
        assert abs(forecast.steps_per_call / real - 1) < TOLERANCE, (forecast, real)
        if drafter is None:
            assert abs(other.steps_per_call / real - 1) > 2 * TOLERANCE, (other, real)
            without = sample(target, labels, schedule=schedule, reuse_refused=False, **used).stats.call_reduction
            # Drafts behind none that was asked about are forecast from rounds that have some before them.
            assert abs(forecast.steps_without_reuse / without - 1) < 2.5 * TOLERANCE, (forecast, without)


def test_forecast_of_photographs():
    check(DenoiserTarget(photograph_crops(16, count=100)), DDPMSchedule(250), None, (6, 12))


@pytest.mark.parametrize("learned", [False, True])
def test_forecast_of_a_gaussian(learned):
    target = GaussianTarget(latent_shape=(3, 8, 8), learns_variance=learned)
    check(target, DDPMSchedule(60), BiasedDrafter(target), (4, 8))


def test_a_perfect_drafter_commits_whole_rounds():
    target = GaussianTarget()
    found = feasibility(target, DDPMSchedule(40), drafter=PerfectDrafter(target), draft_lengths=(4,), row_costs=COSTS)
    # One round of one row, and 39 steps in rounds of four.
    assert found.drafters["learned"].lengths[0].steps_per_call == pytest.approx(40 / 11)


@pytest.mark.parametrize("schedule", [DDPMSchedule(40), DDPMSchedule(40, clip_denoised=True), FlowSDESchedule(40)])
def test_places_lie_on_the_ordinary_chain_with_calls_for_all_steps(schedule):
    target = GaussianTarget()
    target.alphas = torch.linspace(0.999, 0.01, 100_000)
    job = make_job("test", target, torch.tensor([0, 1]), Options(schedule=schedule, draft_length=1))
    rows = []
    places = reach_places(job, TargetCall(job), 2, 5, 40, rows.append)
    assert sum(rows) == 2 * places.calls
    state, keys = job.initial_states(torch.arange(2)), torch.arange(2)
    for k in range(int(places.steps[-1]) + 1):
        if k in places.steps:
            at = places.steps.tolist().index(k)
            torch.testing.assert_close(places.states[:, at], state)
        noise = job.draw(Purpose.STEP, keys.unsqueeze(1), torch.full((2, 1), k)).squeeze(1)
        t = job.timesteps[k : k + 1].expand(2)
        state = job.ordinary_step(job.verify, state, t, job.labels, job.table[k : k + 1], noise).state


def test_the_coarse_chain_comes_near_the_fine_one_as_calls_are_added():
    """Its states are too alike by what a coarser sampler's are, of first order in the number of calls."""
    target, schedule = GaussianTarget(latent_shape=(3, 16, 16)), DDPMSchedule(250)
    job = make_job("test", target, torch.zeros(16, dtype=torch.int64), Options(schedule=schedule, draft_length=1))
    spread = [
        reach_places(job, TargetCall(job), 16, 4, calls, lambda rows: None).states.std(0).flatten(1).mean(1)
        for calls in (24, 96, 250)
    ]
    # The same noise everywhere, so that the sampling error of the spreads (0.7 %) is shared.
    few, many = (float((one / spread[2] - 1).abs().max()) for one in spread[:2])
    assert many < few / 2
    assert few < 0.1


def test_costs_decide():
    target, schedule = GaussianTarget(), DDPMSchedule(40)
    settings = {"draft_lengths": (2, 6), "images": 1, "positions": 3}
    free = feasibility(target, schedule, row_costs=RowCosts({1: 1.0, 6: 1.0}), **settings)
    dear = feasibility(target, schedule, row_costs=RowCosts({1: 1.0, 6: 6.0}, {"frozen": 1.0}), **settings)
    assert free.pays
    assert free.verdict.startswith("yes: frozen drafts")
    assert not dear.pays
    assert dear.verdict.startswith("no: ")
    best = free.best[1]
    assert best.speed_up == pytest.approx(best.steps_per_call)
    assert RowCosts({1: 2.0, 3: 4.0}, {"a": 0.5}, {"a": 1.0}, 1.0).speed_up("a", 5, 4.0) == pytest.approx(12 / (6 + 3))


def test_measured_costs_and_guidance():
    target = GaussianTarget()
    settings = {"draft_lengths": (2, 4), "images": 2, "positions": 3, "timing_repeats": 2, "guidance_scale": 2.0}
    found = feasibility(target, DDPMSchedule(20), torch.tensor([1]), drafter=BiasedDrafter(target), **settings)
    assert isinstance(found, Feasibility)
    assert list(found.drafters) == ["frozen", "learned"]
    assert set(found.costs.target) == {1, 2, 4}
    assert all(0 < one.speed_interval[0] <= one.speed_interval[1] for one in found.drafters["frozen"].lengths)
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["pays"] is found.pays


def test_the_same_seed_finds_the_same():
    target, settings = GaussianTarget(), {"draft_lengths": (3,), "positions": 2, "row_costs": COSTS}
    found = [feasibility(target, DDPMSchedule(20), seed=seed, **settings).to_dict() for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"schedule": DDPMSchedule(3)}, ValueError, r"schedule.num_steps must be an int in \[4, inf\), got 3"),
        ({"schedule": DDIMSchedule(20)}, ValueError, "schedule must be one whose steps add noise, got steps without"),
        ({"draft_lengths": (1,)}, ValueError, r"draft_lengths must be an int in \[2, inf\), got 1"),
        ({"draft_lengths": (40,)}, ValueError, r"draft_lengths must be ints in \[2, 19\], one at least, got \(40,\)"),
        ({"draft_lengths": 6}, TypeError, "draft_lengths must be ints of at least 2, got 6"),
        ({"images": 0}, ValueError, r"images must be an int in \[1, inf\), got 0"),
        ({"timing_repeats": 1}, ValueError, r"timing_repeats must be an int in \[2, inf\), got 1"),
        ({"positions": True}, TypeError, r"positions must be an int in \[1, inf\), got True"),
        ({"row_costs": {1: 1.0}}, TypeError, "row_costs must be RowCosts or None, got {1: 1.0}"),
        ({"row_costs": RowCosts({2: 1.0})}, ValueError, "row_costs.target must be times by rows with that of 1 row"),
        ({"row_costs": RowCosts({1: math.nan})}, ValueError, r"row_costs.target\[1\] must be a finite number"),
        ({"class_labels": torch.tensor([7])}, ValueError, r"class_labels must be int64 \[N\] in \[0, 3\)"),
        ({"drafter": "none"}, ValueError, "drafter must be"),
    ],
)
def test_mistakes_are_named(settings, error, message):
    with pytest.raises(error, match="^feasibility: " + message):
        feasibility(GaussianTarget(), **{"schedule": DDPMSchedule(20), **settings})


def test_columns_that_the_coarse_chain_needs_are_finite():
    for schedule in (DDPMSchedule(50), DDPMSchedule(50, prediction_type="v_prediction"), FlowSDESchedule(50)):
        table = schedule.table(schedule.resolve_variance(False))
        assert bool(table[:-1, TransitionColumn.MEAN_FROM_X0].abs().gt(0).all())


def test_a_drafter_costs_nothing_in_its_frozen_share():
    class Slow(PerfectDrafter):
        def __call__(self, *given):
            time.sleep(0.01)
            return super().__call__(*given)

    target, costs = GaussianTarget(), []
    for share in (0.0, 0.5, 1.0):
        drafter = Slow(target)
        drafter.frozen_share = share
        settings = {"draft_lengths": (3, 6), "positions": 4, "timing_repeats": 3}
        costs.append(feasibility(target, DDPMSchedule(40), drafter=drafter, **settings).costs.draft["learned"])
    # A call sleeps for a hundredth of a second at least.
    assert costs[0] >= 0.01
    assert 0.004 < costs[1] < costs[0]
    assert costs[2] < 0.004
