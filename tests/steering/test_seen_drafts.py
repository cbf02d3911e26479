"""Drafts of steps that earlier rounds asked about: how far they reach, how often they are accepted, their worth."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from analytic import DETECTED, FALSE_ALARM, GaussianTarget, SwingingDrafter, law_p_value
from call_by_call import play_call_by_call
from simulated_rounds import STEPS, Runs, World, seconds_by_rows

from free_kernels import DDPMSchedule, sample
from free_kernels.sampling.refused_rows import RefusedRows
from free_kernels.sampling.speculative import Speculation
from free_kernels.steering.acceptance_model import AcceptanceModel
from free_kernels.steering.length_policy import LONGEST, DraftLengthPolicy
from free_kernels.steering.round_cost import RoundCost
from free_kernels.steering.seen_steps import SeenSteps


@pytest.fixture
def paying(monkeypatch):
    """Costs under which any draft pays, whatever the machine does, and of however many slots."""
    monkeypatch.setattr(RoundCost, "seconds", seconds_by_rows(lambda rows: 1e-9 + 1e-15 * rows))


def test_the_furthest_row_counts():
    asked = SeenSteps(3, 7)
    asked.played([8, 4, 0], [1, 4, 0], [11, 4, 0])
    assert asked.counts == [7, 0, 0]
    # A short round leaves what lies behind its rows; a new image has none.
    asked.played([2, 8, 0], [2, 2, 0], [13, 0, 0])
    assert asked.counts == [5, 0, 0]
    asked.forget()
    assert asked.counts == [0, 0, 0]
    block = SeenSteps(2, 1)
    block.played([8, 8], [3, 8], [13, 18])
    assert block.counts == [1, 0]
    none = SeenSteps(1, 0)
    none.played([8], [1], [11])
    assert none.counts == [0]


@pytest.mark.parametrize("slots", [None, 2])
@pytest.mark.parametrize("drafter", ["frozen", "swinging"])
@pytest.mark.parametrize(("verification", "reuse"), [("token", True), ("block", True), ("token", False)])
def test_what_the_policy_is_told_is_what_is_kept(verification, reuse, drafter, slots, monkeypatch):
    """Where all rows are finite; ordinary steps in between, images that move in and lengths that differ included."""
    choose, compared = DraftLengthPolicy.choose, []
    random = np.random.default_rng(0)

    def chosen(self, live, steps, seen):
        kept = [0] * len(live) if compared_to.refused is None else compared_to.refused.counts
        told = [count for count, holds in zip(seen, live, strict=True) if holds]
        assert told == [count for count, holds in zip(kept, live, strict=True) if holds]
        compared.append(max(told))
        lengths = choose(self, live, steps, seen)
        if random.random() < 0.2:
            return [int(holds) for holds in live]
        shorter = np.minimum(lengths, random.integers(1, 9, len(lengths)))
        return np.where(live, np.maximum(shorter, 1), 0).tolist()

    start = Speculation.__init__

    def begun(self, *arguments, **settings):
        nonlocal compared_to
        start(self, *arguments, **settings)
        compared_to = self.rounds

    compared_to = None
    monkeypatch.setattr(Speculation, "__init__", begun)
    monkeypatch.setattr(DraftLengthPolicy, "choose", chosen)
    monkeypatch.setattr(RoundCost, "seconds", seconds_by_rows(lambda rows: 1e-9 + 1e-12 * rows))
    monkeypatch.setattr(DraftLengthPolicy, "_settle", lambda *given: None)
    target = GaussianTarget()
    sample(
        target,
        torch.arange(7) % 3,
        schedule=DDPMSchedule(60),
        drafter="frozen" if drafter == "frozen" else SwingingDrafter(target, eps_bias=0.9),
        draft_length="auto",
        max_slots=slots,
        verification=verification,
        reuse_refused=reuse,
    )
    assert len(compared) > 20
    assert max(compared) == 0 if not reuse else (max(compared) == 1 if verification == "block" else max(compared) > 2)


def test_the_policy_is_told_nothing_of_what_discarded_rows_hold(paying, monkeypatch):
    """All rows are dropped as if they were not finite: it is told of the same steps."""
    begin, told, choose = RefusedRows.begin, [], DraftLengthPolicy.choose

    def dropped(self, steps):
        begin(self, steps)
        self.forget()

    def chosen(self, live, steps, seen):
        told.append(max(seen))
        return choose(self, live, steps, seen)

    play_call_by_call(monkeypatch)
    monkeypatch.setattr(RefusedRows, "begin", dropped)
    monkeypatch.setattr(DraftLengthPolicy, "choose", chosen)
    target = GaussianTarget()
    drafter = SwingingDrafter(target, eps_bias=0.9)
    sample(target, torch.arange(3), schedule=DDPMSchedule(60), drafter=drafter, draft_length="auto")
    assert max(told) > 0


def learned(*, told: bool, seen: float = 0.9, new: float = 0.3) -> tuple[float, float]:
    """What a model expects of a seen and of a new draft after twelve runs of windows of eight rows."""
    random, model = np.random.default_rng(0), AcceptanceModel(np.full((200, 15), 0.7))
    for _ in range(12):
        step, ahead = 1, 0
        while step < 180:
            accepted = random.random(7) < np.where(np.arange(7) < ahead, seen, new)
            committed = 1 + int(np.argmin(np.append(accepted, False)))
            model.update([(step, 8, committed, ahead if told else 0)])
            step, ahead = step + committed, 8 - committed
        model.begin()
    steps = np.arange(1, 180)
    if not told:
        return (float(model.survival(steps)[:, 0].mean()),) * 2
    return tuple(float(model.survival(steps, np.full(179, ahead))[:, 0].mean()) for ahead in (1, 0))


def test_each_kind_converges_to_its_own_acceptance():
    """Runs fade by 0.9, so some 1,600 seen and 100 new tests count: four deviations of a share of 0.3 are 0.18.

    Told nothing, the model finds the mean of the two kinds, which is neither.
    """
    seen, new = learned(told=True)
    assert seen == pytest.approx(0.9, abs=0.04)
    assert new == pytest.approx(0.3, abs=0.18)
    mixed, _ = learned(told=False)
    assert mixed > 0.6
    assert mixed < seen - 0.04


def test_one_kind_says_nothing_of_the_other():
    model = AcceptanceModel(np.full((STEPS, 15), 0.9))
    at, three = np.array([100]), np.array([3])
    before = model.survival(at, three)[0]
    assert before == pytest.approx(0.9 ** np.arange(1, 16))
    for _ in range(20):
        # All three seen drafts are accepted, the first new one never.
        model.update([(100, 8, 4, 3)])
    after = model.survival(at, three)[0]
    assert after[2] > before[2]
    assert after[3] < 0.3 * after[2]


def test_new_drafts_begin_behind_the_seen_stretch():
    """Their look-ahead is the calibration's, counted from there; behind the last step nothing is accepted."""
    calibration = np.tile(np.linspace(0.8, 0.2, 7), (50, 1))
    survival = AcceptanceModel(calibration).survival(np.array([10, 45]), np.array([2, 3]))
    ratios = survival[0] / np.append(1.0, survival[0, :-1])
    assert ratios == pytest.approx([0.85, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4])
    assert (survival[1, 4:] == 0).all()
    assert (survival[1, :4] > 0).all()


