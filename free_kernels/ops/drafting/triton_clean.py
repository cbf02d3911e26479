"""The kernels of clean samples: keeping those of a round, and all drafts that are made of them.

A response and a secant need inner products of whole states, so one program has a whole row, or all drafts of a slot.
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

# As in free_kernels.ops.drafting.reference; and the least positive normal number of float32.
_RESPONSE_DECAY, _TINY = tl.constexpr(0.7), tl.constexpr(1.1754943508222875e-38)


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


@triton.jit(do_not_specialize=["length", "slots", "places", "packed", "num_steps"])
def keep_clean_kernel(
    p_states, p_output, p_row_offsets, p_committed, p_lengths, p_steps, p_table, p_before, p_at, p_turn,
    p_held_states, p_held_clean, p_response, guidance_scale, clip, length, slots, places, packed, num_steps, numel,
    guided_numel, output_numel,
    LEARNED: tl.constexpr, GUIDED: tl.constexpr, CLIPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Keep one row of one slot; the program of the last committed one measures the response."""
    i_slot, j = tl.program_id(0) // length, tl.program_id(0) % length
    committed, rows = tl.load(p_committed + i_slot), places - 1
    behind = j - committed
    if (behind >= -1) & (behind < rows - 1) & (j < tl.load(p_lengths + i_slot)):
        first = tl.load(p_steps + i_slot)
        step = first + j
        place = i_slot.to(tl.int64) * places + step % rows
        turn = 1 - tl.load(p_turn + place)
        index = turn * slots * places + place
        unconditional = packed.to(tl.int64) * output_numel
        p_state = p_states + (i_slot.to(tl.int64) * length + j) * numel
        p_row = p_output + (tl.load(p_row_offsets + i_slot) + j) * output_numel
        p_column = _column(p_table, step, num_steps)
        # The row before the last committed one: of this round, or held, and then where no row of this round goes.
        measures = behind == -1
        within, before = measures & (j > 0), tl.load(p_before + i_slot)
        outside = measures & (j == 0) & (before >= 0)
        p_old_state, p_old_clean = p_held_states + tl.maximum(before, 0) * numel, p_held_clean
        p_old_clean += tl.maximum(before, 0) * output_numel
        p_past = _column(p_table, step - 1, num_steps)
        b_wrong = tl.zeros([BLOCK], tl.int32)
        b_along, b_length = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
        for i in range(0, numel, BLOCK):
            o = i + tl.arange(0, BLOCK)
            mask = o < numel
            b_state = tl.load(p_state + o, mask=mask, other=0.0)
            b_clean = _clean(b_state, p_row, unconditional, p_column, o, mask, guided_numel, guidance_scale, GUIDED)
            b_wrong += tl.where(tl.abs(b_clean) < float("inf"), 0, 1)
            b_clean = clipped(b_clean, clip, CLIPPED)
            tl.store(p_held_states + index * numel + o, b_state, mask=mask)
            tl.store(p_held_clean + index * output_numel + o, b_clean, mask=mask)
            if LEARNED:
                b_variance = tl.load(p_row + numel + o, mask=mask, other=0.0).to(tl.float32)
                b_wrong += tl.where(tl.abs(b_variance) < float("inf"), 0, 1)
                tl.store(p_held_clean + index * output_numel + numel + o, b_variance, mask=mask)
            here, there = mask & within, mask & outside
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
        tl.store(p_turn + place, turn)
        tl.store(p_at + index, tl.where(tl.sum(b_wrong, 0) == 0, step, -1))
        if measures:
            p_sums = p_response + i_slot.to(tl.int64) * 2
            total, weight = tl.load(p_sums), tl.load(p_sums + 1)
            total, weight = tl.where(first == 0, 0.0, total), tl.where(first == 0, 0.0, weight)
            moved_sq = tl.sum(b_length, 0)
            ratio = tl.sum(b_along, 0) / tl.where(moved_sq > 0, moved_sq, 1.0) / _response_unit(p_column)
            known = (within | outside) & (moved_sq > 0) & (tl.abs(ratio) < float("inf"))
            tl.store(p_sums, tl.where(known, _RESPONSE_DECAY * total + ratio, total))
            tl.store(p_sums + 1, tl.where(known, _RESPONSE_DECAY * weight + 1.0, weight))


