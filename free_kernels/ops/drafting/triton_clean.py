"""The kernels of clean samples: keeping those of a round, what they say of responses, and all drafts made of them.

A response needs inner products of whole states, so one program measures a whole row. Programs of elements keep the rows
afterwards, when the length of each step is known and what was kept before has been read.
"""

from __future__ import annotations

import triton
import triton.language as tl

from free_kernels.ops.coupling.triton_math import (
    LOG_STD,
    LOG_STD_SLOPE,
    MEAN_FROM_STATE_GIVEN_X0,
    MEAN_FROM_X0,
    NUM_COLUMNS,
    X0_FROM_OUTPUT,
    X0_FROM_STATE,
    clipped,
    exp,
    guided_output,
)
from free_kernels.ops.triton_masks import where_also

# As in free_kernels.ops.drafting.reference.
_RESPONSE_DECAY = tl.constexpr(0.7)
_PATTERN_DECAY = tl.constexpr(0.9)
_PATTERN_PRIOR = tl.constexpr(1.0)
# Sums of a slot.
_SUMS = tl.constexpr(6)
# What is measured of a row: products and squares of the move to new noise, those of the move between rounds, those of
# the elements' test, and whether it is finite.
MEASURED = 7
_MEASURED = tl.constexpr(MEASURED)


@triton.jit
def _clean(b_state, p_row, unconditional, p_column, o, mask, guided_numel, scale, GUIDED: tl.constexpr):
    """Clean samples, not clipped, of a row's states and output."""
    b_said = guided_output(p_row, unconditional, o, mask, guided_numel, scale, GUIDED)
    return tl.load(p_column + X0_FROM_STATE) * b_state + tl.load(p_column + X0_FROM_OUTPUT) * b_said


@triton.jit
def _response_unit(p_column):
    """What responses are measured in, as in the reference."""
    from_state = tl.load(p_column + X0_FROM_STATE)
    return tl.where(from_state > 0, from_state, 1.0)


@triton.jit
def _column(p_table, step, num_steps):
    """Pointer to the coefficients of a step; those past the ends are the ends'."""
    return p_table + tl.minimum(tl.maximum(step, 0), num_steps - 1) * NUM_COLUMNS


@triton.jit
def _average(p_sums, otherwise):
    """The average that a pair of sums holds; ``otherwise`` where there is nothing to divide by."""
    total, weight = tl.load(p_sums), tl.load(p_sums + 1)
    known = weight > 0
    return tl.where(known, tl.maximum(total / tl.where(known, weight, 1.0), 0.0), otherwise)


@triton.jit
def _apart(p_along, o, numel, average, mask):
    """How far elements' own responses are from the average, by their sums."""
    b_along = tl.load(p_along + o, mask=mask, other=0.0)
    b_length = tl.load(p_along + numel + o, mask=mask, other=0.0)
    return tl.maximum((b_along + _PATTERN_PRIOR * average) / (b_length + _PATTERN_PRIOR), 0.0) - average


@triton.jit
def _mean(p_column, b_clean, b_state):
    """The mean of the state behind a step."""
    return tl.load(p_column + MEAN_FROM_X0) * b_clean + tl.load(p_column + MEAN_FROM_STATE_GIVEN_X0) * b_state


