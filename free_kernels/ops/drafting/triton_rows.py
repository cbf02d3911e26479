"""The kernels of refused rows: keeping and finding them, and what a drafter's corrections take from them."""

from __future__ import annotations

import triton
import triton.language as tl

from free_kernels.ops.triton_masks import where_also


@triton.jit
def _copy(p_from, p_to, size, BLOCK: tl.constexpr):
    """Copy ``size`` elements; returns how many of them are not finite."""
    b_wrong = tl.zeros([BLOCK], tl.int32)
    for i in range(0, size, BLOCK):
        o = i + tl.arange(0, BLOCK)
        mask = o < size
        b_row = tl.load(p_from + o, mask=mask, other=0.0)
        tl.store(p_to + o, b_row, mask=mask)
        # Written so that a NaN counts.
        b_wrong += tl.where(tl.abs(b_row.to(tl.float32)) < float("inf"), 0, 1)
    return tl.sum(b_wrong, 0)


@triton.jit
def _count_wrong(p_from, size, BLOCK: tl.constexpr):
    """How many of ``size`` elements are not finite."""
    b_wrong = tl.zeros([BLOCK], tl.int32)
    for i in range(0, size, BLOCK):
        o = i + tl.arange(0, BLOCK)
        b_row = tl.load(p_from + o, mask=o < size, other=0.0)
        b_wrong += tl.where(tl.abs(b_row.to(tl.float32)) < float("inf"), 0, 1)
    return tl.sum(b_wrong, 0)


