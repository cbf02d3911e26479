"""Clean samples of rows and drafts that are made of them: every backend against plain float64 formulas."""

from __future__ import annotations

import math

import pytest
import torch
from test_drafting import BACKENDS, needs_extension, normals
from torch import Tensor

from free_kernels import DDPMSchedule
from free_kernels.ops.drafting import (
    FindArguments,
    KeepCleanArguments,
    ReplayArguments,
    find_rows,
    keep_clean_rows,
    replay_drafts,
)

SLOTS, LENGTH, CHANNELS, STEPS, PLACES = 4, 5, 2, 12, 7
NONE = -1


def on(arguments, device: torch.device):
    """A copy of the arguments on a device."""
    return type(arguments)(*(part.to(device, copy=True) if isinstance(part, Tensor) else part for part in arguments))


def coefficients() -> Tensor:
    """A table whose deviations are about a half."""
    table = 0.5 * normals(STEPS, 8, seed=1)
    table[:, 2] = -1.0
    return table


def replaying(*, learned: bool = False, clip: float = math.inf, side: int = 3, width: int = 3) -> ReplayArguments:
    """Slots whose steps ahead have rows, or not all; the last slot has none, not even the row before."""
    latent, held = (CHANNELS, side, side), 11
    outputs = CHANNELS * (2 if learned else 1)
    latest = torch.tensor([[7, 0, 1], [8, NONE, NONE], [NONE] * 3, [NONE] * 3])[:, :width]
    # A row that is not used may hold anything.
    states, clean = normals(held, *latent, seed=2), normals(held, outputs, side, side, seed=3)
    states[2] = clean[2] = math.nan
    return ReplayArguments(
        normals(SLOTS, LENGTH, *latent, seed=4),
        normals(SLOTS, LENGTH - 1, *latent, seed=5),
        normals(SLOTS, LENGTH - 1, *latent, seed=6),
        normals(SLOTS, LENGTH, *latent, seed=7),
        coefficients(),
        # Rows behind the chain's end have the coefficients of the last step.
        torch.tensor([3, 1, STEPS - 2, 0]),
        states,
        clean,
        latest.contiguous(),
        torch.tensor([10, 9, 5, NONE]),
        # The elements' shares are 0.6, none, more than 1 and what a slot without a row before does not ask for.
        torch.tensor(
            [
                [[1.5, 2.0], [3.0, 1.5], [0.3, 0.5]],
                [[-1.0, 2.0], [0.0, 0.0], [0.0, 0.0]],
                [[0.6, 1.0], [-2.0, 1.0], [3.0, 0.5]],
                [[0.8, 1.0], [0.9, 1.0], [1.0, 1.0]],
            ]
        ),
        pattern(*latent, seed=8),
        clip,
    )


def pattern(*latent: int, seed: int) -> Tensor:
    """Sums of single elements: products of any sign, and squares."""
    sums = normals(SLOTS, 2, *latent, seed=seed)
    sums[:, 1].abs_()
    return sums


def average(sums: Tensor) -> float:
    """What a pair of sums holds, at least 0."""
    total, weight = sums.tolist()
    return max(0.0, total / weight) if weight else 0.0


def own(sums: Tensor, mean: float) -> Tensor:
    """The responses of single elements."""
    along, length = sums.double()
    return ((along + mean) / (length + 1)).clamp(min=0)


