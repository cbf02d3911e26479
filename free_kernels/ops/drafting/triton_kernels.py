"""The kernels of the drafting ops: drafts from outputs, drafts from refused rows, the memory of these, a round's tally.

Drafts of given outputs are independent from element to element, so programs share a state's elements and go through
the drafts with theirs. A secant needs the inner products of whole states before each draft, so one program makes all
drafts of a slot.
"""

from __future__ import annotations

import triton
import triton.language as tl

from free_kernels.ops.coupling.triton_math import (
    LOG_STD,
    LOG_STD_SLOPE,
    NUM_COLUMNS,
    exp,
    guided_output,
    transition_mean,
)

# As in free_kernels.ops.drafting.reference; and the least positive normal number of float32.
_LARGEST_GAP_SQ, _TINY = tl.constexpr(1e30), tl.constexpr(1.1754943508222875e-38)


@triton.jit
def _deviation(p_output, p_columns, o, mask, numel, LEARNED: tl.constexpr):
    """Deviation of a transition; a scalar if it is fixed."""
    log_std = tl.load(p_columns + LOG_STD)
    if LEARNED:
        b_variance = tl.load(p_output + numel + o, mask=mask, other=0.0).to(tl.float32)
        log_std = log_std + tl.load(p_columns + LOG_STD_SLOPE) * b_variance
    return exp(log_std)


