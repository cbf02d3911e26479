"""Closed loop, distances between laws of actions, times, and an evaluation that goes on where it was interrupted."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_policies import small_target

import free_dit.policy.evaluate
import free_dit.policy.timing
from free_dit.policy.distances import energy_distance
from free_dit.policy.evaluate import Evaluation, EvaluationSettings, paired_difference
from free_dit.policy.methods import Method, decider, methods
from free_dit.policy.page import render
from free_dit.policy.rollout import EXECUTED, roll_out
from free_dit.policy.task import REACH
from free_dit.policy.timing import decision_times, ratio_interval
from free_dit.policy.world import MAX_STEPS, random_scenes
from free_kernels.results import SampleResult, SampleStats

TINY = EvaluationSettings(
    episodes=5, part=2, draft_length=3, relaxation=2.0, observations=3, draws=4, repeats=2, threads=(1,)
)


@pytest.fixture(scope="module")
def target():
    return small_target()


def straight_on(observations, noise):
    """A decider that aims at the goal, wherever the obstacles are."""
    ahead = torch.stack([observations[:, -1, 2] / REACH, torch.zeros(len(observations))], dim=1)
    rounds = np.full(len(observations), 7)
    return SampleResult(ahead.unsqueeze(1).expand(-1, 16, -1).clone(), SampleStats(rounds_per_image=rounds))


def test_an_episode_is_the_same_in_every_batch(target):
    scenes = random_scenes(6, 2)
    decide = decider(Method("ddim", 4), target, "frozen")
    whole = roll_out(scenes, decide, 5)
    part = roll_out(scenes.take(np.array([4, 1])), decide, 5, np.array([4, 1]))
    # Rounding of other batch sizes, through a dozen decisions.
    np.testing.assert_allclose(part.position, whole.position[[4, 1]], atol=1e-4)
    assert np.array_equal(part.decisions, whole.decisions[[4, 1]])
    # Negative control: other numbers, other noise.
    other = roll_out(scenes.take(np.array([4, 1])), decide, 5, np.array([0, 2]))
    assert np.abs(other.position - part.position).max() > 1e-2


def test_laws_are_compared_at_decisions_that_differ():
    def compared(observations, decisions):
        # An observation is its own episode and decision.
        numbers = np.arange(4.0)[:, None] * 100 + np.arange(7.0)
        episodes = SimpleNamespace(decisions=np.array(decisions), observations=numbers[: len(decisions)])
        settings = replace(TINY, observations=observations)
        return Evaluation.compared(SimpleNamespace(settings=settings), episodes).tolist()

    assert compared(4, [6, 6, 6, 6]) == [0, 101, 202, 300]
    assert compared(12, [6, 6, 6, 6]) == [0, 101, 202, 300, 1, 102, 200, 301, 2, 100, 201, 302]
    for decisions in ([6, 6, 6, 6], [1, 2, 3, 5], [2]):
        every = compared(sum(decisions), decisions)
        assert sorted(every) == [100 * place + turn for place, count in enumerate(decisions) for turn in range(count)]
    with pytest.raises(ValueError, match="observations must be at most 11, the decisions of 4 episodes, got 12"):
        compared(12, [1, 2, 3, 5])


def test_decisions_are_counted_and_kept():
    episodes = roll_out(random_scenes(8, 0), straight_on, 0)
    assert (episodes.hit & ~episodes.reached).all(), "the obstacle is in the way"
    assert np.array_equal(episodes.decisions, -(-episodes.steps // EXECUTED))
    assert np.array_equal(episodes.rounds, 7 * episodes.decisions)
    assert episodes.position.shape == (8, MAX_STEPS + 1, 2)
    for row, count in enumerate(episodes.decisions):
        assert (episodes.plans[row, count:] == 0).all()
        assert (episodes.observations[row, count:] == 0).all()
        # Actions are bounded: a far goal is out of a chunk's reach.
        here = episodes.position[row, : EXECUTED * count : EXECUTED]
        way = random_scenes(8, 0).goal[row] - here
        aim = here + way * np.minimum(1.0, REACH / np.linalg.norm(way, axis=1, keepdims=True))
        np.testing.assert_allclose(episodes.plans[row, :count], np.repeat(aim[:, None], 16, axis=1), atol=1e-6)


def draws(seed, shift=0.0, observations=8, count=60, width=3):
    return np.random.default_rng(seed).normal(shift, 1.0, (observations, count, width))


def test_energy_distance_in_closed_form():
    """Between normals a distance m apart: 2 E|N(m, 2)| - 2 E|N(0, 2)|."""
    m, several = 1.5, []
    for seed in range(30):
        found, _ = energy_distance(draws(seed, width=1), draws(100 + seed, m, width=1), permutations=1, resamples=2)
        several.append(found.value)
    folded = 2 / math.sqrt(math.pi) * math.exp(-m * m / 4) + m * math.erf(m / 2)
    expected = 2 * folded - 4 / math.sqrt(math.pi)
    error = np.std(several, ddof=1) / math.sqrt(len(several))
    assert abs(np.mean(several) - expected) < 4 * error
    assert error < 0.05 * expected


def test_equal_laws_are_not_told_apart_and_others_are():
    found = [energy_distance(draws(seed), draws(50 + seed), permutations=199, resamples=200) for seed in range(20)]
    # Under equal laws p-values are uniform: the smallest of 20 is below 0.002 with a chance of 4 %.
    assert min(p for _, p in found) > 0.002
    assert np.mean([estimate.low <= 0 <= estimate.high for estimate, _ in found]) >= 0.7
    assert energy_distance(draws(0), draws(1, 0.3), permutations=199)[1] == 1 / 200


def test_both_modes_are_needed():
    """A sampler that always goes between two right answers has their mean, and is found."""
    generator = np.random.default_rng(0)
    sign = generator.choice([-1.0, 1.0], (6, 40, 1))
    modes, between = (np.broadcast_to(s, (6, 40, 4)) + 0.1 * draws(3, 0, 6, 40, 4) for s in (sign, 0.0))
    again = generator.choice([-1.0, 1.0], (6, 40, 1)) + 0.1 * draws(4, 0, 6, 40, 4)
    assert energy_distance(modes, between, permutations=199)[1] == 1 / 200
    assert energy_distance(modes, again, permutations=199)[1] > 0.01


def test_laws_are_compared_observation_by_observation():
    """Sets that are equal when all observations are pooled, but not at each."""
    levels = np.linspace(-2, 2, 8)[:, None, None]
    assert energy_distance(draws(0) + levels, draws(1) - levels, permutations=199)[1] == 1 / 200
    with pytest.raises(ValueError, match="^energy_distance: first, second must be"):
        energy_distance(draws(0), draws(0)[:, :9])


def test_paired_differences():
    """Without a discordant pair the ends are +- z^2 / (n + z^2) (Tango 1998)."""
    same = np.arange(200) % 3 > 0
    found = paired_difference(same, same, 0.95)
    z2 = 1.959964**2
    assert found["value"] == 0
    assert found["high"] == pytest.approx(z2 / (200 + z2), rel=1e-3)
    assert found["low"] == pytest.approx(-found["high"], rel=1e-6)
    one, two = (np.random.default_rng(seed).random(300) < 0.9 for seed in (0, 1))
    forth, back = paired_difference(one, two, 0.95), paired_difference(two, one, 0.95)
    assert forth["low"] == pytest.approx(-back["high"], abs=1e-9)
    assert forth["low"] < forth["value"] < forth["high"]
    # As wide as the normal interval of 300 differences, to a fifth.
    width = 2 * 1.96 * np.std(one.astype(float) - two) / math.sqrt(300)
    assert forth["high"] - forth["low"] == pytest.approx(width, rel=0.2)
    worse = one & (np.arange(300) % 5 > 0)
    assert paired_difference(worse, one, 0.95)["high"] < 0


def test_ratio_intervals_cover_the_median():
    """95 % of them; three standard errors below that in 2000."""
    ratios = np.exp(np.random.default_rng(0).normal(0, 0.3, (2000, 40)))
    inside = [low <= 1.0 <= high for _, low, high in (ratio_interval(row, 0.95) for row in ratios)]
    assert 0.95 - 3 * math.sqrt(0.95 * 0.05 / 2000) < np.mean(inside) < 0.99
    assert ratio_interval(np.array([2.0, 1.0, 4.0]), 0.95) == (2.0, 1.0, 4.0)


def test_methods_take_turns(monkeypatch):
    """Every method is first equally often, and the threads are as before."""
    order, clock = [], iter(np.arange(100.0))

    def noted(which):
        def decide(observations, noise):
            keys = tuple(noise.image_keys.tolist())
            order.append((which, torch.get_num_threads(), keys, float(observations[0, 0, 0])))
            return straight_on(observations, noise)

        return decide

    monkeypatch.setattr(free_dit.policy.timing.time, "perf_counter", lambda: next(clock))
    observations = torch.arange(2.0).view(2, 1, 1).expand(2, 2, 6)
    before = torch.get_num_threads()
    times = decision_times([noted(which) for which in "abc"], observations, repeats=3, threads=2)
    assert (times == 1).all()
    assert torch.get_num_threads() == before
    warm, timed = order[:3], order[3:]
    assert "".join(which for which, *_ in warm) == "abc"
    assert "".join(which for which, *_ in timed) == "abcbcacab"
    assert {threads for _, threads, *_ in order} == {2}
    assert [given[2:] for given in timed] == [((r,), float(r % 2)) for r in range(3) for _ in range(3)]


def test_methods_of_a_comparison():
    assert [one.name for one in methods(6, 1.0)] == ["ordinary", "lossless", "relaxed", "ddim-10", "ddim-16"]
    with pytest.raises(ValueError, match="^Method: draft_length must be"):
        Method("lossless", draft_length=101)
    with pytest.raises(ValueError, match="^Method: kind must be one of"):
        Method("best")


def test_evaluation_goes_on_where_it_was_interrupted(tmp_path, target, monkeypatch):
    # What is drawn does not matter here.
    monkeypatch.setattr(free_dit.policy.evaluate, "decider", lambda *_: straight_on)

    def evaluation(folder, settings=TINY):
        return Evaluation(target, "frozen", settings, tmp_path / folder, {"model": "a", "drafter": "frozen"})

    whole = evaluation("whole").report()
    calls = []
    plain = free_dit.policy.evaluate.roll_out

    def counted(*arguments):
        calls.append(arguments)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return plain(*arguments)

    monkeypatch.setattr(free_dit.policy.evaluate, "roll_out", counted)
    with pytest.raises(KeyboardInterrupt):
        evaluation("parts").report()
    again = evaluation("parts").report()
    # Three parts of each of five methods; the interrupted one was run twice.
    assert len(calls) == 16
    for name in ("methods", "expert", "settings"):
        assert again[name] == whole[name]
    # A damaged part is made again, a whole one is not.
    path = tmp_path / "parts" / "parts" / "lossless-2.npz"
    path.write_bytes(path.read_bytes()[:100])
    assert evaluation("parts").report()["methods"] == whole["methods"]
    assert len(calls) == 17
    with pytest.raises(ValueError, match=r"^policy evaluate: .*must hold parts of the same settings, got draws 4"):
        evaluation("parts", EvaluationSettings(**{**vars(TINY), "draws": 5}))
    with pytest.raises(ValueError, match="^policy evaluate: observations must be"):
        evaluation("other", EvaluationSettings(observations=1))


def test_the_report_and_its_page(tmp_path, target):
    report = Evaluation(target, "frozen", TINY, tmp_path, {"model": "a", "drafter": "frozen"}).report()
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    rows = report["methods"]
    assert rows["ordinary"]["network_calls_per_decision"] == 100
    assert rows["ddim-16"]["network_calls_per_decision"] == 16
    assert rows["lossless"]["network_calls_per_decision"] < 90
    assert rows["ordinary"]["success_minus_ordinary"]["value"] == 0
    assert report["times"][0]["ordinary"]["faster"]["value"] == 1
    page = render(report)
    for name in ("ordinary, DDPM 100 steps", "lossless", "relaxed", "DDIM, 10 steps", "DDIM, 16 steps"):
        assert page.count(f"| {name} |") == 3