@triton.jit(do_not_specialize=["length", "slots", "places", "packed"])
def keep_kernel(
    p_states, p_features, p_output, p_row_offsets, p_committed, p_lengths, p_steps, p_at, p_held_states,
    p_held_features, length, slots, places, packed, numel, feature_numel, output_numel,
    BRANCHES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Keep one row of one slot."""
    i_slot, j = tl.program_id(0) // length, tl.program_id(0) % length
    committed, rows = tl.load(p_committed + i_slot), places - 1
    behind = j - committed
    if (behind >= -1) & (behind < rows - 1) & (j < tl.load(p_lengths + i_slot)):
        packed_row = tl.load(p_row_offsets + i_slot) + j
        step = tl.load(p_steps + i_slot) + j
        index = i_slot.to(tl.int64) * places + step % rows
        _copy(p_states + (i_slot.to(tl.int64) * length + j) * numel, p_held_states + index * numel, numel, BLOCK)
        wrong = 0
        for branch in tl.static_range(BRANCHES):
            from_row = packed_row + branch * packed
            to_row = index + branch * slots * places
            wrong += _copy(
                p_features + from_row * feature_numel, p_held_features + to_row * feature_numel, feature_numel, BLOCK
            )
            wrong += _count_wrong(p_output + from_row * output_numel, output_numel, BLOCK)
        tl.store(p_at + index, tl.where(wrong == 0, step, -1))


@triton.jit(do_not_specialize=["places", "width"])
def find_kernel(p_at, p_steps, p_places, p_before, p_ahead, places, width, ENTRIES: tl.constexpr):
    """Rows of the steps ahead of one slot."""
    i_slot = tl.program_id(0).to(tl.int64)
    rows, p_own = places - 1, p_at + i_slot * places
    o = tl.arange(0, ENTRIES)
    mask = o < width
    first = tl.load(p_steps + i_slot)
    place = (first + o) % rows
    b_there = tl.load(p_own + place, mask=mask, other=-2) == first + o
    last = (first - 1 + rows) % rows
    is_before = (first > 0) & (tl.load(p_own + last) == first - 1)
    if first == 0:
        # The rows of the image before.
        tl.store(p_own + o, tl.full([ENTRIES], -1, tl.int64), mask=o < places)
        b_there = o < 0
    ahead = tl.min(tl.where(mask & b_there, width, tl.minimum(o, width)), 0)
    tl.store(p_ahead + i_slot, ahead.to(tl.int64))
    tl.store(p_before + i_slot, tl.where(is_before, i_slot * places + last, -1))
    tl.store(p_places + i_slot * width + o, tl.where(o < ahead, i_slot * places + place, -1), mask=mask)


@triton.jit(do_not_specialize=["rows", "slots", "drafts", "draft", "width"])
def correct_kernel(
    p_drafted, p_errors, p_state, p_previous, p_asked, p_latest, p_active, p_out, rows, slots, drafts, draft, width,
    state_numel, numel,
    BRANCHES: tl.constexpr, STATE_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of one row's feature, of all branches; every program of a row measures its distances."""
    blocks = tl.cdiv(numel, BLOCK)
    i_row = (tl.program_id(0) // blocks).to(tl.int64)
    o = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    slot = i_row
    if p_active is not None:
        slot = tl.load(p_active + i_row)
    place = tl.load(p_latest + slot * width + draft)
    known = place >= 0
    b_apart, b_step = tl.zeros([STATE_BLOCK], tl.float32), tl.zeros([STATE_BLOCK], tl.float32)
    for i in range(0, state_numel, STATE_BLOCK):
        o_state = i + tl.arange(0, STATE_BLOCK)
        used = where_also(o_state < state_numel, known)
        b_state = tl.load(p_state + i_row * state_numel + o_state, mask=used, other=0.0)
        b_there = tl.load(p_asked + tl.maximum(place, 0) * state_numel + o_state, mask=used, other=0.0)
        b_before = tl.load(p_previous + i_row * state_numel + o_state, mask=used, other=0.0)
        b_apart += (b_state - b_there) * (b_state - b_there)
        b_step += (b_state - b_before) * (b_state - b_before)
    serves = known & (tl.sum(b_apart, 0) < tl.sum(b_step, 0))
    for branch in tl.static_range(BRANCHES):
        place_of_row = (branch * rows + i_row) * numel + o
        p_error = p_errors + ((branch * drafts + draft) * slots + slot) * numel + o
        b_drafted = tl.load(p_drafted + place_of_row, mask=o < numel, other=0.0)
        b_error = tl.load(p_error, mask=where_also(o < numel, serves), other=0.0)
        b_both = (b_drafted.to(tl.float32) + b_error.to(tl.float32)).to(b_drafted.dtype)
        tl.store(p_out + place_of_row, tl.where(serves, b_both, b_drafted), mask=o < numel)


@triton.jit
def _further(p_before, p_latest, number, slots, width):
    """Slot and draft of a further row, its place and that of the row before; a row that is not there may be any."""
    slot, draft = number % slots, number // slots
    p_own = p_latest + slot * width + draft
    now = tl.load(p_own)
    past = tl.load(p_before + slot, mask=draft == 0, other=0) + tl.load(p_own - 1, mask=draft > 0, other=0)
    return slot, draft, tl.maximum(now, 0), tl.maximum(past, 0)


# Places of rows may begin anywhere in a buffer.
@triton.jit(
    do_not_specialize=["inputs", "count", "slots", "held", "width", "length", "null_label"],
    do_not_specialize_on_alignment=["p_latest", "p_t", "p_y"],
)
def join_kernel(
    p_feature, p_previous, p_state, p_t, p_y, p_asked, p_features, p_before, p_latest, p_timesteps, p_labels, p_chosen,
    p_out_feature, p_out_previous, p_out_state, p_out_t, p_out_y, inputs, count, slots, held, width, length, null_label,
    state_numel, numel, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of one row's feature and of its states; the first program of a row has its timestep and label, too."""
    blocks = tl.cdiv(tl.maximum(numel, state_numel), BLOCK)
    i_row, i_block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    o = i_block * BLOCK + tl.arange(0, BLOCK)
    given = i_row < inputs
    # Of a given row these are those of the first further one, and are not used.
    i_further = tl.maximum(i_row - inputs, 0)
    branch, number = i_further // count, i_further % count
    if p_chosen is not None:
        number = tl.load(p_chosen + number)
    slot, draft, now, past = _further(p_before, p_latest, number, slots, width)
    is_state, is_feature = o < state_numel, o < numel
    b_previous = tl.load(p_previous + i_row * state_numel + o, mask=where_also(is_state, given), other=0.0)
    b_previous += tl.load(p_asked + past * state_numel + o, mask=where_also(is_state, i_row >= inputs), other=0.0)
    tl.store(p_out_previous + i_row * state_numel + o, b_previous, mask=is_state)
    b_state = tl.load(p_state + i_row * state_numel + o, mask=where_also(is_state, given), other=0.0)
    b_state += tl.load(p_asked + now * state_numel + o, mask=where_also(is_state, i_row >= inputs), other=0.0)
    tl.store(p_out_state + i_row * state_numel + o, b_state, mask=is_state)
    b_feature = tl.load(p_feature + i_row * numel + o, mask=where_also(is_feature, given), other=0.0)
    p_held = p_features + (branch * held + past) * numel + o
    b_held = tl.load(p_held, mask=where_also(is_feature, i_row >= inputs), other=0.0)
    b_feature = tl.where(given, b_feature, b_held.to(tl.float32).to(b_feature.dtype))
    tl.store(p_out_feature + i_row * numel + o, b_feature, mask=is_feature)
    if i_block == 0:
        t = tl.load(p_t + i_row, mask=given, other=0)
        t += tl.load(p_timesteps + slot * length + draft, mask=i_row >= inputs, other=0)
        tl.store(p_out_t + i_row, t)
        label = tl.where(branch == 0, tl.load(p_labels + slot), null_label)
        tl.store(p_out_y + i_row, tl.where(given, tl.load(p_y + i_row, mask=given, other=0), label))


@triton.jit(
    do_not_specialize=["inputs", "count", "numbers", "slots", "held", "width"],
    do_not_specialize_on_alignment=["p_latest"],
)
def errors_kernel(
    p_drafted, p_features, p_latest, p_chosen, p_out, inputs, count, numbers, slots, held, width, numel,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of one row's error. Where rows are chosen the others' have been set to 0."""
    blocks = tl.cdiv(numel, BLOCK)
    i_row = (tl.program_id(0) // blocks).to(tl.int64)
    o = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    branch, number = i_row // count, i_row % count
    if p_chosen is not None:
        number = tl.load(p_chosen + number)
    now = tl.maximum(tl.load(p_latest + number % slots * width + number // slots), 0)
    b_there = tl.load(p_drafted + (inputs + i_row) * numel + o, mask=o < numel, other=0.0)
    b_exact = tl.load(p_features + (branch * held + now) * numel + o, mask=o < numel, other=0.0)
    b_exact = b_exact.to(tl.float32).to(b_there.dtype).to(tl.float32)
    b_error = (b_exact - b_there.to(tl.float32)).to(b_there.dtype)
    # Written so that a NaN counts as none.
    fine = tl.abs(b_error.to(tl.float32)) < float("inf")
    tl.store(p_out + (branch * numbers + number) * numel + o, tl.where(fine, b_error, 0.0), mask=o < numel)
