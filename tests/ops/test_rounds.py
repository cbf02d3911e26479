"""Ops that do several in one call: bit by bit what these do one after the other."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
from round_settings import SETTINGS
from torch import Tensor

from free_dit import load_bundled
from free_kernels import DDPMSchedule, sample
from free_kernels.extension import has_extension
from free_kernels.ops import commit_drafts, couple, couple_block
from free_kernels.ops.drafting import (
    AdvanceArguments,
    FindArguments,
    KeepArguments,
    KeepCleanArguments,
    OpenArguments,
    RenewArguments,
    TallyArguments,
    find_rows,
    keep_clean_rows,
    keep_rows,
    open_round,
    renew_slots,
    tally_round,
)
from free_kernels.ops.drafting.api import ADVANCE
from free_kernels.ops.final_layer import FinalLayerArguments, final_layer
from free_kernels.ops.random.api import philox_round
from free_kernels.ops.rounds import (
    DecideArguments,
    HeadAdvanceArguments,
    OpenKeyedArguments,
    advance_from_features,
    decide_round,
    open_keyed_round,
)
from free_kernels.sampling import drafting as drafting_module
from free_kernels.sampling import round as round_module
from free_kernels.targets import fused_head as head_module

pytestmark = pytest.mark.skipif(not has_extension(), reason="no compiled extension")
BACKENDS = ["extension", "reference"]


def copied(arguments):
    """The same arguments in memory of their own."""
    return type(arguments)(*(part.clone() if isinstance(part, Tensor) else part for part in arguments))


def played(settings: dict, owner: object, name: str) -> list[tuple]:
    """What a run of five images of the bundled pair calls an op with."""
    target, drafter = load_bundled("digits")
    given, op = [], getattr(owner, name)

    def kept(arguments):
        given.append(copied(arguments))
        return op(arguments)

    with mock.patch.object(owner, name, kept):
        settings = {"drafter": drafter, "schedule": DDPMSchedule(20), "draft_length": 5, "seed": 3} | settings
        sample(target, torch.arange(5), **settings)
    assert given
    return given


def same(found, expected) -> None:
    """Equal to the last bit, whatever is not a number too."""
    for one, other in zip(found, expected, strict=True):
        if isinstance(one, Tensor):
            assert torch.equal(one.nan_to_num(7.0, 8.0, 9.0), other.nan_to_num(7.0, 8.0, 9.0))
        else:
            assert one == other


def one_after_the_other(a: DecideArguments, backend: str) -> tuple[Tensor, ...]:
    """``decide_round`` by the ops that it names."""
    settings = {"guidance_scale": a.guidance_scale, "guidance_channels": a.guidance_channels, "clip": a.clip}
    rows = a.draft_states, a.draft_mean, a.draft_std, a.noise, a.slack_noise, a.uniform, a.output, a.row_offsets
    if a.block:
        decided = couple_block(*rows, a.columns, **settings, backend=backend)
    else:
        decided = couple(*rows, a.columns, relaxation=a.relaxation, **settings, backend=backend)
    now = decided.committed, a.lengths, a.steps
    tally = TallyArguments(a.output, decided.next_states, decided.gap_sq, *now, a.deviation)
    finite = tally_round(tally, backend)
    packed = a.output, a.row_offsets, *now
    if a.at is not None:
        held = a.at, a.held_states, a.held_features
        keep_rows(KeepArguments(a.draft_states, a.features, *packed, *held), backend)
    if a.clean_at is not None:
        held = a.clean_before, a.clean_at, a.clean_states, a.clean, a.response, a.pattern
        keep_clean_rows(KeepCleanArguments(a.draft_states, *packed, a.table, *held, *settings.values()), backend)
    written = ("state", "previous", "parent", "steps", "images", "labels", "samples", "all_labels", "queue")
    commit_drafts(
        decided.committed,
        decided.next_states,
        a.draft_states,
        a.features,
        a.row_offsets,
        **{name: getattr(a, name) for name in written},
        num_steps=len(a.table),
        backend=backend,
    )
    fresh = renew_slots(RenewArguments(a.steps, a.images, a.numbers, a.indices, a.rounds), backend)
    ahead = torch.zeros_like(a.steps)
    if a.clean_at is not None:
        ahead = a.clean_ahead
        find_rows(FindArguments(a.clean_at, a.steps, a.clean_places, a.clean_before, ahead), backend)
    if a.at is not None:
        ahead = a.ahead
        find_rows(FindArguments(a.at, a.steps, a.places, a.before, ahead), backend)
    report = torch.cat([decided.committed, a.images, a.steps, ahead, finite])
    return *decided, report, fresh


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SETTINGS)
def test_a_decided_round_is_its_ops_one_after_the_other(name, backend):
    given = played(SETTINGS[name], round_module, "decide_round")
    kinds = {(a.at is not None, a.clean_at is not None) for a in given}
    assert kinds == {"frozen": {(False, True)}, "guided, frozen": {(False, True)}}.get(name, kinds)
    for a in given:
        ours, theirs = copied(a), copied(a)
        same(decide_round(ours, backend), one_after_the_other(theirs, backend))
        same(ours, theirs)


def test_what_is_not_held_is_reported_as_nothing_ahead():
    a = played({}, round_module, "decide_round")[3]
    empty = {name: None for name in DecideArguments._fields[DecideArguments._fields.index("at") :]}
    slots = len(a.steps)
    for backend in BACKENDS:
        report = decide_round(copied(a)._replace(**empty), backend).report
        assert report[3 * slots : 4 * slots].tolist() == [0] * slots


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"held_states": None}, r"decide_round: at, held_states, .* must be tensors, or None all of them"),
        ({"clean_ahead": None}, r"decide_round: clean_at, .* must be tensors, or None all of them"),
        ({"uniform": torch.zeros(2)}, r"couple: uniform must "),
        ({"deviation": torch.zeros(20, dtype=torch.float64)}, r"deviation must be float32"),
        ({"features": torch.zeros(1, 1, 1)}, r"keep_rows: "),
        ({"parent": torch.zeros(1, 1, 1, 1)}, r"commit_drafts: parent must be float32 "),
        ({"numbers": torch.zeros(5)}, r"renew_slots: numbers must be int64"),
        ({"places": torch.zeros(5, 99, dtype=torch.int64)}, r"find_rows: places must be "),
        ({"output": torch.zeros(25, 2, 8, 8, dtype=torch.int64)}, r"output must be float32"),
        ({"deviation": torch.zeros(3)}, r"decide_round: deviation must be "),
    ],
)
def test_a_wrong_round_is_refused(change, message, backend):
    a = copied(played({}, round_module, "decide_round")[3])
    with pytest.raises((ValueError, TypeError), match=message):
        decide_round(a._replace(**change), backend)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": torch.tensor([-30, 0, 0, 0, 0])}, r"commit_drafts: steps\[0\] must be in \[0, "),
        ({"images": torch.tensor([9, 0, 1, 2, 3])}, r"commit_drafts: images\[0\] must be in \[-1, 5\), got 9"),
        ({"queue": torch.tensor([-1])}, r"commit_drafts: queue must be at least 0, got -1"),
        # An idle slot commits nothing, and its rows are kept all the same.
        (
            {"steps": torch.tensor([2**63 - 1, 0, 0, 0, 0]), "images": torch.tensor([-1, 0, 1, 2, 3])},
            r"tally_round: steps\[0\] must be at least 0 and below 2\*\*62, got 9223372036854775807",
        ),
    ],
)
def test_values_are_checked_before_anything_is_written(change, message):
    a = copied(played({}, round_module, "decide_round")[3])._replace(**change)
    before = copied(a)
    with pytest.raises(ValueError, match=message):
        decide_round(a, "extension")
    same(a, before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["learned", "block", "one variance", "refilled"])
def test_an_opened_round_has_the_numbers_of_its_keys(name, backend):
    for a in played(SETTINGS[name], drafting_module, "open_keyed_round"):
        found = open_keyed_round(a, backend)
        opened = open_round(OpenArguments(*a[:5]), backend)
        keys = a.seed % 2**64, a.images, opened.steps, math.prod(a.state.shape[1:]), a.slack, a.rounds
        noise, slack_noise, uniform = philox_round(*keys, backend)
        same((found.steps, found.timesteps, found.columns, found.uniform), (*opened[:3], uniform))
        # Other rows of the states are undefined.
        same((found.states[:, 0],), (opened.states[:, 0],))
        shape = *opened.steps.shape, *a.state.shape[1:]
        assert found.noise.shape == found.states.shape == shape
        same((found.noise.flatten(2),), (noise,))
        assert found.slack_noise.shape == (shape if a.slack else (*shape[:2], 0, *shape[3:]))
        same((found.slack_noise.flatten(2),), (slack_noise,))
        assert found.mean.shape == found.std.shape == (shape[0], shape[1] - 1, *shape[2:])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"current": torch.zeros(3)}, r"open_round: current must be int64"),
        ({"length": 0}, r"open_round: length and the number of timesteps must be at least 1"),
        ({"images": torch.zeros(4, dtype=torch.int64)}, r"philox_round: images must be int64"),
    ],
)
def test_a_wrong_opening_is_refused(change, message, backend):
    a = OpenKeyedArguments(
        torch.zeros(3, 1, 2, 2),
        torch.zeros(3, dtype=torch.int64),
        torch.arange(9),
        torch.zeros(9, 8),
        4,
        1,
        torch.arange(3),
        True,
        None,
    )
    open_keyed_round(a, backend)
    with pytest.raises((ValueError, TypeError), match=message):
        open_keyed_round(a._replace(**change), backend)


def advances(name: str) -> list[HeadAdvanceArguments]:
    return played(SETTINGS[name], head_module, "advance_from_features")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["learned", "guided", "refilled", "clipped"])
def test_a_draft_with_its_head_is_both_ops(name, backend):
    for a in advances(name):
        ours, theirs = copied(a), copied(a)
        advance_from_features(ours, backend)
        output = final_layer(FinalLayerArguments(*theirs[:12]), backend)
        drafts = theirs.states, theirs.mean, theirs.std, theirs.noise, theirs.columns, output, theirs.rows
        ADVANCE(AdvanceArguments(*drafts, a.draft, a.draft + 1, *a[-3:]), output, backend)
        same(ours, theirs)
        assert not torch.equal(ours.states, a.states)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"h": torch.zeros(5, 16)}, r"final_layer: h must "),
        ({"eps": 0.0}, r"final_layer: eps must be above 0"),
        ({"draft": 4}, r"advance_drafts: first and end must be in order"),
        ({"columns": torch.zeros(5, 5, 7)}, r"advance_drafts: columns must be float32 "),
        ({"rows": torch.full((5, 4), 5)}, r"advance_drafts: rows must be below 5, got 5"),
    ],
)
def test_a_wrong_draft_is_refused(change, message, backend):
    a = advances("learned")[0]
    with pytest.raises((ValueError, TypeError), match=message):
        advance_from_features(a._replace(**change), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_head_of_other_channels_is_refused(backend):
    a = advances("learned")[0]
    # Three channels, where states have one.
    weight = a.weight[:1].repeat(3 * a.patch_rows * a.patch_columns, 1)
    with pytest.raises((ValueError, TypeError), match=r"advance_drafts: output must "):
        advance_from_features(a._replace(weight=weight, bias=None), backend)
