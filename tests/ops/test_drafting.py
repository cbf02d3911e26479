"""Drafting ops: the compiled ones and the reference against plain float64 formulas, and each other."""

from __future__ import annotations

import math
import os

import pytest
import torch
from torch import Tensor

from free_kernels.extension import has_extension
from free_kernels.ops.drafting import (
    AdvanceArguments,
    CorrectArguments,
    ErrorArguments,
    FindArguments,
    JoinArguments,
    KeepArguments,
    OpenArguments,
    RenewArguments,
    RowArguments,
    TallyArguments,
    advance_drafts,
    api,
    correct_features,
    draft_rows,
    find_rows,
    join_rows,
    keep_rows,
    open_round,
    renew_slots,
    row_errors,
    tally_round,
)

# Kernels in Triton's interpreter need it in the whole process: test_triton_drafting.py runs this file in another one.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
ON_GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
needs_extension = pytest.mark.skipif(not has_extension(), reason="no compiled extension")
needs_triton = pytest.mark.skipif(not (INTERPRETED or ON_GPU), reason="needs a CUDA device or TRITON_INTERPRET=1")
REFERENCE, EXTENSION, TRITON = (
    pytest.param(("reference", torch.device("cpu")), id="reference"),
    pytest.param(("extension", torch.device("cpu")), id="extension", marks=needs_extension),
    pytest.param(("triton", DEVICE), id="triton", marks=[needs_triton, pytest.mark.gpu]),
)
BACKENDS = [REFERENCE, EXTENSION, TRITON]


def on(arguments, device: torch.device):
    """The same arguments on a device; copies where it is another one."""
    return type(arguments)(*(part.to(device) if isinstance(part, Tensor) else part for part in arguments))


def back(arguments):
    return on(arguments, torch.device("cpu"))


SLOTS, LENGTH, CHANNELS, SIDE, HELD = 3, 5, 2, 3, 11
NOTHING = -1