def exact_replay(a: ReplayArguments) -> ReplayArguments:
    """The drafts in float64, one slot and one step after the other."""
    states, mean, std = (buffer.double().clone() for buffer in (a.states, a.mean, a.std))
    held_states, held_clean, table = a.held_states.double(), a.held_clean.double(), a.table.double()
    for slot in range(SLOTS):
        step, before = int(a.steps[slot]), int(a.before[slot])
        to_new = to_other = torch.zeros_like(states[slot, 0])
        if before >= 0:
            to_any, share = average(a.response[slot, 0]), min(average(a.response[slot, 2]), 1.0)
            to_new = to_any + share * (own(a.pattern[slot], to_any) - to_any)
            to_other = average(a.response[slot, 1]) if a.response[slot, 1, 1] else to_any
            known = held_clean[before].clone()
            there = table[step - 1, 6] * known[:CHANNELS] + table[step - 1, 7] * held_states[before]
        else:
            known, there = torch.zeros_like(held_clean[0]), states[slot, 0].clone()
        for j in range(LENGTH - 1):
            state, response = states[slot, j], to_new
            row = int(a.latest[slot, j]) if j < a.latest.shape[1] else NONE
            if row >= 0:
                known, there, response = held_clean[row], held_states[row], to_other
            _, _, log_std, slope, unit, _, from_clean, from_state = table[min(step + j, STEPS - 1)]
            moves = response * (unit if unit > 0 else 1.0)
            clean = (known[:CHANNELS] + moves * (state - there)).clamp(-a.clip, a.clip)
            known = torch.cat([clean, known[CHANNELS:]])
            there = from_clean * clean + from_state * state
            variance = known[CHANNELS:] if len(known) > CHANNELS else torch.zeros_like(state)
            mean[slot, j], std[slot, j] = there, (log_std + slope * variance).exp()
            states[slot, j + 1] = there + std[slot, j] * a.noise[slot, j].double()
    return a._replace(states=states, mean=mean, std=std)