def share_tested_next(seen: float, new: float, offset: int, runs: int = 200_000) -> float:
    """Share of rounds after which a row at an offset is tested in the next one by simulation."""
    random = np.random.default_rng(1)
    first = random.random((runs, offset)) < new
    refused = np.where(first.all(1), offset, first.argmin(1))
    again = random.random((runs, offset)) < seen
    behind = np.arange(offset) > refused[:, None]
    return float(((refused < offset) & (again | ~behind).all(1)).mean())


@pytest.mark.parametrize("offset", [1, 2, 5])
def test_what_a_row_saves_later_is_counted_once(offset):
    """Against a simulation of two rounds: its share has a deviation below 0.0012, and 0.005 is four of them."""
    calibration = np.full((STEPS, 15), 0.4)
    survival, saved = AcceptanceModel(calibration).outlook(np.array([20]), np.array([0]), 15)
    assert survival[0] == pytest.approx(0.4 ** np.arange(1, 16))
    assert saved[0, offset - 1] == pytest.approx(share_tested_next(0.85, 0.4, offset) * (0.85 - 0.4), abs=0.005)
    # A step that was asked about already is not seen for the first time.
    assert (AcceptanceModel(calibration).outlook(np.array([20]), np.array([4]), 15)[1][0, :3] == 0).all()