def normals(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def drafting(
    *,
    learned: bool = False,
    guidance: float = 1.0,
    guided: int = CHANNELS,
    clip: float = math.inf,
    dtype: torch.dtype = torch.float32,
    side: int = SIDE,
) -> AdvanceArguments:
    """Drafts 1 to 3 of slots that have all, some and none of their rows."""
    latent = CHANNELS, side, side
    outputs, branches = CHANNELS * (2 if learned else 1), 1 if guidance == 1.0 else 2
    columns = 0.5 * normals(SLOTS, LENGTH, 8, seed=1)
    # Deviations of about a half.
    columns[..., 2] = -1.0
    rows = torch.tensor([[7, 0, 1, 2], [8, 5, NOTHING, 6], [9, NOTHING, NOTHING, NOTHING]])
    return AdvanceArguments(
        normals(SLOTS, LENGTH, *latent, seed=2),
        normals(SLOTS, LENGTH - 1, *latent, seed=3),
        normals(SLOTS, LENGTH - 1, *latent, seed=4),
        normals(SLOTS, LENGTH, *latent, seed=5),
        columns,
        normals(branches * HELD, outputs, side, side, seed=6).to(dtype),
        rows,
        1,
        4,
        guidance,
        guided,
        clip,
    )


def exact_row(a: AdvanceArguments, row: int) -> Tensor:
    """The guided output of a row, float64."""
    said = a.output.double()
    if a.guidance_scale == 1.0:
        return said[row]
    conditional, unconditional = said[row].clone(), said[HELD + row]
    guided = slice(0, a.guidance_channels)
    conditional[guided] = unconditional[guided] + a.guidance_scale * (conditional[guided] - unconditional[guided])
    return conditional


def exact(a: AdvanceArguments) -> AdvanceArguments:
    """The same drafts in float64, one after the other."""
    states, mean, std = (buffer.double().clone() for buffer in (a.states, a.mean, a.std))
    for slot in range(SLOTS):
        for j in range(a.first, a.end):
            row = int(a.rows[slot, j])
            if row < 0:
                continue
            said, state = exact_row(a, row), states[slot, j]
            from_state, from_output, log_std, slope, x0_state, x0_output, from_x0, given_x0 = a.columns[
                slot, j
            ].double()
            if math.isinf(a.clip):
                mean[slot, j] = from_state * state + from_output * said[:CHANNELS]
            else:
                clean = (x0_state * state + x0_output * said[:CHANNELS]).clamp(-a.clip, a.clip)
                mean[slot, j] = given_x0 * state + from_x0 * clean
            learned = said[CHANNELS:] if len(said) > CHANNELS else torch.zeros_like(state)
            std[slot, j] = (log_std + slope * learned).exp()
            states[slot, j + 1] = mean[slot, j] + std[slot, j] * a.noise[slot, j].double()
    return a._replace(states=states, mean=mean, std=std)


CASES = {
    "fixed": {},
    "learned": {"learned": True},
    "clipped": {"clip": 0.4},
    "guided": {"guidance": 2.5},
    "guided below one half": {"guidance": 0.3, "learned": True},
    "guided in part": {"guidance": 2.5, "guided": 1, "learned": True, "clip": 0.4},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "large": {"side": 40},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_drafts_are_those_of_the_formulas(case, backend):
    a = drafting(**CASES[case])
    want = exact(a)
    name, device = backend
    given = on(a._replace(states=a.states.clone(), mean=a.mean.clone(), std=a.std.clone()), device)
    advance_drafts(
        *given[:9],
        guidance_scale=a.guidance_scale,
        guidance_channels=a.guidance_channels,
        clip=a.clip,
        backend=name,
    )
    # A state is a sum of four products and an exponential of numbers of size 10 at most, and so is each state that it
    # is made from.
    bound = 1e3 * torch.finfo(torch.float32).eps
    for name in ("states", "mean", "std"):
        torch.testing.assert_close(getattr(given, name).cpu().double(), getattr(want, name), rtol=bound, atol=bound)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_has_no_row_is_left_alone(backend):
    name, device = backend
    a = on(drafting(), device)
    before = a.states.cpu().clone()
    api.ADVANCE(a, a.states, name)
    a = back(a)
    assert torch.equal(a.states[2], before[2])
    assert torch.equal(a.states[:, :2], before[:, :2])
    assert not torch.equal(a.states[1, 2], before[1, 2])
    assert torch.equal(a.states[1, 3], before[1, 3])
    assert not torch.equal(a.states[1, 4], before[1, 4])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_is_not_clipped_away(backend):
    a = drafting(clip=0.4)
    a.output[0, 0, 0, 0] = math.nan
    name, device = backend
    a = on(a, device)
    api.ADVANCE(a, a.states, name)
    assert a.states[0, 2, 0, 0, 0].isnan()
    assert a.states[1].isfinite().all()


@needs_extension
@pytest.mark.parametrize("threads", [1, 2])
def test_threads_share_slots(threads):
    """Many slots, so that there is work for several threads; drafts do not depend on how it is shared."""
    slots, latent = 40, (1, 64, 64)
    rows = torch.arange(slots * 3).view(slots, 3)
    states = normals(slots, 4, *latent, seed=0)
    given = [normals(slots, 3, *latent, seed=1), normals(slots, 3, *latent, seed=2), normals(slots, 4, *latent, seed=3)]
    given += [0.1 * normals(slots, 4, 8, seed=4), normals(3 * slots, *latent, seed=5), rows, 0, 3]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = states.clone()
        advance_drafts(together, *given, backend="extension")
    finally:
        torch.set_num_threads(before)
    for slot in (0, 17, 39):
        alone = [part[slot : slot + 1].clone() for part in (states, *given[:4])]
        advance_drafts(*alone, given[4], rows[slot : slot + 1], 0, 3, backend="extension")
        assert torch.equal(alone[0][0], together[slot])


def keeping(branches: int = 2, dtype: torch.dtype = torch.float32) -> KeepArguments:
    """Rounds of 5, 2, 0 and 3 rows, room for four."""
    slots, places = 4, 5
    lengths = torch.tensor([5, 2, 0, 3])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    packed = int(offsets[-1]) + 1
    return KeepArguments(
        normals(slots, 5, 2, 3, 3, seed=1),
        normals(branches * packed, 4, 3, seed=2).to(dtype),
        normals(branches * packed, 4, 3, 3, seed=3).to(dtype),
        offsets,
        torch.tensor([1, 2, 0, 2]),
        lengths,
        torch.tensor([6, 0, 9, 3]),
        torch.full((slots, places), -1),
        torch.zeros(slots, places, 2, 3, 3),
        torch.zeros(branches, slots, places, 4, 3, dtype=dtype),
    )


def copied(a: KeepArguments) -> KeepArguments:
    return KeepArguments(*(part.clone() for part in a))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("backend", [EXTENSION, TRITON])
def test_memory_is_that_of_the_reference(branches, dtype, backend):
    """Three rounds one after the other, with rows that are not finite; the place of what is not kept may differ."""
    by_reference, other = keeping(branches, dtype), on(keeping(branches, dtype), backend[1])
    for number in range(3):
        results = []
        for name, a in (("reference", by_reference), (backend[0], other)):
            a.features[-2 - number] = math.inf
            a.output[number, 0, 0, 0] = math.nan
            a = a._replace(steps=a.steps + number, committed=(a.committed + number).minimum(a.lengths))
            keep_rows(a, name)
            places = a.at.new_zeros(4, 3 - number)
            found = FindArguments(a.at, a.steps + a.committed, places, a.steps.clone(), a.steps.clone())
            find_rows(found, name)
            results.append((back(a), back(found)))
        (want, want_found), (got, got_found) = results
        for name in ("at", "held_states", "held_features"):
            # Rows that are not kept share a place, which holds anything.
            axis = 2 if name == "held_features" else 1
            want_rows, got_rows = (getattr(a, name).narrow(axis, 0, 4) for a in (want, got))
            torch.testing.assert_close(got_rows, want_rows, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(want_found.places, got_found.places)
        assert torch.equal(want_found.ahead, got_found.ahead)
        assert torch.equal(want_found.before, got_found.before)
    assert int(want_found.ahead.sum()) > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_are_kept_at_their_steps(backend):
    a = on(keeping(), backend[1])
    keep_rows(a, backend[0])
    a = back(a)
    assert a.at[0, :4].tolist() == [8, 9, 6, 7]
    torch.testing.assert_close(a.held_states[0, 0], a.states[0, 2], rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tally(backend):
    """Slot 0 tests both drafts that it accepted and the refused one, slot 1 all of its one, slot 2 none."""
    gaps = torch.tensor([[1.0, 2.0, 4.0, 8.0], [16.0, 32.0, 64.0, 128.0], [256.0] * 4])
    name, device = backend
    a = TallyArguments(
        normals(4, 1, 2, 2, seed=0),
        normals(3, 1, 2, 2, seed=1),
        gaps,
        torch.tensor([3, 2, 1]),
        torch.tensor([5, 2, 1]),
        torch.tensor([1, 2, 5]),
        torch.zeros(6),
    )
    a = on(a, device)
    assert tally_round(a, name).tolist() == [1]
    assert a.deviation.tolist() == [0, 1, 18, 4, 0, 0]
    a.gap_sq[0, 1] = math.inf
    assert tally_round(a, name).tolist() == [1]
    assert float(a.deviation[2]) > 1e29
    for part, value in (("output", math.nan), ("next_states", -math.inf)):
        spoilt = a._replace(**{part: getattr(a, part).clone()})
        getattr(spoilt, part).view(-1)[-1] = value
        assert tally_round(spoilt, name).tolist() == [0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [1, 5])
def test_a_round_begins_with_its_steps(length, backend):
    """Steps past the end are the last."""
    state, current = normals(3, 2, 5, 7, seed=0), torch.tensor([0, 4, 9])
    timesteps, table = torch.arange(10) * 7, normals(10, 8, seed=1)
    a = on(OpenArguments(state, current, timesteps, table, length), backend[1])
    steps, network_steps, columns, states, *drafts = (part.cpu() for part in open_round(a, backend[0]))
    want = [[min(first + j, 9) for j in range(length)] for first in (0, 4, 9)]
    assert steps.tolist() == want
    assert network_steps.tolist() == [[7 * step for step in row] for row in want]
    assert torch.equal(columns, table[steps])
    assert states.shape == (3, length, 2, 5, 7)
    assert torch.equal(states[:, 0], state)
    assert [part.shape for part in drafts] == [(3, length - 1, 2, 5, 7)] * 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("active", [None, [0, 2, 3]])
@pytest.mark.parametrize("branches", [1, 2])
def test_errors_are_added_where_a_row_is_nearer(branches, active, dtype, backend):
    """Slot 0 has none, slot 1 a far one, slots 2 and 3 near ones."""
    chosen = range(4) if active is None else active
    latest = torch.tensor([[0, -1, 0], [0, 1, 0], [0, 2, 0], [0, 3, 0]])
    states, asked = normals(4, 1, 9, 8, seed=0), normals(5, 1, 9, 8, seed=1)
    asked[1] = states[1] + 3.0
    asked[2:4] = states[2:4] + 0.5
    drafted, errors = normals(branches * len(chosen), 37, 41, seed=2), normals(branches, 3, 4, 37, 41, seed=3)
    rows = states[list(chosen)]
    a = CorrectArguments(
        drafted.to(dtype),
        errors.to(dtype),
        rows,
        rows + 1.0,
        asked,
        latest,
        1,
        None if active is None else torch.tensor(active),
    )
    found = correct_features(on(a, backend[1]), backend[0]).cpu().unflatten(0, (branches, -1))
    for i, slot in enumerate(chosen):
        plain = a.drafted.unflatten(0, (branches, -1))[:, i]
        if slot >= 2:
            # A unit in the last place: Triton's interpreter cuts bfloat16 off where a GPU rounds.
            want = plain.double() + a.errors[:, 1, slot].double()
            torch.testing.assert_close(found[:, i].double(), want, rtol=torch.finfo(dtype).eps, atol=0)
        else:
            assert torch.equal(found[:, i], plain), slot


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "kept"), [(torch.float32, torch.bfloat16), (torch.float16, torch.float32)])
@pytest.mark.parametrize("chosen", [None, [0, 2, 4]])
@pytest.mark.parametrize("branches", [1, 2])
def test_refused_rows_join_a_drafters_call(branches, chosen, dtype, kept, backend):
    """Two drafts of three slots; slot 1 has no second row. Errors are exact less drafted, none where not finite."""
    slots, drafts, held, inputs = 3, 2, 9, 2 * branches
    latest, before = torch.tensor([[3, 4, 0], [5, -1, 0], [7, 8, 0]]), torch.tensor([2, 1, 6])
    features = normals(branches, held, 37, 41, seed=0).to(kept)
    features[0, 7, 1, 2] = math.inf
    a = JoinArguments(
        normals(inputs, 37, 41, seed=1).to(dtype),
        normals(inputs, 2, 5, 3, seed=2),
        normals(inputs, 2, 5, 3, seed=3),
        torch.arange(inputs),
        torch.arange(inputs) + 10,
        normals(held, 2, 5, 3, seed=4),
        features,
        before,
        latest,
        torch.tensor([[90, 80, 70], [60, 50, 40], [30, 20, 10]]),
        torch.tensor([4, 5, 6]),
        drafts,
        None if branches == 1 else 99,
        None if chosen is None else torch.tensor(chosen),
    )
    joined = [part.cpu() for part in join_rows(on(a, backend[1]), backend[0])]
    numbers = range(drafts * slots) if chosen is None else chosen
    for given, part in zip(a[:5], joined, strict=True):
        assert part.dtype == given.dtype
        assert torch.equal(part[:inputs], given)
        assert len(part) == inputs + branches * len(numbers)
    exact = torch.zeros(branches, drafts, slots, 37, 41)
    drafted = normals(len(joined[0]), 37, 41, seed=5).to(dtype)
    for branch in range(branches):
        for i, number in enumerate(numbers):
            draft, slot = divmod(number, slots)
            row, now = inputs + branch * len(numbers) + i, int(latest[slot, draft])
            if now < 0:
                continue
            past = int(latest[slot, draft - 1]) if draft else int(before[slot])
            # A unit in the last place: Triton's interpreter cuts bfloat16 off where a GPU rounds.
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(joined[0][row].float(), features[branch, past].float(), rtol=eps, atol=1e-6)
            assert torch.equal(joined[1][row], a.asked[past])
            assert torch.equal(joined[2][row], a.asked[now])
            assert joined[3][row] == a.timesteps[slot, draft]
            assert joined[4][row] == (a.labels[slot] if branch == 0 else 99)
            exact[branch, draft, slot] = features[branch, now].float() - drafted[row].float()
    given = ErrorArguments(drafted, features, latest, drafts, inputs, a.chosen)
    errors = row_errors(on(given, backend[1]), backend[0]).cpu().float()
    assert errors.isfinite().all()
    exact = torch.where(exact.isfinite(), exact, 0.0)
    there = torch.tensor([[int(latest[s, j]) >= 0 for s in range(slots)] for j in range(drafts)])
    # A rounding of each of the two numbers, of size 6 at most, and one of their difference.
    bound = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(errors[:, there], exact[:, there], rtol=bound, atol=bound)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_the_image_before_are_dropped(backend):
    a = on(keeping(), backend[1])
    keep_rows(a, backend[0])
    steps = torch.tensor([0, 2, 9, 5], device=backend[1])
    found = FindArguments(a.at, steps, a.at.new_zeros(4, 3), steps.clone(), steps.clone())
    find_rows(found, backend[0])
    assert (found.at[0] == -1).all()
    assert found.ahead.tolist() == [0, 0, 0, 1]
    assert (found.places[0] == -1).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("active", [None, [0, 2]])
@pytest.mark.parametrize("branches", [1, 2])
def test_rows_of_a_draft(branches, active, backend):
    states, timesteps = normals(3, 4, 2, 5, 7, seed=0), torch.arange(12).view(3, 4)
    chosen = [0, 1, 2] if active is None else active
    a = RowArguments(states, timesteps, 2, branches, None if active is None else torch.tensor(active))
    state, t = (part.cpu() for part in draft_rows(on(a, backend[1]), backend[0]))
    assert torch.equal(state, torch.cat([states[chosen, 2]] * branches))
    assert t.tolist() == [4 * slot + 2 for slot in chosen] * branches


@pytest.mark.parametrize("backend", BACKENDS)
def test_slots_are_renewed(backend):
    numbers = torch.tensor([10, 11, 12, 13])
    steps, images = torch.tensor([3, 0, 7, 20]), torch.tensor([2, 3, 0, -1])
    a = on(RenewArguments(steps, images, numbers, torch.zeros_like(steps), torch.tensor([5, 6, 7, 8])), backend[1])
    fresh = renew_slots(a, backend[0])
    assert fresh.tolist() == [False, True, False, False]
    assert a.indices.tolist() == [12, 13, 10, 10]
    assert a.rounds.tolist() == [6, 0, 8, 9]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"states": torch.zeros(3, 5)}, r"advance_drafts: states must "),
        (
            {"mean": torch.zeros(3, 4, 1, 3, 3)},
            r"advance_drafts: mean must be float32 \[S, L - 1, C, H, W\] = \[3, 4, 2",
        ),
        ({"columns": torch.zeros(3, 5, 7)}, r"advance_drafts: columns must be float32 \[S, L, 8\] = \[3, 5, 8\]"),
        ({"output": torch.zeros(11, 3, 3, 3)}, r"advance_drafts: output must be \[B R, C or 2 C, H, W\]"),
        ({"end": 5}, r"advance_drafts: first and end must be in order in \[0, 4\], got \(1, 5\)"),
    ],
)
def test_wrong_arguments(change, message, backend):
    a = on(drafting()._replace(**change), backend[1])
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
        api.ADVANCE(a, a.states, backend[0])


