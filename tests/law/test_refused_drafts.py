"""What a round learns from the row behind its refusal: what it is worth, that it is exact, and how far it may look."""

from __future__ import annotations

import pytest
import scipy.stats
import torch
from analytic import DETECTED, FALSE_ALARM, BiasedDrafter, GaussianTarget, PerfectDrafter, law_p_value

from free_kernels import DDPMSchedule, sample
from free_kernels.sampling.drafting import RefusedDrafts

IMAGES, LABEL = 3000, 1


def held(slots: int = 4, branches: int = 1) -> tuple[RefusedDrafts, torch.Tensor, torch.Tensor]:
    """After a round of lengths 3, 2, 0, 3 that committed 1, 2, 0, 2; its drafts and packed features."""
    drafts = torch.arange(slots * 3.0).view(slots, 3, 1, 1, 1).expand(-1, -1, 1, 2, 2).contiguous()
    features = torch.arange(branches * 8.0).view(-1, 1, 1).expand(-1, 4, 2).contiguous()
    refused = RefusedDrafts(drafts[:, 0], branches)
    lengths, committed = torch.tensor([3, 2, 0, 3]), torch.tensor([1, 2, 0, 2])
    refused.keep(drafts, features, torch.tensor([0, 3, 5, 5, 8]), committed, lengths, drafts[:, 2] + 0.25)
    refused.slots = [0, 3]
    return refused, drafts, features


@pytest.mark.parametrize("branches", [1, 2])
def test_first_drafts_are_corrected_where_a_draft_was_refused(branches):
    refused, drafts, features = held(branches=branches)
    assert refused.known.tolist() == [True, False, False, True]
    rows, calls = branches * 4, []

    def drafter(feature, previous, state, t, y):
        calls.append((previous, t, y))
        return feature + 10 * state[:, 0, 0, 0].view(-1, 1, 1)

    parent, previous = torch.rand(rows, 4, 2), torch.rand(rows, 1, 2, 2)
    state, t, y = torch.rand(rows, 1, 2, 2), torch.arange(rows), torch.arange(rows) + 100
    plain = drafter(parent, previous, state, t, y)
    exact = features.unflatten(0, (branches, 8))
    expected = plain.unflatten(0, (branches, 4)).clone()
    # The refused draft of slot 0 is its draft 1, row 1 of the packed call; that of slot 3 its draft 2, row 7.
    for slot, draft, row in ((0, 1, 1), (3, 2, 7)):
        there = parent.unflatten(0, (branches, 4))[:, slot] + 10 * drafts[slot, draft, 0, 0, 0]
        expected[:, slot] += exact[:, row] - there
    ragged = refused.first_drafts(drafter, (parent, previous, state, t, y), [3, 3, 3, 2], None)
    torch.testing.assert_close(ragged, expected.flatten(0, 1))
    assert torch.equal(calls[-1][1].unflatten(0, (-1,))[rows:] % 4, torch.tensor([0, 3]).repeat(branches))
    dense = refused.first_drafts(drafter, (parent, previous, state, t, y), None, None)
    torch.testing.assert_close(dense, expected.flatten(0, 1))
    # Slots 1 and 2 draft nothing, slot 0 no more than its row.
    kept = [slot + 4 * branch for branch in range(branches) for slot in (1, 3)]
    inputs = tuple(part[kept] for part in (parent, previous, state, t, y))
    fewer = refused.first_drafts(drafter, inputs, [1, 2, 0, 2], torch.tensor([1, 3]))
    torch.testing.assert_close(fewer, expected.flatten(0, 1)[kept])


def test_slots_without_rows_keep_what_they_have():
    refused, drafts, features = held()
    idle = torch.zeros(4, dtype=torch.int64)
    refused.keep(drafts + 1, features + 1, torch.zeros(5, dtype=torch.int64), idle, idle, drafts[:, 2])
    assert refused.known.tolist() == [True, False, False, True]
    assert torch.equal(refused._state[[0, 3], 0, 0, 0], torch.tensor([1.0, 11.0]))