# Places of rows may begin anywhere in a buffer.
@triton.jit(
    do_not_specialize=["length", "width", "num_steps"],
    do_not_specialize_on_alignment=["p_latest", "p_replaced"],
)
def replay_kernel(
    p_states, p_mean, p_std, p_noise, p_table, p_steps, p_held_states, p_held_clean, p_latest, p_replaced, p_before,
    p_response, p_said, p_last, clip, length, width, num_steps, numel, output_numel,
    LEARNED: tl.constexpr, CLIPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """All drafts of one slot. ``p_said`` and ``p_last`` keep clean sample, variances and mean of the draft before."""
    i_slot = tl.program_id(0).to(tl.int64)
    p_said += i_slot * output_numel
    p_last += i_slot * numel
    total, weight = tl.load(p_response + 2 * i_slot), tl.load(p_response + 2 * i_slot + 1)
    step, before = tl.load(p_steps + i_slot), tl.load(p_before + i_slot)
    there = before >= 0
    # Without a row before the sums are those of the slot's last image.
    measured = there & (weight > 0)
    response = tl.where(measured, tl.maximum(total / tl.where(measured, weight, 1.0), 0.0), 0.0)
    before = tl.maximum(before, 0)
    p_column = _column(p_table, step - 1, num_steps)
    for i in range(0, numel, BLOCK):
        o = i + tl.arange(0, BLOCK)
        mask = o < numel
        known = mask & there
        b_said = tl.load(p_held_clean + before * output_numel + o, mask=known, other=0.0)
        b_state = tl.load(p_held_states + before * numel + o, mask=known, other=0.0)
        b_mean = tl.load(p_column + MEAN_FROM_X0) * b_said + tl.load(p_column + MEAN_FROM_STATE_GIVEN_X0) * b_state
        b_first = tl.load(p_states + i_slot * length * numel + o, mask=mask, other=0.0)
        tl.store(p_said + o, b_said, mask=mask)
        tl.store(p_last + o, tl.where(there, b_mean, b_first), mask=mask)
        if LEARNED:
            b_variance = tl.load(p_held_clean + before * output_numel + numel + o, mask=known, other=0.0)
            tl.store(p_said + numel + o, b_variance, mask=mask)
    for j in range(0, length - 1):
        here, seen = i_slot * length + j, j < width
        latest = tl.load(p_latest + i_slot * width + j, mask=seen, other=-1)
        replaced = tl.load(p_replaced + i_slot * width + j, mask=seen, other=-1)
        served = latest >= 0
        twice = served & (replaced >= 0)
        latest, replaced = tl.maximum(latest, 0), tl.maximum(replaced, 0)
        p_state, p_there, p_older = p_states + here * numel, p_held_states + latest * numel, p_held_states
        p_older += replaced * numel
        p_known, p_before_known = p_held_clean + latest * output_numel, p_held_clean + replaced * output_numel
        b_along, b_length = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
        for i in range(0, numel, BLOCK):
            o = i + tl.arange(0, BLOCK)
            used = (o < numel) & twice
            b_latest = tl.load(p_there + o, mask=used, other=0.0)
            b_way = b_latest - tl.load(p_older + o, mask=used, other=0.0)
            b_along += (tl.load(p_state + o, mask=used, other=0.0) - b_latest) * b_way
            b_length += b_way * b_way
        share = tl.sum(b_along, 0) / tl.maximum(tl.sum(b_length, 0), _TINY)
        share = tl.where(share > 1.0, 1.0, tl.where(share < -1.0, -1.0, share))
        p_column = _column(p_table, step + j, num_steps)
        moves = response * _response_unit(p_column)
        draft = (here - i_slot) * numel
        for i in range(0, numel, BLOCK):
            o = i + tl.arange(0, BLOCK)
            mask = o < numel
            if served:
                b_at, b_said = tl.load(p_there + o, mask=mask, other=0.0), tl.load(p_known + o, mask=mask, other=0.0)
            else:
                b_at, b_said = tl.load(p_last + o, mask=mask, other=0.0), tl.load(p_said + o, mask=mask, other=0.0)
            if twice:
                b_at += share * (b_at - tl.load(p_older + o, mask=mask, other=0.0))
                b_said += share * (b_said - tl.load(p_before_known + o, mask=mask, other=0.0))
            b_state = tl.load(p_state + o, mask=mask, other=0.0)
            b_clean = clipped(b_said + moves * (b_state - b_at), clip, CLIPPED)
            b_mean = tl.load(p_column + MEAN_FROM_X0) * b_clean + tl.load(p_column + MEAN_FROM_STATE_GIVEN_X0) * b_state
            tl.store(p_said + o, b_clean, mask=mask)
            tl.store(p_last + o, b_mean, mask=mask)
            log_std = tl.load(p_column + LOG_STD)
            if LEARNED:
                if served:
                    b_variance = tl.load(p_known + numel + o, mask=mask, other=0.0)
                else:
                    b_variance = tl.load(p_said + numel + o, mask=mask, other=0.0)
                if twice:
                    b_variance += share * (b_variance - tl.load(p_before_known + numel + o, mask=mask, other=0.0))
                tl.store(p_said + numel + o, b_variance, mask=mask)
                log_std = log_std + tl.load(p_column + LOG_STD_SLOPE) * b_variance
            b_std = exp(log_std) + tl.zeros([BLOCK], tl.float32)
            tl.store(p_mean + draft + o, b_mean, mask=mask)
            tl.store(p_std + draft + o, b_std, mask=mask)
            b_next = b_mean + b_std * tl.load(p_noise + here * numel + o, mask=mask, other=0.0)
            tl.store(p_state + numel + o, b_next, mask=mask)
        # The next draft's sums read what other threads have stored.
        tl.debug_barrier()