@triton.jit(do_not_specialize=["length", "places", "packed", "num_steps"])
def measure_kernel(
    p_states, p_output, p_row_offsets, p_committed, p_lengths, p_steps, p_table, p_before, p_at,
    p_held_states, p_held_clean, p_response, p_pattern, p_measured, guidance_scale, clip, length, places, packed,
    num_steps, numel, guided_numel, output_numel,
    LEARNED: tl.constexpr, GUIDED: tl.constexpr, CLIPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What a row says that was committed or will be kept."""
    i_slot, j = tl.program_id(0) // length, tl.program_id(0) % length
    committed = tl.load(p_committed + i_slot)
    if (j - committed < places - 3) & (j < tl.load(p_lengths + i_slot)):
        first = tl.load(p_steps + i_slot)
        step = first + j
        index = i_slot.to(tl.int64) * places + step % (places - 1)
        unconditional = packed.to(tl.int64) * output_numel
        p_state = p_states + (i_slot.to(tl.int64) * length + j) * numel
        p_row = p_output + (tl.load(p_row_offsets + i_slot) + j) * output_numel
        p_column = _column(p_table, step, num_steps)
        measures, before = j < committed, tl.load(p_before + i_slot)
        # The row before: of this round, or held.
        within, outside = measures & (j > 0), measures & (j == 0) & (before >= 0)
        p_old_state = p_held_states + tl.maximum(before, 0) * numel
        p_old_clean = p_held_clean + tl.maximum(before, 0) * output_numel
        p_past = _column(p_table, step - 1, num_steps)
        # The row of an earlier round at the same step.
        again = measures & (tl.load(p_at + index) == step)
        p_again_state, p_again_clean = p_held_states + index * numel, p_held_clean + index * output_numel
        # What is known of a new image's responses is another's.
        tested = measures & (first > 0)
        average = tl.where(tested, _average(p_response + i_slot.to(tl.int64) * _SUMS, 0.0), 0.0)
        p_along = p_pattern + 2 * i_slot.to(tl.int64) * numel
        inverse = 1.0 / _response_unit(p_column)
        b_wrong = tl.zeros([BLOCK], tl.int32)
        b_along, b_length = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
        b_along_again, b_length_again = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
        b_fit, b_gap_sq = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
        for i in range(0, numel, BLOCK):
            o = i + tl.arange(0, BLOCK)
            mask = o < numel
            b_state = tl.load(p_state + o, mask=mask, other=0.0)
            b_clean = _clean(b_state, p_row, unconditional, p_column, o, mask, guided_numel, guidance_scale, GUIDED)
            b_wrong += tl.where(tl.abs(b_clean) < float("inf"), 0, 1)
            if LEARNED:
                b_variance = tl.load(p_row + numel + o, mask=mask, other=0.0).to(tl.float32)
                b_wrong += tl.where(tl.abs(b_variance) < float("inf"), 0, 1)
            b_clean = clipped(b_clean, clip, CLIPPED)
            here, there, same = where_also(mask, within), where_also(mask, outside), where_also(mask, again)
            b_moved = tl.where(same, b_state - tl.load(p_again_state + o, mask=same, other=0.0), 0.0)
            b_along_again += b_moved * (inverse * (b_clean - tl.load(p_again_clean + o, mask=same, other=0.0)))
            b_length_again += b_moved * b_moved
            b_past = tl.load(p_state - numel + o, mask=here, other=0.0)
            b_then = _clean(
                b_past, p_row - output_numel, unconditional, p_past, o, here, guided_numel, guidance_scale, GUIDED
            )
            b_then = tl.where(within, clipped(b_then, clip, CLIPPED), tl.load(p_old_clean + o, mask=there, other=0.0))
            b_past += tl.load(p_old_state + o, mask=there, other=0.0)
            b_moved = tl.where(where_also(mask, within | outside), b_state - _mean(p_past, b_then, b_past), 0.0)
            b_changed = inverse * (b_clean - b_then)
            b_along += b_moved * b_changed
            b_length += b_moved * b_moved
            b_gap = _apart(p_along, o, numel, average, where_also(mask, tested)) * b_moved
            b_fit += b_gap * (b_changed - average * b_moved)
            b_gap_sq += b_gap * b_gap
        p_own = p_measured + tl.program_id(0).to(tl.int64) * _MEASURED
        tl.store(p_own, tl.sum(b_along, 0))
        tl.store(p_own + 1, tl.sum(b_length, 0))
        tl.store(p_own + 2, tl.sum(b_along_again, 0))
        tl.store(p_own + 3, tl.sum(b_length_again, 0))
        tl.store(p_own + 4, tl.sum(b_fit, 0))
        tl.store(p_own + 5, tl.sum(b_gap_sq, 0))
        tl.store(p_own + 6, tl.where(tl.sum(b_wrong, 0) == 0, 1.0, 0.0))


@triton.jit
def _ratio(p_own, numel):
    """Of a row: products over squares, one over the mean square, and whether it says something, as in the reference."""
    along, length_sq = tl.load(p_own), tl.load(p_own + 1)
    known = length_sq > 0
    length_sq = tl.where(known, length_sq, 1.0)
    ratio, weight = along / length_sq, numel / length_sq
    return ratio, weight, known & (tl.abs(ratio) < float("inf")) & (weight < float("inf")) & (weight > 0)


@triton.jit
def _pair(p_sums, is_new):
    """A pair of a slot's sums; a new image's are 0."""
    return tl.where(is_new, 0.0, tl.load(p_sums)), tl.where(is_new, 0.0, tl.load(p_sums + 1))


@triton.jit
def _add_pair(known, decay: tl.constexpr, total, weight, first, second):
    """A pair of sums with what one more step says, if it says something."""
    return tl.where(known, decay * total + first, total), tl.where(known, decay * weight + second, weight)


@triton.jit
def _store_pair(p_sums, total, weight):
    tl.store(p_sums, total)
    tl.store(p_sums + 1, weight)


@triton.jit
def _add_measured(p_sums, p_rows, committed, is_new, numel):
    """What the rows of a slot's committed steps say, into its sums; a new image's begin at 0."""
    to_new, new_weight = _pair(p_sums, is_new)
    to_other, other_weight = _pair(p_sums + 2, is_new)
    fit, gap_sq = _pair(p_sums + 4, is_new)
    for j in range(0, committed):
        p_own = p_rows + j * _MEASURED
        ratio, _, known = _ratio(p_own, numel)
        to_new, new_weight = _add_pair(known, _RESPONSE_DECAY, to_new, new_weight, ratio, 1.0)
        length_sq = tl.where(known, tl.load(p_own + 1), 1.0)
        fits, gap = tl.load(p_own + 4) / length_sq, tl.load(p_own + 5) / length_sq
        known = known & (tl.abs(fits) < float("inf")) & (gap < float("inf"))
        fit, gap_sq = _add_pair(known, _PATTERN_DECAY, fit, gap_sq, fits, gap)
        ratio, _, known = _ratio(p_own + 2, numel)
        to_other, other_weight = _add_pair(known, _RESPONSE_DECAY, to_other, other_weight, ratio, 1.0)
    _store_pair(p_sums, to_new, new_weight)
    _store_pair(p_sums + 2, to_other, other_weight)
    _store_pair(p_sums + 4, fit, gap_sq)


@triton.jit(do_not_specialize=["length", "places", "packed", "num_steps"])
def keep_clean_kernel(
    p_states, p_output, p_row_offsets, p_committed, p_lengths, p_steps, p_table, p_before, p_at,
    p_held_states, p_held_clean, p_response, p_pattern, p_measured, guidance_scale, clip, length, places, packed,
    num_steps, numel, guided_numel, output_numel,
    LEARNED: tl.constexpr, GUIDED: tl.constexpr, CLIPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add up what a slot's committed steps say, and keep the last and what is behind it: a block of elements.

    The slot's first block adds up what is said of whole rows, too.
    """
    blocks = tl.cdiv(numel, BLOCK)
    i_slot, i_block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    o = i_block * BLOCK + tl.arange(0, BLOCK)
    mask = o < numel
    committed, rows = tl.load(p_committed + i_slot), places - 1
    # One place is left to the row of the step before.
    end = tl.minimum(tl.load(p_lengths + i_slot), committed + rows - 2)
    first, before = tl.load(p_steps + i_slot), tl.load(p_before + i_slot)
    is_new = (first == 0) & (committed > 0)
    there = where_also(mask, before >= 0)
    p_along = p_pattern + 2 * i_slot * numel + o
    b_along = tl.where(is_new, 0.0, tl.load(p_along, mask=mask, other=0.0))
    b_length = tl.where(is_new, 0.0, tl.load(p_along + numel, mask=mask, other=0.0))
    b_past = tl.load(p_held_states + tl.maximum(before, 0) * numel + o, mask=there, other=0.0)
    b_then = tl.load(p_held_clean + tl.maximum(before, 0) * output_numel + o, mask=there, other=0.0)
    p_past = _column(p_table, first - 1, num_steps)
    unconditional = packed.to(tl.int64) * output_numel
    p_state = p_states + i_slot * length * numel
    p_row = p_output + tl.load(p_row_offsets + i_slot) * output_numel
    p_rows = p_measured + i_slot * length * _MEASURED
    for j in range(0, end):
        step = first + j
        p_column = _column(p_table, step, num_steps)
        b_state = tl.load(p_state + o, mask=mask, other=0.0)
        b_clean = _clean(b_state, p_row, unconditional, p_column, o, mask, guided_numel, guidance_scale, GUIDED)
        b_clean = clipped(b_clean, clip, CLIPPED)
        if j < committed:
            _, weight, known = _ratio(p_rows + j * _MEASURED, numel)
            b_moved = b_state - _mean(p_past, b_then, b_past)
            b_changed = (1.0 / _response_unit(p_column)) * (b_clean - b_then)
            b_along = tl.where(known, _PATTERN_DECAY * b_along + weight * (b_moved * b_changed), b_along)
            b_length = tl.where(known, _PATTERN_DECAY * b_length + weight * (b_moved * b_moved), b_length)
        b_past, b_then, p_past = b_state, b_clean, p_column
        if j >= committed - 1:
            index = i_slot * places + step % rows
            tl.store(p_held_states + index * numel + o, b_state, mask=mask)
            tl.store(p_held_clean + index * output_numel + o, b_clean, mask=mask)
            if LEARNED:
                b_variance = tl.load(p_row + numel + o, mask=mask, other=0.0).to(tl.float32)
                tl.store(p_held_clean + index * output_numel + numel + o, b_variance, mask=mask)
            if i_block == 0:
                tl.store(p_at + index, tl.where(tl.load(p_rows + j * _MEASURED + 6) > 0, step, -1))
        p_state += numel
        p_row += output_numel
    tl.store(p_along, b_along, mask=mask)
    tl.store(p_along + numel, b_length, mask=mask)
    if i_block == 0:
        _add_measured(p_response + i_slot * _SUMS, p_rows, committed, is_new, numel)


@triton.jit(do_not_specialize=["length", "width", "num_steps"])
def replay_kernel(
    p_states, p_mean, p_std, p_noise, p_table, p_steps, p_held_states, p_held_clean, p_latest, p_before, p_response,
    p_pattern, clip, length, width, num_steps, numel, output_numel,
    LEARNED: tl.constexpr, CLIPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of all drafts of one slot, whose elements do not depend on each other."""
    blocks = tl.cdiv(numel, BLOCK)
    i_slot = (tl.program_id(0) // blocks).to(tl.int64)
    o = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = o < numel
    step, before = tl.load(p_steps + i_slot), tl.load(p_before + i_slot)
    there = before >= 0
    # Without a row before the sums are those of the slot's last image.
    p_sums = p_response + i_slot * _SUMS
    average = _average(p_sums, 0.0)
    to_other = tl.where(there, _average(p_sums + 2, average), 0.0)
    share = tl.minimum(_average(p_sums + 4, 0.0), 1.0)
    b_to_new = average + share * _apart(p_pattern + 2 * i_slot * numel, o, numel, average, mask)
    b_to_new = tl.where(there, b_to_new, 0.0)
    before, known = tl.maximum(before, 0), where_also(mask, there)
    p_own = p_states + i_slot * length * numel + o
    b_state = tl.load(p_own, mask=mask, other=0.0)
    b_said = tl.load(p_held_clean + before * output_numel + o, mask=known, other=0.0)
    b_at = tl.load(p_held_states + before * numel + o, mask=known, other=0.0)
    p_column = _column(p_table, step - 1, num_steps)
    b_at = tl.where(there, _mean(p_column, b_said, b_at), b_state)
    if LEARNED:
        b_variance = tl.load(p_held_clean + before * output_numel + numel + o, mask=known, other=0.0)
    for j in range(0, length - 1):
        latest = tl.load(p_latest + i_slot * width + j, mask=j < width, other=-1)
        served = where_also(mask, latest >= 0)
        row = tl.maximum(latest, 0)
        b_at = tl.load(p_held_states + row * numel + o, mask=served, other=0.0) + tl.where(served, 0.0, b_at)
        p_known = p_held_clean + row * output_numel + o
        b_said = tl.load(p_known, mask=served, other=0.0) + tl.where(served, 0.0, b_said)
        p_column = _column(p_table, step + j, num_steps)
        b_moves = tl.where(latest >= 0, to_other, b_to_new) * _response_unit(p_column)
        b_said = clipped(b_said + b_moves * (b_state - b_at), clip, CLIPPED)
        # The mean, at which the next draft's noise is not yet known.
        b_at = _mean(p_column, b_said, b_state)
        log_std = tl.load(p_column + LOG_STD)
        if LEARNED:
            b_variance = tl.load(p_known + numel, mask=served, other=0.0) + tl.where(served, 0.0, b_variance)
            log_std = log_std + tl.load(p_column + LOG_STD_SLOPE) * b_variance
        b_std = exp(log_std) + tl.zeros([BLOCK], tl.float32)
        draft = (i_slot * (length - 1) + j) * numel + o
        tl.store(p_mean + draft, b_at, mask=mask)
        tl.store(p_std + draft, b_std, mask=mask)
        b_state = b_at + b_std * tl.load(p_noise + (i_slot * length + j) * numel + o, mask=mask, other=0.0)
        tl.store(p_own + (j + 1) * numel, b_state, mask=mask)