CASES = {
    "fixed": {},
    "learned": {"learned": True},
    "clipped": {"clip": 0.4, "learned": True},
    "large": {"side": 40},
    "no rows ahead": {"width": 0},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_drafts_are_those_of_the_formulas(case, backend):
    a = replaying(**CASES[case])
    want, got = exact_replay(a), on(a, backend[1])
    replay_drafts(got, backend[0])
    # A state is a sum of a few products of numbers of size 10 at most, and so is each state that it is made from; a
    # share is a quotient of two sums, whose relative error is a few units too.
    bound = 1e3 * torch.finfo(torch.float32).eps
    for name in ("states", "mean", "std"):
        torch.testing.assert_close(getattr(got, name).cpu().double(), getattr(want, name), rtol=bound, atol=bound)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("spread", [0.3, 2.0, "of each element"])
def test_drafts_of_gaussian_data(spread, backend):
    """Where the data are Gaussian with independent elements the first draft has no gap, those behind it a small one."""
    table = DDPMSchedule(40).table("fixed_small")
    if isinstance(spread, str):
        spread = torch.linspace(0.3, 2.0, 16, dtype=torch.float64).view(1, 4, 4)
    # The clean sample that an ideal target predicts from x = a x0 + s e.
    alpha = 1 / table[:, 4].double().square().view(-1, 1, 1, 1)
    gain = alpha.sqrt() * spread / (alpha * spread + 1 - alpha)
    step, length = 20, 6
    state = normals(1, 1, 4, 4, seed=0)
    before = (state * gain[step - 1], state)
    noise = normals(1, length, 1, 4, 4, seed=1)
    mean = table[step - 1, 6] * before[0] + table[step - 1, 7] * state
    first = (mean + table[step - 1, 2].exp() * normals(1, 1, 4, 4, seed=2)).float()
    answers = (gain[step] / table[step, 4]).float().expand(1, 4, 4)
    given = ReplayArguments(
        torch.cat([first.unsqueeze(1), torch.zeros(1, length - 1, 1, 4, 4)], 1),
        torch.zeros(1, length - 1, 1, 4, 4),
        torch.zeros(1, length - 1, 1, 4, 4),
        noise,
        table,
        torch.tensor([step]),
        state,
        before[0].float(),
        torch.empty(1, 0, dtype=torch.int64),
        torch.tensor([0]),
        # So many steps say what each element answers that the average does not count.
        torch.tensor([[[0.0, 1.0], [0.0, 0.0], [1.0, 1.0]]]),
        torch.stack([answers * 1e7, torch.full((1, 4, 4), 1e7)]).unsqueeze(0),
        math.inf,
    )
    given = on(given, backend[1])
    replay_drafts(given, backend[0])
    given = on(given, torch.device("cpu"))
    want = table[step, 6] * gain[step] * first + table[step, 7] * first
    torch.testing.assert_close(given.mean[:, 0].double(), want, rtol=1e-5, atol=1e-5)
    # Behind it the drafts stay nearer to the target's means than those that repeat the first clean sample.
    for j in range(1, length - 1):
        x, k = given.states[:, j].double(), step + j
        exact = table[k, 6] * gain[k] * x + table[k, 7] * x
        repeated = table[k, 6] * gain[step] * first + table[k, 7] * x
        assert (given.mean[:, j] - exact).norm() < (repeated - exact).norm()


def keeping(*, learned: bool = False, guidance: float = 1.0, guided: int = CHANNELS, **more) -> KeepCleanArguments:
    """Rounds of 5, 2, 0 and 3 rows; a slot at its first step, without a row before, one with an old row of its step."""
    clip, dtype, side = more.get("clip", math.inf), more.get("dtype", torch.float32), more.get("side", 3)
    places = more.get("places", PLACES)
    lengths = torch.tensor([5, 2, 0, 3])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    packed, branches, outputs = int(offsets[-1]) + 1, 1 if guidance == 1.0 else 2, CHANNELS * (2 if learned else 1)
    rows, steps, at = (SLOTS, places), torch.tensor([6, 0, 9, 3]), torch.full((SLOTS, places), NONE)
    # Where the row of the step before is, among all.
    before = torch.arange(SLOTS) * places + (steps - 1) % (places - 1)
    before[1] = NONE
    # Slots 0 and 3 commit steps 6 and 3 to 4. Slot 1's are of its last image's end.
    at[0, 6 % (places - 1)], at[3, 4 % (places - 1)], at[1, 1 % (places - 1)] = 6, 4, 7
    return KeepCleanArguments(
        normals(SLOTS, LENGTH, CHANNELS, side, side, seed=1),
        normals(branches * packed, outputs, side, side, seed=3).to(dtype),
        offsets,
        torch.tensor(more.get("committed", [1, 2, 0, 2])),
        lengths,
        steps,
        coefficients(),
        before,
        at,
        normals(*rows, CHANNELS, side, side, seed=7),
        normals(*rows, outputs, side, side, seed=8),
        torch.tensor(
            [
                [[3.0, 2.0], [1.0, 2.0], [0.4, 0.5]],
                [[5.0, 1.0], [4.0, 1.0], [3.0, 2.0]],
                [[7.0, 1.0], [2.0, 1.0], [1.0, 1.0]],
                [[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]],
            ]
        ),
        pattern(CHANNELS, side, side, seed=9),
        guidance,
        guided,
        clip,
    )


def exact_clean(a: KeepCleanArguments, slot: int, j: int) -> Tensor:
    """Clean sample and variances of a row, float64."""
    row, said = int(a.row_offsets[slot]) + j, a.output.double()
    here = said[row].clone()
    if a.guidance_scale != 1.0:
        other, guided = said[len(said) // 2 + row], slice(0, a.guidance_channels)
        here[guided] = other[guided] + a.guidance_scale * (here[guided] - other[guided])
    column = a.table[min(int(a.steps[slot]) + j, STEPS - 1)].double()
    clean = column[4] * a.states[slot, j].double() + column[5] * here[:CHANNELS]
    return torch.cat([clean.clamp(-a.clip, a.clip), here[CHANNELS:]])


def exact_responses(a: KeepCleanArguments, slot: int) -> tuple[Tensor, Tensor]:
    """A slot's sums after the round and those of its elements, float64."""
    sums, elements = a.response[slot].double(), a.pattern[slot].double()
    first, done = int(a.steps[slot]), int(a.committed[slot])
    if first == 0 and done:
        sums, elements = torch.zeros_like(sums), torch.zeros_like(elements)
    mean = average(sums[0])
    apart = own(elements, mean) - mean

    def held(row: int) -> tuple[Tensor, Tensor]:
        return tuple(part.double().flatten(0, 1)[row, :CHANNELS] for part in (a.held_states, a.held_clean))

    for j in range(done):
        step = first + j
        state, clean = a.states[slot, j].double(), exact_clean(a, slot, j)[:CHANNELS]
        unit = float(a.table[min(step, STEPS - 1), 4])
        unit = unit if unit > 0 else 1.0
        places = a.at.shape[1]
        place = step % (places - 1)
        if a.at[slot, place] == step:
            there, known = held(slot * places + place)
            moved, changed = state - there, (clean - known) / unit
            sums[1] = 0.7 * sums[1] + torch.stack([(moved * changed).sum() / moved.square().sum(), torch.tensor(1.0)])
        if not j and a.before[slot] < 0:
            continue
        there, known = held(int(a.before[slot]))
        if j:
            there, known = a.states[slot, j - 1].double(), exact_clean(a, slot, j - 1)[:CHANNELS]
        column = a.table[min(step - 1, STEPS - 1)].double()
        moved, changed = state - column[6] * known - column[7] * there, (clean - known) / unit
        length = moved.square().sum()
        sums[0] = 0.7 * sums[0] + torch.stack([(moved * changed).sum() / length, torch.tensor(1.0)])
        gap = apart * moved
        sums[2] = 0.9 * sums[2] + torch.stack([(gap * (changed - mean * moved)).sum(), gap.square().sum()]) / length
        products = torch.stack([moved * changed, moved.square()])
        elements = 0.9 * elements + products / moved.square().mean()
    return sums, elements


KEPT = {
    "fixed": {},
    "learned": {"learned": True},
    "clipped": {"clip": 0.4},
    "guided": {"guidance": 2.5},
    "guided below one half": {"guidance": 0.3, "learned": True},
    "guided in part": {"guidance": 2.5, "guided": 1, "learned": True, "clip": 0.4},
    "bfloat16": {"dtype": torch.bfloat16, "learned": True},
    "float16": {"dtype": torch.float16},
    "large": {"side": 40},
    # Rows are kept where the row of the step before was.
    "three places": {"places": 4, "committed": [4, 2, 0, 3]},
    "two places": {"places": 3, "committed": [5, 2, 0, 2], "learned": True},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", KEPT)
def test_rows_are_kept_with_their_clean_samples(case, backend):
    a = keeping(**KEPT[case])
    got = on(a, backend[1])
    keep_clean_rows(got, backend[0])
    got = on(got, torch.device("cpu"))
    eps, rows = torch.finfo(torch.float32).eps, a.at.shape[1] - 1
    for slot, done in enumerate(a.committed.tolist()):
        length = int(a.lengths[slot])
        taken = range(max(done - 1, 0), min(length, done + rows - 2))
        for place in range(rows):
            j = next((j for j in taken if (int(a.steps[slot]) + j) % rows == place), None)
            if j is None:
                assert got.at[slot, place] == a.at[slot, place]
                assert torch.equal(got.held_states[slot, place], a.held_states[slot, place])
                continue
            assert got.at[slot, place] == int(a.steps[slot]) + j
            assert torch.equal(got.held_states[slot, place], a.states[slot, j])
            clean = got.held_clean[slot, place].double()
            torch.testing.assert_close(clean, exact_clean(a, slot, j), rtol=10 * eps, atol=50 * eps)
        # A ratio of two sums of products whose factors are differences of numbers of size 10.
        for name, want in zip(("response", "pattern"), exact_responses(a, slot), strict=True):
            torch.testing.assert_close(getattr(got, name)[slot].double(), want, rtol=1e4 * eps, atol=1e4 * eps)
    assert torch.equal(got.response[2], a.response[2])
    assert torch.equal(got.pattern[2], a.pattern[2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_which_steps_are_measured(backend):
    """Slots 0 and 3 both kinds, slot 3 twice to new noise; slot 1 has no row before and no old one, slot 2 none."""
    got = on(keeping(), backend[1])
    keep_clean_rows(got, backend[0])
    weights = torch.tensor([[2.4, 2.4], [1.0, 0.0], [1.0, 1.0], [1.7, 1.0]])
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(got.response[:, :2, 1].cpu(), weights, rtol=4 * eps, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("clip", [math.inf, 0.4])
def test_a_row_that_is_not_finite_is_not_used(clip, backend):
    """An infinity would be clipped away; neither it nor a NaN of the variances gets into the memory."""
    a = keeping(learned=True, clip=clip)
    a.output[2, 0, 1, 1] = math.inf
    a.output[3, CHANNELS, 0, 0] = math.nan
    got = on(a, backend[1])
    keep_clean_rows(got, backend[0])
    assert sorted(got.at[0].tolist()) == sorted([-1] * (PLACES - 3) + [6, 7, 10])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_state_that_did_not_move_says_nothing(backend):
    """Steps without noise put the state where the mean was."""
    a = keeping()._replace(committed=torch.tensor([2, 2, 0, 2]), table=torch.zeros(STEPS, 8))
    a.states[0, :2] = 0.0
    # Nor does an old row at the same state.
    a.at[0, 6 % (PLACES - 1)] = NONE
    a.at[0, 7 % (PLACES - 1)], a.held_states[0, 7 % (PLACES - 1)] = 7, 0.0
    got = on(a, backend[1])
    keep_clean_rows(got, backend[0])
    assert torch.equal(got.response[0], a.response[0].to(backend[1]))
    assert torch.equal(got.pattern[0], a.pattern[0].to(backend[1]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("size", "clip"), [(1e-21, math.inf), (1e-25, math.inf), (1e25, math.inf), (1e22, 0.4)])
def test_moves_whose_squares_are_no_floats_say_nothing(size, clip, backend):
    """Squares that are subnormal or zero, or infinite where the clean sample is bounded or not."""
    a = keeping(clip=clip)
    for part in (a.states, a.output, a.held_states, a.held_clean):
        part.mul_(size)
    got = on(a, backend[1])
    keep_clean_rows(got, backend[0])
    # Slot 1 has a new image.
    for name in ("response", "pattern"):
        want = getattr(a, name).clone()
        want[1] = 0.0
        assert torch.equal(getattr(got, name).cpu(), want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_slot_without_a_row_before_asks_for_no_response(backend):
    """What the slot's last image left is not read, whatever it is."""
    a = replaying()
    a.response[3] = a.pattern[3] = math.nan
    got = on(a, backend[1])
    replay_drafts(got, backend[0])
    assert got.states.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_elements_that_answer_apart_are_found(backend):
    """Half of the elements do not answer at all: their own responses fit better than the average, and wholly."""
    side, rounds, answer = 4, 6, torch.zeros(CHANNELS, 4, 4)
    answer[0] = 0.5
    table = torch.zeros(STEPS, 8)
    # The clean sample is the output, and the mean the state.
    table[:, 5] = table[:, 7] = 1.0
    places = PLACES - 1
    a = keeping(side=side)._replace(table=table, response=torch.zeros(SLOTS, 3, 2))
    a = a._replace(
        pattern=torch.zeros_like(a.pattern), at=torch.full_like(a.at, NONE), before=torch.full((SLOTS,), NONE)
    )
    a = a._replace(lengths=torch.full((SLOTS,), LENGTH), committed=torch.full((SLOTS,), LENGTH))
    a = a._replace(row_offsets=torch.arange(SLOTS + 1) * LENGTH)
    state = torch.zeros(SLOTS, CHANNELS, side, side)
    for number in range(rounds):
        moves = normals(SLOTS, LENGTH, CHANNELS, side, side, seed=number).cumsum(1)
        states = state.unsqueeze(1) + moves
        a = a._replace(
            states=states, output=(answer * states).flatten(0, 1), steps=torch.full((SLOTS,), 1 + number * LENGTH)
        )
        got = on(a, backend[1])
        keep_clean_rows(got, backend[0])
        a = on(got, torch.device("cpu"))
        state = states[:, -1]
        a = a._replace(before=torch.arange(SLOTS) * PLACES + (number + 1) * LENGTH % places)
    mean, share = (average(a.response[0, which]) for which in (0, 2))
    assert 0.15 < mean < 0.35
    assert share > 0.95
    apart = mean + share * (own(a.pattern[0], mean) - mean)
    assert (apart - answer).norm() < 0.3 * (mean - answer).norm()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_row_before_is_found(backend):
    """Not at an image's first step, and not where steps lie between."""
    at, rows = torch.full((3, PLACES), -1), PLACES - 1
    at[0, 6 % rows], at[1, 6 % rows], at[2, 3] = 6, 5, 8
    steps = torch.tensor([7, 7, 0])
    a = FindArguments(at, steps, torch.zeros(3, rows - 1, dtype=torch.int64), steps.clone(), steps.clone())
    a = on(a, backend[1])
    find_rows(a, backend[0])
    assert a.before.tolist() == [6 % rows, -1, -1]
    assert a.at[2].eq(-1).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"states": torch.zeros(3, 5)}, r"replay_drafts: states must "),
        ({"table": torch.zeros(12, 7)}, r"replay_drafts: table must be float32 \[K, 8\]"),
        ({"held_clean": torch.zeros(11, 3, 3, 3)}, r"replay_drafts: held_clean must "),
        ({"before": torch.zeros(3, dtype=torch.int64)}, r"replay_drafts: before must be int64 \[S\] = \[4\]"),
        ({"response": torch.zeros(4, 3)}, r"replay_drafts: response must be float32 \[S, 3, 2\] = \[4, 3, 2\]"),
        ({"pattern": torch.zeros(4, 2, 2, 3)}, r"replay_drafts: pattern must be float32 \[S, 2, C, H, W\]"),
    ],
)
def test_wrong_arguments_of_a_replay(change, message, backend):
    a = on(replaying()._replace(**change), backend[1])
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
        replay_drafts(a, backend[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output": torch.zeros(11, 3, 3, 3)}, r"keep_clean_rows: output must "),
        ({"at": torch.zeros(3, 7, dtype=torch.int64)}, r"keep_clean_rows: at must be int64 \[S, M \+ 1\]"),
        ({"held_clean": torch.zeros(4, 7, 4, 3, 3)}, r"keep_clean_rows: held_clean must "),
        ({"response": torch.zeros(4)}, r"keep_clean_rows: response must be float32 \[S, 3, 2\]"),
        ({"pattern": torch.zeros(4, 2, 2, 3)}, r"keep_clean_rows: pattern must be float32 \[S, 2, C, H, W\]"),
    ],
)
def test_wrong_arguments_of_keeping(change, message, backend):
    a = on(keeping()._replace(**change), backend[1])
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
        keep_clean_rows(a, backend[0])


@needs_extension
def test_rows_so_far_off_that_a_sum_wraps_around():
    a = keeping()
    with pytest.raises(ValueError, match="keep_clean_rows: row_offsets must give slot 0 at least"):
        keep_clean_rows(a._replace(row_offsets=torch.full_like(a.row_offsets, 2**63 - 1)), "extension")


@needs_extension
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"committed": torch.tensor([6, 2, 0, 2])}, "committed and lengths must be in order"),
        ({"row_offsets": torch.tensor([8, 5, 7, 7, 10])}, "row_offsets must give slot 0 at least 5 of the 11 rows"),
        ({"before": torch.tensor([28, -1, 0, 0])}, "before must be below 28, got 28"),
    ],
)
def test_numbers_beyond_their_tensors(change, message):
    with pytest.raises(ValueError, match=f"keep_clean_rows: {message}"):
        keep_clean_rows(keeping()._replace(**change), "extension")


@needs_extension
@pytest.mark.parametrize("name", ["latest", "before"])
def test_rows_beyond_those_that_are_held(name):
    a = replaying()
    getattr(a, name).view(-1)[0] = 11
    with pytest.raises(ValueError, match=f"replay_drafts: {name} must be below 11, got 11"):
        replay_drafts(a, "extension")


@needs_extension
@pytest.mark.parametrize("threads", [1, 2])
def test_threads_share_slots(threads):
    """Many slots, so that there is work for several threads; what they make does not depend on how it is shared."""
    one = replaying(side=40)
    many = one._replace(
        **{
            name: getattr(one, name).repeat(8, *[1] * (getattr(one, name).ndim - 1))
            for name in ("states", "mean", "std", "noise", "steps", "latest", "before", "response", "pattern")
        }
    )
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        replay_drafts(many, "extension")
    finally:
        torch.set_num_threads(before)
    replay_drafts(one, "extension")
    for name in ("states", "mean", "std"):
        assert torch.equal(
            getattr(many, name).unflatten(0, (8, -1)), getattr(one, name).expand(8, *getattr(one, name).shape)
        )
