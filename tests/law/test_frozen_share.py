"""Drafters that leave the first part of the chain to clean samples: what is called when, and that it is exact."""

from __future__ import annotations

import pytest
import torch
from analytic import DETECTED, FALSE_ALARM, GaussianTarget, SwingingDrafter, law_p_value
from call_by_call import play_call_by_call
from torch import Tensor

from free_kernels import DDPMSchedule, DrafterConfig, FeatureDrafter, Relaxation, estimate_memory, sample
from free_kernels.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from free_kernels.protocols import frozen_steps
from free_kernels.sampling.draft_sources import Source
from free_kernels.sampling.refused_rows import CleanRows
from free_kernels.sampling.round import Rounds
from free_kernels.sampling.speculative import Speculation

IMAGES, LABEL = 3000, 1


class Counting(SwingingDrafter):
    """Notes the timesteps that it is called at."""

    def __init__(self, target: GaussianTarget, share: object = 0.0) -> None:
        super().__init__(target)
        self.frozen_share = share
        self.asked: list[int] = []

    def __call__(self, feature: Tensor, previous: Tensor, state: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.asked += t.tolist()
        return super().__call__(feature, previous, state, t, y)


def make_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("free_kernels.sampling.api.Speculation", lambda job: Speculation(job, dense=True))


def p_value(target: GaussianTarget, schedule: DDPMSchedule, drafter: Counting, guidance: float = 1.0, **settings):
    labels = torch.full((IMAGES,), LABEL)
    result = sample(
        target, labels, schedule=schedule, drafter=drafter, guidance_scale=guidance, seed=11, draft_length=8, **settings
    )
    assert result.stats.acceptance < 0.95, "drafts have to be refused"
    return law_p_value(result.samples, *target.final_law(schedule, LABEL, guidance), drafter.direction)


def test_all_of_the_chain_is_the_frozen_drafter_and_nothing_of_it_is_the_drafter():
    target, schedule, labels = GaussianTarget(), DDPMSchedule(20), torch.arange(6) % 3
    drawn = [
        sample(target, labels, schedule=schedule, drafter=drafter)
        for drafter in (Counting(target, 1.0), "frozen", Counting(target, 0), SwingingDrafter(target))
    ]
    for one, other in (drawn[:2], drawn[2:]):
        assert torch.equal(one.samples, other.samples)
        assert one.stats.target_calls == other.stats.target_calls
        assert one.stats.drafter_calls == other.stats.drafter_calls
    assert not torch.equal(drawn[0].samples, drawn[2].samples)


@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("dense", [False, True])
def test_the_drafter_is_called_in_rounds_that_begin_behind_the_share(dense, reuse, monkeypatch):
    if dense:
        make_dense(monkeypatch)
    target, schedule = GaussianTarget(), DDPMSchedule(40)
    drafter = Counting(target, 0.6)
    stats = sample(
        target, torch.tensor([1]), schedule=schedule, drafter=drafter, draft_length=5, reuse_refused=reuse
    ).stats
    steps = [schedule.timesteps.tolist().index(t) for t in drafter.asked]
    assert min(steps) >= 24
    assert max(steps) <= 38
    # What rows ask for beside the drafts is in the same call.
    assert 0 < stats.drafter_calls <= len(steps)
    assert stats.drafter_calls < 4 * stats.target_calls / 2


@pytest.mark.parametrize(("variance", "guidance"), [("fixed_small", 1.0), ("fixed_large", 2.0), ("learned_range", 1.0)])
@pytest.mark.parametrize("verification", ["token", "block"])
def test_law(variance, guidance, verification):
    target = GaussianTarget(learns_variance=variance == "learned_range")
    schedule = DDPMSchedule(16, variance=variance)
    assert p_value(target, schedule, Counting(target, 0.5), guidance, verification=verification) > FALSE_ALARM


@pytest.mark.parametrize("dense", [False, True])
def test_law_where_slots_are_at_both_sides_of_the_share(dense, monkeypatch):
    if dense:
        make_dense(monkeypatch)
    seen, draft = set(), Rounds._draft

    def noted(self, ahead, sources, late):
        seen.add(sources)
        draft(self, ahead, sources, late)

    monkeypatch.setattr(Rounds, "_draft", noted)
    target, schedule = GaussianTarget(learns_variance=True), DDPMSchedule(24)
    assert p_value(target, schedule, Counting(target, 0.5), max_slots=701) > FALSE_ALARM
    assert Source.CLEAN | Source.DRAFTER in seen


def test_the_row_behind_a_step_must_not_draft_it(monkeypatch):
    """Negative control: what drafts step k was made with its noise."""
    target, schedule, keep = GaussianTarget(), DDPMSchedule(16), CleanRows.keep

    def keep_one_too_far(self, played):
        keep(self, played)
        for buffer in (self._states, self._clean):
            rows = buffer.narrow(1, 0, self.held)
            rows.copy_(rows.roll(-1, 1))

    play_call_by_call(monkeypatch)
    monkeypatch.setattr(CleanRows, "keep", keep_one_too_far)
    assert p_value(target, schedule, Counting(target, 0.9)) < DETECTED


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_images_depend_neither_on_the_slots_nor_on_fixed_shapes(guidance, monkeypatch):
    target, schedule, labels = GaussianTarget(), DDPMSchedule(20), torch.arange(9) % 3
    settings = {"schedule": schedule, "guidance_scale": guidance, "draft_length": 4}
    runs = [
        sample(target, labels, drafter=Counting(target, 0.5), max_slots=slots, **settings).samples
        for slots in (9, 2, 1)
    ]
    make_dense(monkeypatch)
    runs += [
        sample(target, labels, drafter=Counting(target, 0.5), max_slots=slots, **settings).samples for slots in (9, 2)
    ]
    for other in runs[1:]:
        torch.testing.assert_close(other, runs[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("settings", [{"draft_length": "auto"}, {"relaxation": Relaxation(0.5), "draft_length": 4}])
def test_with_other_settings(settings):
    target, labels = GaussianTarget(), torch.arange(9) % 3
    stats = sample(
        target, labels, schedule=DDPMSchedule(60), drafter=Counting(target, 0.5), max_slots=4, **settings
    ).stats
    assert stats.target_calls > 0


def test_the_steps_of_a_share():
    class Drafter:
        frozen_share = 0.0

    for share, steps, wanted in (
        (0, 50, 0),
        (0.6, 250, 150),
        (0.29, 100, 29),
        (0.07, 100, 7),
        (0.01, 4, 1),
        (1e-9, 20, 1),
        (1, 9, 9),
    ):
        Drafter.frozen_share = share
        assert frozen_steps("sample", Drafter(), steps, False) == wanted


@pytest.mark.parametrize(
    ("share", "error"), [(1.5, ValueError), (-0.1, ValueError), (True, TypeError), ("half", TypeError)]
)
def test_a_wrong_share_is_refused(share, error):
    target = GaussianTarget()
    with pytest.raises(error, match=r"^sample: drafter.frozen_share must be a finite number in \[0, 1\], got "):
        sample(target, torch.tensor([0]), schedule=DDPMSchedule(8), drafter=Counting(target, share))


def test_a_drafter_with_a_memory_has_none():
    target = GaussianTarget()
    config = DrafterConfig(width=32, window=3)
    drafter = FeatureDrafter(target.latent_shape, target.feature_shape, target.num_classes, config).eval()
    drafter.frozen_share = 0.5
    with pytest.raises(ValueError, match=r"^sample: drafter.frozen_share must be 0 for a drafter with a memory"):
        sample(target, torch.tensor([0]), schedule=DDPMSchedule(8), drafter=drafter)


def test_a_file_keeps_the_share(tmp_path):
    target, path = GaussianTarget(), tmp_path / "drafter.safetensors"
    drafter = FeatureDrafter(target.latent_shape, target.feature_shape, target.num_classes, DrafterConfig(width=32))
    drafter.frozen_share = 0.6
    drafter.save(path)
    assert FeatureDrafter.load(path, target).frozen_share == 0.6
    weights, metadata = load_checkpoint(path, "feature_drafter")
    for wrong in (2.0, "half", None, True):
        save_checkpoint(path, weights, {**metadata, "frozen_share": wrong})
        with pytest.raises(CheckpointError, match="a drafter's shapes"):
            FeatureDrafter.load(path, target)


def test_memory_has_both_kinds_of_rows():
    target = GaussianTarget()
    rows = [
        estimate_memory(target, schedule=DDPMSchedule(20), drafter=drafter, draft_length=6).refused_rows
        for drafter in (Counting(target, 0.5), Counting(target), "frozen")
    ]
    assert rows[0] == rows[1] + rows[2]
