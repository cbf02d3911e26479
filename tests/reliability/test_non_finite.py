"""NaN and infinity at every step and image, in whatever a network returns: named rightly, or without consequence."""

from __future__ import annotations

import itertools
import math
import re

import pytest
import torch
from analytic import BiasedDrafter, GaussianTarget
from call_by_call import play_call_by_call

from free_kernels import (
    DDPMSchedule,
    DrafterConfig,
    FeatureDrafter,
    SampleResult,
    ancestral_sample,
    sample,
    sample_iter,
)
from free_kernels.sampling import round as round_module
from free_kernels.sampling import speculative as speculation_module

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
    if mode == "window":
        chosen["drafter"] = windowed_drafter(target)
    return chosen


def windowed_drafter(target: GaussianTarget) -> FeatureDrafter:
    """Random weights, and a memory that a spoilt draft gets into."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = DrafterConfig(width=16, head_dim=8, window=3)
        drafter = FeatureDrafter(target.latent_shape, target.feature_shape, target.num_classes, config)
        for name, weight in drafter.named_parameters():
            if name.startswith(("to_feature", "modulation")):
                torch.nn.init.normal_(weight, std=0.02)
    return drafter.eval().requires_grad_(False)


def draw(target: Faulty, mode: str, guidance: float) -> SampleResult:
    if mode == "ordinary":
        return ancestral_sample(target, LABELS, schedule=STEPS, guidance_scale=guidance, seed=5)
    return sample(target, LABELS, **settings(target, mode, guidance))


def blamed(error: FloatingPointError) -> tuple[int, int]:
    """Step and image that a message names."""
    return tuple(map(int, NAMED.search(str(error)).groups()))


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
            draw(target, mode, guidance)
        assert blamed(caught.value) == (step, image)
        fault_log(f"NaN or infinity in the target's {place}, lasting, {mode}", "named with step and image")


@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize(
    ("mode", "guidance", "learned"),
    [(mode, *other) for mode in ("token", "block", "auto") for other in ((1.0, False), (2.0, True))]
    + [("window", 2.0, True)],
)
def test_passing_faults_are_named_or_without_consequence(
    mode, guidance, learned, corrected, steady_clock, fault_log, request
):
    """One row of one call is spoilt. Where that row was discarded, all images are those of a sound run, bit for bit.

    Two kinds of rows steer the image though they were discarded: a block is decided with all of its rows, and rows
    behind a refusal draft the same steps again. Without the spoilt one the image may be another draw, of the same law.
    """
    if not corrected:
        request.getfixturevalue("uncorrected")
    target = Faulty(learns_variance=learned)
    want = sample(target, LABELS, **settings(target, mode, guidance))
    ended = dict.fromkeys(("named", "unchanged", "redrawn"), 0)
    for step, image, only in itertools.product(range(K), range(N), (1, 2, 3, 4, 5)):
        # Features are asked for to verify, the head also to draft.
        target.spoil("output" if only > 2 else "features", step, image, VALUES[(step + image + only) % 3], only)
        speculation_module.time.now = 0.0
        try:
            got = sample(target, LABELS, **settings(target, mode, guidance))
        except FloatingPointError as error:
            found = blamed(error)
        else:
            found = None
        if found is not None:
            assert found == (step, image)
            ended["named"] += 1
            continue
        if target.met < only:
            continue
        same = (got.samples == want.samples).flatten(1).all(1)
        assert got.samples.isfinite().all()
        assert same[torch.arange(N) != image].all()
        assert same[image] or corrected or mode == "block", (step, image, only)
        ended["unchanged" if same[image] else "redrawn"] += 1
    fault = f"NaN or infinity in one row of one call, {mode}"
    fault_log(fault, "named with step and image", ended["named"])
    fault_log(fault, "row was discarded: images unchanged, bit for bit", ended["unchanged"])
    if ended["redrawn"]:
        fault_log(fault, "row was left out: another draw of the same law", ended["redrawn"])
    assert ended["named"] > 0
    assert ended["unchanged"] + (ended["redrawn"] if corrected or mode == "block" else 0) > 0


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize(("verification", "reuse"), [("token", False), ("token", True), ("block", True)])
def test_a_drafter_that_fails(verification, reuse, guidance, fault_log):
    """One draft of one image is spoilt: its drafter is named if that draft was decided."""
    target = GaussianTarget(num_classes=N)
    chosen = settings(Faulty(False), verification, guidance) | {"verification": verification, "reuse_refused": reuse}
    sound, ended = chosen.pop("drafter"), dict.fromkeys(("named", "unchanged", "redrawn"), 0)
    want = sample(target, LABELS, drafter=sound, **chosen).samples
    for step, image, only in itertools.product(range(1, K - 1), range(N), range(1, 4)):
        met = 0

        def failing(feature, previous, state, t, y, at=(step, image, only)):
            nonlocal met
            drafted = sound(feature, previous, state, t, y)
            rows = (t == STEPS.timesteps[at[0]]) & (y == at[1])
            met += int(rows.any())
            if rows.any() and met == at[2]:
                drafted[rows, 3] = VALUES[sum(at) % 3]
            return drafted

        try:
            got = sample(target, LABELS, drafter=failing, **chosen).samples
        except FloatingPointError as error:
            found = (blamed(error), str(error).partition(" must be")[0])
        else:
            found = None
        if found is not None:
            assert found == ((step, image), "sample: the output drafted by drafter and head")
            ended["named"] += 1
            continue
        if met < only:
            continue
        same = (got == want).flatten(1).all(1)
        assert got.isfinite().all()
        assert same[torch.arange(N) != image].all()
        assert same[image] or reuse, (step, image, only)
        ended["unchanged" if same[image] else "redrawn"] += 1
    fault = f"NaN or infinity in one draft, {verification}"
    fault_log(fault, "named with step and image", ended["named"])
    fault_log(fault, "draft was discarded: images unchanged, bit for bit", ended["unchanged"])
    if ended["redrawn"]:
        fault_log(fault, "draft was left out: another draw of the same law", ended["redrawn"])
    assert ended["named"] > 0


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("value", VALUES)
def test_a_block_cannot_step_back_from_a_spoilt_row(value, learned):
    """What row j alone decides of, stopping at j, is not given to earlier rows: it is committed, and then named.

    By the block's law stopping at or behind j has the probability P_j of what came before row j, whatever is there.
    """
    target, count = Faulty(learned), 400
    labels, seen = torch.zeros(count, dtype=torch.int64), []
    couple_block = round_module.couple_block

    def watched(*arguments, **options):
        sound = couple_block(*arguments, **options).committed
        if arguments[0].shape[1] < 3:
            return couple_block(*arguments, **options)
        spoilt = list(arguments)
        spoilt[6] = arguments[6].clone()
        row = arguments[7][:-1] + 1
        spoilt[6][row] = value
        outcome = couple_block(*spoilt, **options)
        seen.append((sound, outcome.committed, outcome.next_states.flatten(1).isfinite().all(1)))
        raise KeyboardInterrupt

    chosen = settings(target, "block", 1.0) | {"draft_length": 3}
    with pytest.MonkeyPatch.context() as patch:
        play_call_by_call(patch)
        patch.setattr(round_module, "couple_block", watched)
        with pytest.raises(KeyboardInterrupt):
            sample(target, labels, **chosen)
    sound, committed, finite = seen[0]
    assert set(committed.tolist()) == {1, 2}
    assert torch.equal(finite, committed == 1)
    # Stopping at row 1 or behind is as frequent as without the fault: two counts of the same uniforms, which differ in
    # single images only. Six standard deviations of a binomial's difference: a false alarm of less than 1e-8.
    assert abs(int((sound >= 2).sum()) - int((committed == 2).sum())) < 6 * math.sqrt(count / 2)


def test_images_before_a_fault_are_not_lost(fault_log):
    """``sample_iter`` has handed out what was finished when a later image fails."""
    target = Faulty(learns_variance=True)
    want = sample(target, LABELS, **settings(target, "token", 1.0)).samples
    target.spoil("output", 2, 3, math.nan)
    got = {}
    images = sample_iter(target, LABELS, max_slots=1, **settings(target, "token", 1.0))
    with pytest.raises(FloatingPointError, match="at step 2 of image 3$"):
        got.update(iter(lambda: next(images), None))
    assert sorted(got) == [0, 1, 2]
    torch.testing.assert_close(torch.stack([got[index] for index in range(3)]), want[:3])
    fault_log("NaN in the last of the images of sample_iter", "named; the images before it were handed out")
