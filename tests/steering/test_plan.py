"""Which drafts a round makes: C++ against numpy, against trying all, and wrong arguments."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest

from free_kernels import extension
from free_kernels.steering import plan
from free_kernels.steering.acceptance_model import AcceptanceModel
from free_kernels.steering.plan import PlanArguments, plan_round, reference_plan

needs_extension = pytest.mark.skipif(not extension.has_extension(), reason="needs the compiled extension")


def given(
    slots: int, seed: int, *, num_steps: int = 40, longest: int = 12, grain: int = 1, reuses: bool = True
) -> PlanArguments:
    """Slots anywhere in a chain, after rounds that were seen in it."""
    random = np.random.default_rng(seed)
    model = AcceptanceModel(random.uniform(0.2, 0.99, (num_steps, longest - 1)))
    for _ in range(30):
        step = int(random.integers(num_steps - longest))
        model.update([(step, longest, int(random.integers(1, longest + 1)), int(random.integers(0, 5)))])
    steps = random.integers(0, num_steps - 1, slots)
    seconds = random.uniform(1.0, 1.1, (longest + 1, slots * longest // grain + 2)).cumsum(axis=1)
    return PlanArguments(
        steps.tolist(),
        np.minimum(random.integers(0, longest, slots), num_steps - steps).tolist(),
        np.minimum(num_steps - steps - 1, random.integers(1, 2 * longest, slots)).tolist(),
        model,
        float(random.uniform(0, 6)) if reuses else None,
        [length for length in (2, 3, 4, 6, 8, 12) if length <= longest],
        seconds,
        grain,
        slots,
    )


@needs_extension
@pytest.mark.parametrize("reuses", [True, False])
@pytest.mark.parametrize(("slots", "grain"), [(1, 1), (2, 1), (7, 1), (24, 3)])
def test_the_compiled_function_plans_as_numpy_does(slots, grain, reuses):
    for seed in range(40):
        a = given(slots, seed, grain=grain, reuses=reuses)
        for found, wanted in zip(plan_round(a), reference_plan(a), strict=True):
            assert found.drafts == wanted.drafts
            assert all(drafts <= room for drafts, room in zip(found.drafts, a.room, strict=True))
            # Sums of positive numbers in the same order; a compiler may fuse a product with a sum.
            assert found[:2] == pytest.approx(wanted[:2], rel=1e-12)


@needs_extension
@pytest.mark.parametrize("room", [None, 0])
@pytest.mark.parametrize("slots", [1, 5])
def test_slots_that_are_all_alike(slots, room):
    """As at the start of a run: rows of slots come in the slots' order where they are worth the same."""
    for seed in range(10):
        a = given(slots, seed)
        a = a._replace(steps=[3] * slots, seen=[0] * slots, room=[room if room is not None else 20] * slots)
        for found, wanted in zip(plan_round(a), reference_plan(a), strict=True):
            assert found.drafts == wanted.drafts
            assert found[:2] == pytest.approx(wanted[:2], rel=1e-12)
        if room == 0:
            assert plan_round(a)[0].promised == slots


@needs_extension
@pytest.mark.parametrize("part", ["steps", "seen", "room", "saved", "seconds", "images", "lengths", "acceptance"])
def test_another_argument_is_another_plan(part):
    """The control: none is ignored."""

    def changed(a: PlanArguments, seed: int) -> PlanArguments:
        other = given(7, seed + 1000)
        value = a.images - 3 if part == "images" else a.lengths[:2] if part == "lengths" else getattr(other, part)
        return a._replace(**{part: value})

    pairs = [(a, changed(a, seed)) for seed in range(10) for a in [given(7, seed)]]
    assert any(plan_round(one) != plan_round(other) for one, other in pairs)


@pytest.mark.parametrize("compiled", [pytest.param(True, marks=needs_extension), False])
def test_no_other_number_of_drafts_of_one_image_is_faster(compiled, monkeypatch):
    """Against all of them: a plan's speed is what the acceptance model expects, over the round's time."""
    if not compiled:
        monkeypatch.setattr(plan, "compiled_function", lambda name: None)
    for seed in range(20):
        a = given(1, seed)
        gains, saved = a.acceptance.outlook(np.array(a.steps), np.array(a.seen), a.lengths[-1] - 1)
        worth = np.cumsum((gains + a.saved * saved)[0, : a.room[0]])
        speeds = [
            (1 + worth[drafts - 1]) / a.seconds[longest, 1 + drafts]
            for longest, drafts in itertools.product(a.lengths, range(1, a.room[0] + 1))
            if drafts < longest
        ]
        assert plan_round(a)[0].speed == pytest.approx(max(speeds), rel=1e-12)


@pytest.mark.parametrize("compiled", [pytest.param(True, marks=needs_extension), False])
def test_an_image_without_room_drafts_nothing(compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(plan, "compiled_function", lambda name: None)
    a = given(3, 0)
    best, _ = plan_round(a._replace(room=[0, 4, 0], seen=[0, 0, 0], seconds=np.ones_like(a.seconds)))
    assert best.drafts[1] > 0
    assert best.promised <= 3 + 4


@needs_extension
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": []}, "steps, seen and room must be of the same slots, at least one, got [], ["),
        ({"seen": [0]}, "steps, seen and room must be of the same slots, at least one, got"),
        ({"lengths": []}, "lengths must be of at least 2 rows, got []"),
        ({"lengths": [1, 2]}, "lengths must be of at least 2 rows, got [1, 2]"),
        ({"lengths": [4, 2]}, "lengths must ascend, got [4, 2]"),
        ({"lengths": [2, 40]}, "lengths must be rows of seconds, got [2, 40], [13, 38]"),
        ({"seconds": np.ones(5)}, "seconds must be [longest + 1, grains + 1], got [5]"),
        ({"grain": 0}, "grain must be at least 1, got 0"),
        ({"images": 0}, "images must be at least 1, got 0"),
        ({"images": 100}, "seconds must be of as many rows as are planned, got"),
        ({"seconds": np.ones((13, 20))}, "seconds must be of as many rows as are planned, got [13, 20], "),
    ],
)
def test_wrong_arguments(change, message):
    with pytest.raises(ValueError, match="^" + re.escape(f"plan_round: {message}")):
        plan_round(given(3, 0)._replace(**change))