@pytest.mark.parametrize("backend", [REFERENCE, EXTENSION])
def test_rows_beyond_the_output(backend):
    a = drafting()
    a.rows[0, 1] = HELD
    with pytest.raises((ValueError, RuntimeError, IndexError), match=r"rows.* must be below 11, got 11"):
        api.ADVANCE(a, a.states, backend[0])


@pytest.mark.parametrize("backend", [EXTENSION])
def test_steps_before_the_first_are_refused(backend):
    """Where a row goes is a remainder of its step."""
    a = keeping()
    with pytest.raises(ValueError, match=r"keep_rows: steps\[1\] must be at least 0 .*, got -3"):
        keep_rows(a._replace(steps=torch.tensor([0, -3, 2, 5])), backend[0])
    one = torch.ones(1, dtype=torch.int64)
    tally = TallyArguments(
        torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2), torch.zeros(1, 1), one, 2 * one, -one, None
    )
    with pytest.raises(ValueError, match=r"tally_round: steps\[0\] must be at least 0 .*, got -1"):
        tally_round(tally._replace(deviation=torch.zeros(3)), backend[0])
    with pytest.raises(ValueError, match=r"tally_round: deviation must be of at least 1 step"):
        tally_round(tally._replace(deviation=torch.zeros(0)), backend[0])
    with pytest.raises(TypeError, match="tally_round: next_states must be float32"):
        tally_round(tally._replace(deviation=torch.zeros(3), next_states=torch.zeros(1, 1, 2, 2).half()), backend[0])