def test_a_row_that_is_not_finite_spoils_nothing():
    refused, drafts, _ = held()
    offsets, committed, lengths = torch.tensor([0, 3, 5, 5, 8]), torch.tensor([1, 2, 0, 2]), torch.tensor([3, 2, 0, 3])
    refused.keep(drafts, torch.full((8, 4, 2), torch.nan), offsets, committed, lengths, drafts[:, 2] + 0.25)
    assert refused.known.any()
    inputs = (torch.rand(4, 4, 2), torch.rand(4, 1, 2, 2), torch.rand(4, 1, 2, 2), torch.arange(4), torch.arange(4))
    assert torch.equal(refused.first_drafts(lambda feature, *_: feature, inputs, None, None), inputs[0])


def test_a_refused_draft_serves_where_it_is_nearer_than_the_parent():
    refused, drafts, features = held()
    offsets, committed, lengths = torch.tensor([0, 3, 5, 5, 8]), torch.tensor([1, 2, 0, 2]), torch.tensor([3, 2, 0, 3])
    nearer_to_parent = torch.stack([drafts[0, 0] + 0.4, drafts[1, 0], drafts[2, 0], drafts[3, 2] + 0.4])
    refused.keep(drafts, features, offsets, committed, lengths, nearer_to_parent)
    assert refused.known.tolist() == [False, False, False, True]


class SwingingDrafter(BiasedDrafter):
    """Off to the side to which the last step did not go."""

    def __call__(self, feature, previous, state, t, y):
        biased = super().__call__(feature, previous, state, t, y)
        axis = torch.from_numpy(self.direction).float()
        forth = ((state - previous).flatten(1) @ axis > 0).view(-1, 1, 1)
        return torch.where(forth, 2 * self.target.features(state, t, y) - biased, biased)


@pytest.mark.parametrize("verification", ["token", "block"])
@pytest.mark.parametrize("further", [0, 1])
@pytest.mark.parametrize("variance", ["fixed_large", "learned_range"])
def test_one_row_behind_the_refusal_is_exact_and_two_are_not(variance, further, verification, monkeypatch):
    """The second row's state holds the noise that its step meets again; with new noise every round it may be used."""
    target, schedule = GaussianTarget(learns_variance=variance == "learned_range"), DDPMSchedule(16, variance=variance)
    keep = RefusedDrafts.keep

    def keep_another(self, drafts, features, row_offsets, committed, lengths, next_states):
        row = torch.where(committed < lengths - further, committed + further, committed)
        at = drafts[torch.arange(len(row)), row.clamp(max=drafts.shape[1] - 1)]
        keep(self, drafts, features, row_offsets, row, lengths, at if further else next_states)

    monkeypatch.setattr(RefusedDrafts, "keep", keep_another)
    labels, drafter = torch.full((IMAGES,), LABEL), SwingingDrafter(target)
    result = sample(target, labels, schedule=schedule, drafter=drafter, verification=verification, seed=11)
    assert 0.1 < result.stats.acceptance < 0.9
    p_value = law_p_value(result.samples, *target.final_law(schedule, LABEL), drafter.direction)
    assert p_value < DETECTED if further and verification == "token" else p_value > FALSE_ALARM


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_constant_error_cancels(guidance, request):
    """A drafter that is off by the same everywhere drafts perfectly after a refusal."""
    target, schedule = GaussianTarget(), DDPMSchedule(40)
    labels, settings = torch.arange(200) % 3, {"schedule": schedule, "guidance_scale": guidance}
    corrected = sample(target, labels, drafter=BiasedDrafter(target), **settings).stats
    request.getfixturevalue("uncorrected")
    plain = sample(target, labels, drafter=BiasedDrafter(target), **settings).stats
    gain = plain.rounds_per_image - corrected.rounds_per_image
    assert gain.mean() / gain.std() * len(gain) ** 0.5 > scipy.stats.norm.isf(DETECTED)


def test_a_perfect_drafter_stays_perfect():
    target, schedule = GaussianTarget(), DDPMSchedule(20)
    stats = sample(target, torch.arange(3), schedule=schedule, drafter=PerfectDrafter(target)).stats
    assert stats.acceptance == 1