@triton.jit(do_not_specialize=["first", "end", "length", "width", "output_rows"])
def advance_kernel(
    p_states, p_mean, p_std, p_noise, p_columns, p_output, p_rows, first, end, length, width, numel, guided_numel,
    output_rows, output_stride, guidance_scale, clip,
    LEARNED: tl.constexpr, GUIDED: tl.constexpr, CLIPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Drafts ``first`` to ``end - 1`` of one slot, ``BLOCK`` elements of each."""
    blocks = tl.cdiv(numel, BLOCK)
    i_slot = tl.program_id(0) // blocks
    o = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = o < numel
    row_of_slot = i_slot.to(tl.int64) * length
    unconditional = output_rows.to(tl.int64) * output_stride
    b_state = tl.load(p_states + (row_of_slot + first) * numel + o, mask=mask, other=0.0)
    for j in range(first, end):
        row = tl.load(p_rows + i_slot.to(tl.int64) * width + j)
        drafted = row >= 0
        place, draft = row_of_slot + j, row_of_slot - i_slot + j
        p_row, p_columns_row = p_output + tl.maximum(row, 0) * output_stride, p_columns + place * NUM_COLUMNS
        used = mask & drafted
        b_output = guided_output(p_row, unconditional, o, used, guided_numel, guidance_scale, GUIDED)
        b_mean = transition_mean(b_state, b_output, p_columns_row, clip, CLIPPED)
        b_std = _deviation(p_row, p_columns_row, o, used, numel, LEARNED) + tl.zeros([BLOCK], tl.float32)
        b_next = b_mean + b_std * tl.load(p_noise + place * numel + o, mask=used, other=0.0)
        tl.store(p_mean + draft * numel + o, b_mean, mask=used)
        tl.store(p_std + draft * numel + o, b_std, mask=used)
        tl.store(p_states + (place + 1) * numel + o, b_next, mask=used)
        # A draft that is not made here is there already, or is of no interest.
        b_there = tl.load(p_states + (place + 1) * numel + o, mask=mask & (row < 0), other=0.0)
        b_state = tl.where(drafted, b_next, b_there)


@triton.jit(do_not_specialize=["first", "end", "length", "width", "output_rows"])
def replay_kernel(
    p_states, p_mean, p_std, p_noise, p_columns, p_output, p_rows, p_asked, p_replaced, p_share, first, end, length,
    width, numel, guided_numel, output_rows, output_stride, guidance_scale, clip,
    LEARNED: tl.constexpr, GUIDED: tl.constexpr, CLIPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Drafts ``first`` to ``end - 1`` of one slot, from rows of earlier rounds and the secants through two of them."""
    i_slot = tl.program_id(0).to(tl.int64)
    unconditional = output_rows.to(tl.int64) * output_stride
    for j in range(first, end):
        row, older = tl.load(p_rows + i_slot * width + j), tl.load(p_replaced + i_slot * width + j)
        drafted = row >= 0
        follows = drafted & (older >= 0)
        row, older = tl.maximum(row, 0), tl.maximum(older, 0)
        place, draft = i_slot * length + j, i_slot * (length - 1) + j
        p_state = p_states + place * numel
        b_along, b_length = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
        for i in range(0, numel, BLOCK):
            o = i + tl.arange(0, BLOCK)
            used = (o < numel) & follows
            b_latest = tl.load(p_asked + row * numel + o, mask=used, other=0.0)
            b_way = b_latest - tl.load(p_asked + older * numel + o, mask=used, other=0.0)
            b_along += (tl.load(p_state + o, mask=used, other=0.0) - b_latest) * b_way
            b_length += b_way * b_way
        share = tl.sum(b_along, 0) / tl.maximum(tl.sum(b_length, 0), _TINY)
        share = tl.where(share > 1.0, 1.0, tl.where(share < -1.0, -1.0, share))
        share = tl.where(follows, share, 0.0)
        tl.store(p_share + i_slot * (end - first) + j - first, share)
        p_row, p_older = p_output + row * output_stride, p_output + older * output_stride
        p_columns_row = p_columns + place * NUM_COLUMNS
        for i in range(0, numel, BLOCK):
            o = i + tl.arange(0, BLOCK)
            used = (o < numel) & drafted
            twice = used & follows
            b_said = guided_output(p_row, unconditional, o, used, guided_numel, guidance_scale, GUIDED)
            b_before = guided_output(p_older, unconditional, o, twice, guided_numel, guidance_scale, GUIDED)
            b_said = tl.where(twice, b_said + share * (b_said - b_before), b_said)
            b_state = tl.load(p_state + o, mask=used, other=0.0)
            b_mean = transition_mean(b_state, b_said, p_columns_row, clip, CLIPPED)
            log_std = tl.load(p_columns_row + LOG_STD)
            if LEARNED:
                b_variance = tl.load(p_row + numel + o, mask=used, other=0.0).to(tl.float32)
                b_older = tl.load(p_older + numel + o, mask=twice, other=0.0).to(tl.float32)
                b_variance = tl.where(twice, b_variance + share * (b_variance - b_older), b_variance)
                log_std = log_std + tl.load(p_columns_row + LOG_STD_SLOPE) * b_variance
            b_std = exp(log_std) + tl.zeros([BLOCK], tl.float32)
            tl.store(p_mean + draft * numel + o, b_mean, mask=used)
            tl.store(p_std + draft * numel + o, b_std, mask=used)
            b_next = b_mean + b_std * tl.load(p_noise + place * numel + o, mask=used, other=0.0)
            tl.store(p_state + numel + o, b_next, mask=used)
        # The next draft's sums read what other threads have stored.
        tl.debug_barrier()


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
    p_states, p_features, p_output, p_row_offsets, p_committed, p_lengths, p_steps, p_at, p_turn, p_held_states,
    p_held_features, p_held_output, length, slots, places, packed, numel, feature_numel, output_numel,
    BRANCHES: tl.constexpr, GENERATIONS: tl.constexpr, WITH_OUTPUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Keep one row of one slot."""
    i_slot, j = tl.program_id(0) // length, tl.program_id(0) % length
    committed, rows = tl.load(p_committed + i_slot), places - 1
    behind = j - committed
    if (behind >= -1) & (behind < rows - 1) & (j < tl.load(p_lengths + i_slot)):
        packed_row = tl.load(p_row_offsets + i_slot) + j
        step = tl.load(p_steps + i_slot) + j
        place = i_slot.to(tl.int64) * places + step % rows
        turn = (tl.load(p_turn + place) + 1) % GENERATIONS
        index = turn * slots * places + place
        _copy(p_states + (i_slot.to(tl.int64) * length + j) * numel, p_held_states + index * numel, numel, BLOCK)
        wrong = 0
        for branch in tl.static_range(BRANCHES):
            from_row = packed_row + branch * packed
            to_row = index + branch * GENERATIONS * slots * places
            wrong += _copy(
                p_features + from_row * feature_numel, p_held_features + to_row * feature_numel, feature_numel, BLOCK
            )
            p_said = p_output + from_row * output_numel
            if WITH_OUTPUT:
                wrong += _copy(p_said, p_held_output + to_row * output_numel, output_numel, BLOCK)
            else:
                wrong += _count_wrong(p_said, output_numel, BLOCK)
        tl.store(p_turn + place, turn)
        tl.store(p_at + index, tl.where(wrong == 0, step, -1))


@triton.jit
def _found(p_at, p_turn, step, place, mask, turns_on, all_places, GENERATIONS: tl.constexpr):
    """Number of the row of each step, -1 where there is none."""
    b_turn = (tl.load(p_turn + place, mask=mask, other=0) + turns_on) % GENERATIONS
    b_index = b_turn * all_places + place
    return tl.where(tl.load(p_at + b_index, mask=mask, other=-2) == step, b_index, -1)


@triton.jit(do_not_specialize=["slots", "places"])
def find_kernel(
    p_at, p_turn, p_steps, p_places, p_ahead, slots, places, GENERATIONS: tl.constexpr, ENTRIES: tl.constexpr
):
    """Rows of the steps ahead of one slot."""
    i_slot = tl.program_id(0).to(tl.int64)
    rows, all_places = places - 1, slots.to(tl.int64) * places
    o = tl.arange(0, ENTRIES)
    mask = o < rows
    step = tl.load(p_steps + i_slot) - 1 + o
    place = i_slot * places + (step + rows) % rows
    b_latest = _found(p_at, p_turn, step, place, mask, 0, all_places, GENERATIONS)
    missing = mask & (o > 0) & (b_latest < 0)
    ahead = tl.min(tl.where(missing, o, rows), 0) - 1
    tl.store(p_ahead + i_slot, ahead.to(tl.int64))
    served = (o <= ahead) & (ahead > 0)
    p_own = p_places + i_slot * rows + o
    tl.store(p_own, tl.where(served, b_latest, -1), mask=mask)
    if GENERATIONS > 1:
        b_replaced = _found(p_at, p_turn, step, place, mask, 1, all_places, GENERATIONS)
        tl.store(p_own + slots.to(tl.int64) * rows, tl.where(served, b_replaced, -1), mask=mask)


@triton.jit(do_not_specialize=["slots", "drafts", "num_steps", "output_numel", "numel"])
def tally_kernel(
    p_output, p_next_states, p_gap_sq, p_committed, p_lengths, p_steps, p_deviation, p_finite, slots, drafts,
    num_steps, output_numel, numel, PADDED_DRAFTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of the output and of the next states is looked at by each program; the first ones have a slot, too."""
    i_program = tl.program_id(0)
    o = i_program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_output = tl.load(p_output + o, mask=o < output_numel, other=0.0).to(tl.float32)
    b_state = tl.load(p_next_states + o, mask=o < numel, other=0.0)
    b_fine = (tl.abs(b_output) < float("inf")) & (tl.abs(b_state) < float("inf"))
    if tl.sum(tl.where(b_fine, 0, 1), 0) > 0:
        tl.store(p_finite, tl.zeros([], tl.int64))
    if i_program < slots:
        tested = tl.minimum(tl.load(p_committed + i_program), tl.load(p_lengths + i_program) - 1)
        o_l = tl.arange(0, PADDED_DRAFTS)
        mask = (o_l < drafts) & (o_l < tested)
        b_gap = tl.load(p_gap_sq + i_program.to(tl.int64) * drafts + o_l, mask=mask, other=0.0)
        b_gap = tl.where(tl.abs(b_gap) < float("inf"), b_gap, _LARGEST_GAP_SQ)
        step = tl.minimum(tl.load(p_steps + i_program) + o_l, num_steps - 1)
        tl.atomic_add(p_deviation + step, b_gap, mask=mask)
