"""The kernels of clean samples: keeping those of a round, and all drafts that are made of them.

A response needs inner products of whole states, so one program keeps a whole row.
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
def _add_ratio(p_sums, b_along, b_length, unit, known, is_new):
    """What a step says of a response, into its pair of sums; a new image's begin at 0."""
    total, weight = tl.load(p_sums), tl.load(p_sums + 1)
    total, weight = tl.where(is_new, 0.0, total), tl.where(is_new, 0.0, weight)
    moved_sq = tl.sum(b_length, 0)
    ratio = tl.sum(b_along, 0) / tl.where(moved_sq > 0, moved_sq, 1.0) / unit
    known = known & (moved_sq > 0) & (tl.abs(ratio) < float("inf"))
    tl.store(p_sums, tl.where(known, _RESPONSE_DECAY * total + ratio, total))
    tl.store(p_sums + 1, tl.where(known, _RESPONSE_DECAY * weight + 1.0, weight))


@triton.jit(do_not_specialize=["length", "places", "packed", "num_steps"])
def keep_clean_kernel(
    p_states, p_output, p_row_offsets, p_committed, p_lengths, p_steps, p_table, p_before, p_at,
    p_held_states, p_held_clean, p_response, guidance_scale, clip, length, places, packed, num_steps, numel,
    guided_numel, output_numel,
    LEARNED: tl.constexpr, GUIDED: tl.constexpr, CLIPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Keep one row of one slot; the program of the last committed one measures the responses."""
    i_slot, j = tl.program_id(0) // length, tl.program_id(0) % length
    committed, rows = tl.load(p_committed + i_slot), places - 1
    behind = j - committed
    if (behind >= -1) & (behind < rows - 2) & (j < tl.load(p_lengths + i_slot)):
        first = tl.load(p_steps + i_slot)
        step = first + j
        index = i_slot.to(tl.int64) * places + step % rows
        unconditional = packed.to(tl.int64) * output_numel
        p_state = p_states + (i_slot.to(tl.int64) * length + j) * numel
        p_row = p_output + (tl.load(p_row_offsets + i_slot) + j) * output_numel
        p_column = _column(p_table, step, num_steps)
        p_held_state, p_held = p_held_states + index * numel, p_held_clean + index * output_numel
        measures = behind == -1
        # The row before the last committed one: of this round, or held, where no row of this round goes.
        within, before = measures & (j > 0), tl.load(p_before + i_slot)
        outside = measures & (j == 0) & (before >= 0)
        p_old_state, p_old_clean = p_held_states + tl.maximum(before, 0) * numel, p_held_clean
        p_old_clean += tl.maximum(before, 0) * output_numel
        p_past = _column(p_table, step - 1, num_steps)
        # The row of an earlier round at the same step, which this one replaces.
        again = measures & (tl.load(p_at + index) == step)
        b_wrong = tl.zeros([BLOCK], tl.int32)
        b_along, b_length = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
        b_along_again, b_length_again = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
        for i in range(0, numel, BLOCK):
            o = i + tl.arange(0, BLOCK)
            mask = o < numel
            b_state = tl.load(p_state + o, mask=mask, other=0.0)
            b_clean = _clean(b_state, p_row, unconditional, p_column, o, mask, guided_numel, guidance_scale, GUIDED)
            b_wrong += tl.where(tl.abs(b_clean) < float("inf"), 0, 1)
            b_clean = clipped(b_clean, clip, CLIPPED)
            here, there, same = where_also(mask, within), where_also(mask, outside), where_also(mask, again)
            b_moved = tl.where(same, b_state - tl.load(p_held_state + o, mask=same, other=0.0), 0.0)
            b_along_again += b_moved * (b_clean - tl.load(p_held + o, mask=same, other=0.0))
            b_length_again += b_moved * b_moved
            b_past = tl.load(p_state - numel + o, mask=here, other=0.0)
            b_then = _clean(
                b_past, p_row - output_numel, unconditional, p_past, o, here, guided_numel, guidance_scale, GUIDED
            )
            b_then = tl.where(within, clipped(b_then, clip, CLIPPED), tl.load(p_old_clean + o, mask=there, other=0.0))
            b_past += tl.load(p_old_state + o, mask=there, other=0.0)
            b_mean = tl.load(p_past + MEAN_FROM_X0) * b_then + tl.load(p_past + MEAN_FROM_STATE_GIVEN_X0) * b_past
            b_moved = tl.where(mask, b_state - b_mean, 0.0)
            b_along += b_moved * (b_clean - b_then)
            b_length += b_moved * b_moved
            # What is held here has been read by all threads.
            tl.debug_barrier()
            tl.store(p_held_state + o, b_state, mask=mask)
            tl.store(p_held + o, b_clean, mask=mask)
            if LEARNED:
                b_variance = tl.load(p_row + numel + o, mask=mask, other=0.0).to(tl.float32)
                b_wrong += tl.where(tl.abs(b_variance) < float("inf"), 0, 1)
                tl.store(p_held + numel + o, b_variance, mask=mask)
        tl.store(p_at + index, tl.where(tl.sum(b_wrong, 0) == 0, step, -1))
        if measures:
            p_sums, unit = p_response + i_slot.to(tl.int64) * 4, _response_unit(p_column)
            _add_ratio(p_sums, b_along, b_length, unit, within | outside, first == 0)
            _add_ratio(p_sums + 2, b_along_again, b_length_again, unit, again, first == 0)


@triton.jit
def _average(p_sums, otherwise):
    """The average that a pair of sums holds; ``otherwise`` where there is nothing to divide by."""
    total, weight = tl.load(p_sums), tl.load(p_sums + 1)
    known = weight > 0
    return tl.where(known, tl.maximum(total / tl.where(known, weight, 1.0), 0.0), otherwise)


@triton.jit(do_not_specialize=["length", "width", "num_steps"])
def replay_kernel(
    p_states, p_mean, p_std, p_noise, p_table, p_steps, p_held_states, p_held_clean, p_latest, p_before, p_response,
    clip, length, width, num_steps, numel, output_numel,
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
    to_new = _average(p_response + 4 * i_slot, 0.0)
    to_other = tl.where(there, _average(p_response + 4 * i_slot + 2, to_new), 0.0)
    to_new = tl.where(there, to_new, 0.0)
    before, known = tl.maximum(before, 0), where_also(mask, there)
    p_own = p_states + i_slot * length * numel + o
    b_state = tl.load(p_own, mask=mask, other=0.0)
    b_said = tl.load(p_held_clean + before * output_numel + o, mask=known, other=0.0)
    b_at = tl.load(p_held_states + before * numel + o, mask=known, other=0.0)
    p_column = _column(p_table, step - 1, num_steps)
    b_at = tl.load(p_column + MEAN_FROM_X0) * b_said + tl.load(p_column + MEAN_FROM_STATE_GIVEN_X0) * b_at
    b_at = tl.where(there, b_at, b_state)
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
        moves = tl.where(latest >= 0, to_other, to_new) * _response_unit(p_column)
        b_said = clipped(b_said + moves * (b_state - b_at), clip, CLIPPED)
        # The mean, at which the next draft's noise is not yet known.
        b_at = tl.load(p_column + MEAN_FROM_X0) * b_said + tl.load(p_column + MEAN_FROM_STATE_GIVEN_X0) * b_state
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