class Measured:
    """Runs of a world by a policy that is told of seen steps and counts what they save, or not."""

    def __init__(self, world: World, *, told: bool) -> None:
        self.world, self.told, self.runs = world, told, Runs(world)

    def run(self) -> float:
        policy = DraftLengthPolicy(STEPS, LONGEST[-1], self.runs.knowledge, reuses=self.told)
        return self.world.run(lambda live, steps, asked: policy.choose(live, steps, asked), policy.observe)


@pytest.mark.parametrize("slots", [1, 8])
@pytest.mark.parametrize(("seen", "new", "row"), [(0.9, 0.3, 0.05), (0.83, 0.15, 0.02), (0.95, 0.6, 0.05)])
def test_longer_windows_where_seen_rows_are_good(seen, new, row, slots):
    """Near the best fixed length; a policy that counts only what a round commits stays short and is slower."""
    world = World(slots, new, row, 0.01, seen=seen)
    best = min(np.median([world.fixed(length) for _ in range(9)]) for length in LONGEST)
    seconds, rows = {}, {}
    for told in (True, False):
        measured = Measured(world, told=told)
        seconds[told] = np.median([measured.run() for _ in range(12)][5:])
        rows[told] = world.rows / world.rounds
    assert seconds[True] < 1.15 * best
    assert rows[True] > 1.5 * rows[False]
    assert seconds[False] > 1.1 * seconds[True]


@pytest.mark.parametrize("slots", [1, 8])
@pytest.mark.parametrize(("row", "draft"), [(0.1, 0.2), (1.0, 0.3)])
def test_useless_seen_rows_cost_at_most_three_percent(row, draft, slots):
    world = World(slots, 0.0, row, draft, seen=0.0)
    measured, ordinary = Measured(world, told=True), world.fixed(1)
    assert max(measured.run() for _ in range(3)) < 1.03 * ordinary


@pytest.mark.parametrize("looks", [None, False, True])
@pytest.mark.parametrize("variance", ["fixed_large", "learned_range"])
def test_law_of_automatic_lengths_with_refused_rows(variance, looks, paying, monkeypatch):
    """Lengths as they are chosen; with steps drawn directly at random; and where a discarded row's noise says so."""
    target = GaussianTarget(learns_variance=variance == "learned_range")
    schedule, drafter = DDPMSchedule(16, variance=variance), SwingingDrafter(target)
    choose, coin = Speculation._lengths, torch.Generator().manual_seed(3)
    axis = torch.from_numpy(drafter.direction).float()

    def chosen(self, now):
        lengths, refused, job = choose(self, now), self.rounds.refused, self.job
        if looks is None or refused.is_empty:
            return lengths
        at = torch.tensor(now.steps).clamp(max=schedule.num_steps - 1)
        # The noise of this step made the discarded row of the next one.
        row, after = (refused.places[:, place].clamp(min=0) for place in (0, 1))
        output = job.head(refused.features[0, row], job.timesteps[at], self.slots.labels)
        mean, _ = job.transition(refused.states[row], output, job.table[at])
        noise = (refused.states[after] - mean).flatten(1) @ axis
        direct = noise > 0 if looks else torch.rand(len(noise), generator=coin) < 0.5
        direct &= refused.ahead >= 2
        return [min(length, 1 if stop else 6) for length, stop in zip(lengths, direct.tolist(), strict=True)]

    monkeypatch.setattr(Speculation, "_lengths", chosen)
    # Long windows from the first on.
    monkeypatch.setattr(RoundCost, "has_begun", lambda self, longest, free=False: True)
    labels = torch.full((12_000,), 1)
    settings = {"drafter": drafter, "draft_length": "auto", "max_slots": 2000}
    result = sample(target, labels, schedule=schedule, seed=11, **settings)
    assert result.stats.call_reduction > 1.2
    assert result.stats.acceptance < 0.95, "drafts have to be refused"
    p_value = law_p_value(result.samples, *target.final_law(schedule, 1), drafter.direction)
    assert p_value < DETECTED if looks else p_value > FALSE_ALARM