@pytest.mark.parametrize("backend", [EXTENSION])
def test_rows_so_far_off_that_a_sum_wraps_around(backend):
    a = keeping()
    with pytest.raises(ValueError, match="keep_rows: row_offsets must give slot 0 at least 4 of the 11 rows"):
        keep_rows(a._replace(row_offsets=torch.full_like(a.row_offsets, 2**63 - 1)), backend[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_that_is_not_there_needs_one_that_is(backend):
    """With no row held there is none to stand for those that are not; without further rows none is needed."""
    none, nothing = torch.zeros(1, 0, 2, 3), torch.zeros(0, 1, 1, 1)
    state, t, missing = torch.zeros(1, 1, 1, 1), torch.zeros(1, dtype=torch.int64), torch.tensor([[-1]])
    shared = (torch.zeros(1, 2, 3), state, state, t, t, nothing, none, missing[0], missing, torch.zeros(1, 1).long(), t)
    drafted = torch.zeros(2, 2, 3)
    chosen = torch.zeros(0, dtype=torch.int64)
    join, errors = JoinArguments(*shared, 1, None, None), ErrorArguments(drafted, none, missing, 1, 1, None)
    with pytest.raises(ValueError, match="^join_rows: features must"):
        join_rows(on(join, backend[1]), backend[0])
    with pytest.raises(ValueError, match="^row_errors: features must"):
        row_errors(on(errors, backend[1]), backend[0])
    join, errors = join._replace(chosen=chosen), errors._replace(drafted=drafted[:1], chosen=chosen)
    assert [len(part) for part in join_rows(on(join, backend[1]), backend[0])] == [1] * 5
    assert row_errors(on(errors, backend[1]), backend[0]).abs().sum() == 0
