"""NaN and infinity at every step and image, in whatever a network returns: named rightly, or without consequence."""

from __future__ import annotations

import itertools
import math
import re

import pytest
import torch
from analytic import BiasedDrafter, GaussianTarget

from free_kernels import DDPMSchedule, DrafterConfig, FeatureDrafter, ancestral_sample, sample, sample_iter
from free_kernels import speculation as speculation_module

K, N = 7, 4
STEPS = DDPMSchedule(K)
# Every image has a label of its own, by which a faulty network knows it.
LABELS = torch.arange(N)
NAMED = re.compile(r"must be finite, got a non-finite value at step (\d+) of image (\d+)$")
VALUES = (math.nan, math.inf, -math.inf)


class Faulty(GaussianTarget):
    """Returns one spoilt element for one (step, image): in features or output, always or in the n-th such row only."""

    def __init__(self, learns_variance: bool) -> None:
        super().__init__(num_classes=N, learns_variance=learns_variance)
        self.heal()

    def heal(self) -> None:
        self.place, self.timestep, self.label, self.value, self.only, self.met = "", -1, -1, 0.0, None, 0

    def spoil(self, place: str, step: int, image: int, value: float, only: int | None = None) -> None:
        self.heal()
        self.place, self.timestep, self.label = place, int(STEPS.timesteps[step]), image
        self.value, self.only = value, only

    def _spoilt(self, place: str, result: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        rows = ((t == self.timestep) & (y == self.label)).nonzero().flatten().tolist()
        if place != self.place or not rows:
            return result
        self.met += 1
        if self.only is None or self.met == self.only:
            result = result.clone()
            result[rows, ..., 0] = self.value
        return result

    def features(self, x, t, y):
        return self._spoilt("features", super().features(x, t, y), t, y)

    def head(self, h, t, y):
        return self._spoilt("output", super().head(h, t, y), t, y)


def settings(target: Faulty, mode: str, guidance: float) -> dict:
    chosen = {
        "schedule": STEPS,
        "drafter": BiasedDrafter(GaussianTarget(num_classes=N, learns_variance=target.learns_variance), eps_bias=0.5),
        "draft_length": 4,
        "guidance_scale": guidance,
        "seed": 5,
    }
    if mode == "block":
        chosen["verification"] = "block"
    if mode == "auto":
        chosen["draft_length"] = "auto"
    return chosen


class Clock:
    """A clock that each look at it moves by a fixed time, so that automatic draft lengths repeat."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        self.now += 1e-3
        return self.now


@pytest.fixture
def steady_clock(monkeypatch):
    monkeypatch.setattr(speculation_module, "time", Clock())


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("mode", ["token", "block", "auto", "ordinary"])
def test_lasting_faults_are_named(mode, guidance, steady_clock, fault_log):
    """Every step and image, in features and in the output; an image that meets the fault never comes out."""
    target = Faulty(learns_variance=True)
    for step, image, place in itertools.product(range(K), range(N), ("features", "output")):
        target.spoil(place, step, image, VALUES[(step + image) % 3])
        with pytest.raises(FloatingPointError, match=NAMED.pattern) as caught:
            if mode == "ordinary":
                ancestral_sample(target, LABELS, schedule=STEPS, guidance_scale=guidance, seed=5)
            else:
                sample(target, LABELS, **settings(target, mode, guidance))
        assert tuple(map(int, NAMED.search(str(caught.value)).groups())) == (step, image)
        fault_log(f"NaN or infinity in the target's {place}, lasting, {mode}", "named with step and image")


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("mode", ["token", "block", "auto"])
def test_passing_faults_are_named_or_without_consequence(mode, guidance, steady_clock, fault_log):
    """One row of one call is spoilt. Where that row was discarded, all images are those of a sound run, bit for bit."""
    target = Faulty(learns_variance=True)
    want = sample(target, LABELS, **settings(target, mode, guidance))
    ended = dict.fromkeys(("named", "unchanged"), 0)
    for step, image, only in itertools.product(range(K), range(N), range(1, 7)):
        # Calls of the head alternate between drafting and verifying, those of features verify only.
        target.spoil("output" if only > 2 else "features", step, image, VALUES[(step + image + only) % 3], only)
        speculation_module.time.now = 0.0
        try:
            got = sample(target, LABELS, **settings(target, mode, guidance))
        except FloatingPointError as error:
            assert tuple(map(int, NAMED.search(str(error)).groups())) == (step, image)
            ended["named"] += 1
            continue
        if target.met < only:
            continue
        assert torch.equal(got.samples, want.samples), (step, image, only)
        assert got.stats.rounds_per_image.tolist() == want.stats.rounds_per_image.tolist()
        ended["unchanged"] += 1
    fault = f"NaN or infinity in one row of one call, {mode}"
    fault_log(fault, "named with step and image", ended["named"])
    fault_log(fault, "row was discarded: images unchanged, bit for bit", ended["unchanged"])
    assert ended["named"] > 0
    assert ended["unchanged"] > 0
