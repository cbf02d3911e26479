"""The two kernels of the coupling ops: sums over the elements of every drafted row, then a decision for every slot.

The first writes partial sums ``[sums, S (L - 1), NUM_SPLITS]`` and the second adds them up. There are no atomics, so
every run gives the same bits and all programs of a slot come to the same decision.
"""

from __future__ import annotations

import triton
import triton.language as tl

from free_kernels.ops.coupling.triton_block import at, decide_jointly
from free_kernels.ops.coupling.triton_math import (
    ACROSS,
    LEAST_LEFT,
    NUM_COLUMNS,
    compare_elements,
    compare_rows,
    noise_block,
    target_mean,
    target_std,
)
from free_kernels.ops.random.triton_philox import PURPOSE_ACCEPT, PURPOSE_SLACK, PURPOSE_STEP, uniform_first

# As in free_kernels.ops.coupling.reference: the largest squared gap that is tested.
MAX_GAP_SQ = tl.constexpr(1e30)
# How many sums a row has. With a fixed variance: the first two arguments of ``compare_rows``. With a learned variance:
# all 13 of them; the squared error of the ratios of the variances; the number of elements where the target's variance
# leaves less than LEAST_LEFT.
FIXED_SUMS, LEARNED_SUMS = 2, 15
ERROR_SQ, NARROW = tl.constexpr(13), tl.constexpr(14)

# Integer arguments that change from call to call. Without this a new value could mean a new compilation.
_UNSPECIALIZED = ["slots", "length", "output_rows", "seed_low", "seed_high"] + [
    f"{name}_stride_{axis}" for name in ("relaxation", "uniform") for axis in ("s", "l")
]


@triton.jit
def _joined(b_first, b_second, b_third, b_fourth, b_fifth, b_sixth, b_seventh, b_eighth):
    """``[BLOCK, 8]`` with one argument a column, in their order: each join adds a last axis, which is the fastest."""
    b_even = tl.join(tl.join(b_first, b_fifth), tl.join(b_third, b_seventh))
    b_odd = tl.join(tl.join(b_second, b_sixth), tl.join(b_fourth, b_eighth))
    return tl.reshape(tl.join(b_even, b_odd), [b_first.shape[0], 8])


@triton.jit
def _totals(b_terms):
    """``[sums]`` of ``[BLOCK, sums]``: sums of 16 neighbours, then the sum of these.

    16 neighbours belong to one warp, so only the second sum makes threads wait for one another. The interpreter adds
    one element after the other, where a GPU adds pairs; two sums keep its rounding error small, too.
    """
    b_parts = tl.reshape(b_terms, [b_terms.shape[0] // 16, 16, b_terms.shape[1]])
    return tl.sum(tl.sum(b_parts, 1), 0)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def coupling_rows_kernel(
    p_states, p_draft_mean, p_draft_std, p_noise, p_slack_noise, p_images, p_steps, p_rounds, p_output, p_row_offsets,
    p_columns, p_partials, seed_low, seed_high, slots, length, numel, guided_numel, output_rows, output_stride,
    guidance_scale, clip,
    LEARNED: tl.constexpr, GUIDED: tl.constexpr, CLIPPED: tl.constexpr, PHILOX: tl.constexpr, ROUNDS: tl.constexpr,
    BLOCK: tl.constexpr, CHUNKS: tl.constexpr, NUM_SPLITS: tl.constexpr,
):  # fmt: skip
    """Partial sums of one drafted row over ``CHUNKS * BLOCK`` of its elements."""
    i_split = tl.program_id(0) % NUM_SPLITS
    i_row = tl.program_id(0) // NUM_SPLITS
    drafts = length - 1
    i_slot, i_l = i_row // drafts, i_row % drafts
    first_row = tl.load(p_row_offsets + i_slot)
    # The last row of a slot has no draft, and the commit kernel reads no sums of that row or of rows after it.
    if i_l >= tl.load(p_row_offsets + i_slot + 1) - first_row - 1:
        return

    draft_row = i_row.to(tl.int64)
    state_row = draft_row + i_slot
    row_start = state_row * numel
    p_output_row = p_output + (first_row + i_l) * output_stride
    unconditional = output_rows.to(tl.int64) * output_stride
    p_columns_row = p_columns + state_row * NUM_COLUMNS
    image, step, draw_round = 0, 0, 0
    if PHILOX:
        image, step = tl.load(p_images + i_slot), tl.load(p_steps + state_row)
    if ROUNDS:
        draw_round = tl.load(p_rounds + i_slot)
    key = (seed_low, seed_high, image, step, draw_round)

    b_zero = tl.zeros([BLOCK], tl.float32)
    b_mean_sq, b_gap_z = b_zero, b_zero
    if LEARNED:
        b_gap_slack, b_gap_sq_over_left, b_gap_sq_over_root, b_gap_shared_over_root = b_zero, b_zero, b_zero, b_zero
        b_shared_error_sq, b_gap_error_shared_error, b_gap_error_sq, b_gap_shared_error = b_zero, b_zero, b_zero, b_zero
        b_gap_gap_error, b_noise_shared_error, b_noise_gap_error, b_error_sq, b_narrow = (
            b_zero,
            b_zero,
            b_zero,
            b_zero,
            b_zero,
        )
    for i_chunk in range(CHUNKS):
        i_first = (i_split * CHUNKS + i_chunk) * BLOCK
        o = i_first + tl.arange(0, BLOCK)
        mask = o < numel
        b_mean_p = tl.load(p_draft_mean + draft_row * numel + o, mask=mask, other=0.0)
        b_std_p = tl.load(p_draft_std + draft_row * numel + o, mask=mask, other=1.0)
        b_z = noise_block(p_noise, row_start, key, o, mask, i_first, PURPOSE_STEP, BLOCK, PHILOX)
        given = (p_states + row_start, p_output_row, unconditional, p_columns_row)
        b_mean_q = target_mean(given, o, mask, guided_numel, guidance_scale, clip, GUIDED, CLIPPED)
        if LEARNED:
            b_z_slack = noise_block(p_slack_noise, row_start, key, o, mask, i_first, PURPOSE_SLACK, BLOCK, PHILOX)
            b_std_q = target_std(p_output_row, p_columns_row, o, mask, numel, LEARNED)
            b_gap, b_ratio, b_root, b_error, b_shared = compare_elements(
                b_mean_q - b_mean_p, b_std_p, b_std_q, b_z, b_z_slack, mask
            )
            b_gap_over_root, b_both = tl.div_rn(b_gap, b_root), b_z + b_z_slack
            b_gap_error, b_shared_error = b_gap * b_error, b_shared * b_error
            b_gap_slack += b_gap * b_z_slack
            b_gap_sq_over_left += b_gap_over_root * b_gap_over_root
            b_gap_sq_over_root += b_gap * b_gap_over_root
            b_gap_shared_over_root += b_gap_over_root * b_shared
            b_shared_error_sq += b_shared_error * b_shared_error
            b_gap_error_shared_error += b_gap_error * b_shared_error
            b_gap_error_sq += b_gap_error * b_gap_error
            b_gap_shared_error += b_gap * b_shared_error
            b_gap_gap_error += b_gap * b_gap_error
            b_noise_shared_error += b_both * b_shared_error
            b_noise_gap_error += b_both * b_gap_error
            b_error_sq += (b_ratio - 1.0) * (b_ratio - 1.0)
            # Written so that a NaN counts as too narrow.
            b_narrow += tl.where(b_ratio - ACROSS >= LEAST_LEFT, 0.0, 1.0)
        else:
            b_gap = tl.where(mask, tl.div_rn(b_mean_q - b_mean_p, b_std_p), 0.0)
        b_mean_sq += b_gap * b_gap
        b_gap_z += b_gap * b_z

    p_own = p_partials + draft_row * NUM_SPLITS + i_split
    plane = slots.to(tl.int64) * drafts * NUM_SPLITS
    # All sums in one reduction, because every reduction makes all threads of a program wait for one another.
    if LEARNED:
        b_even = _joined(
            b_mean_sq,
            b_gap_slack,
            b_gap_sq_over_root,
            b_shared_error_sq,
            b_gap_error_sq,
            b_gap_gap_error,
            b_noise_gap_error,
            b_narrow,
        )
        b_odd = _joined(
            b_gap_z,
            b_gap_sq_over_left,
            b_gap_shared_over_root,
            b_gap_error_shared_error,
            b_gap_shared_error,
            b_noise_shared_error,
            b_error_sq,
            b_narrow,
        )
        o_sums = tl.arange(0, 16)
        sums = _totals(tl.reshape(tl.join(b_even, b_odd), [BLOCK, 16]))
        tl.store(p_own + plane * o_sums, sums, mask=o_sums < 15)
    else:
        tl.store(p_own + plane * tl.arange(0, 2), _totals(tl.join(b_mean_sq, b_gap_z)))


@triton.jit
def _sum(partials, i_sum, NUM_SPLITS: tl.constexpr, PADDED_SPLITS: tl.constexpr):
    """Total ``[rows]`` of the partial sums with index ``i_sum``; 0 where a row is not valid.

    ``partials``: pointer to all partial sums; how many there are of each index; the rows; which rows are valid.
    """
    p_partials, plane, o_rows, valid = partials
    o_splits = tl.arange(0, PADDED_SPLITS)
    mask = valid[:, None] & (o_splits < NUM_SPLITS)[None, :]
    p_own = p_partials + plane * i_sum
    return tl.sum(tl.load(p_own + o_rows[:, None] * NUM_SPLITS + o_splits[None, :], mask=mask, other=0.0), 1)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def coupling_commit_kernel(
    p_states, p_draft_mean, p_draft_std, p_noise, p_slack_noise, p_images, p_steps, p_rounds, p_output, p_row_offsets,
    p_columns, p_partials, seed_low, seed_high, slots, length, numel, guided_numel, output_rows, output_stride,
    guidance_scale, clip,
    p_uniform, p_relaxation, p_next_states, p_committed, p_gap_sq,
    relaxation_stride_s, relaxation_stride_l, uniform_stride_s, uniform_stride_l,
    LEARNED: tl.constexpr, GUIDED: tl.constexpr, CLIPPED: tl.constexpr, RELAXED: tl.constexpr, JOINT: tl.constexpr,
    PHILOX: tl.constexpr, ROUNDS: tl.constexpr, BLOCK: tl.constexpr, NUM_BLOCKS: tl.constexpr,
    NUM_SPLITS: tl.constexpr, PADDED_SPLITS: tl.constexpr, PADDED_LENGTH: tl.constexpr,
):  # fmt: skip
    """Decision of one slot, and ``BLOCK`` elements of its new state. Every program of a slot makes the decision anew.

    ``JOINT``: the drafts are decided together (``couple_block``) and not one by one (``couple``).
    """
    i_block = tl.program_id(0) % NUM_BLOCKS
    i_slot = tl.program_id(0) // NUM_BLOCKS
    first_row = tl.load(p_row_offsets + i_slot)
    count = (tl.load(p_row_offsets + i_slot + 1) - first_row).to(tl.int32)
    drafts = length - 1
    wide_slot = i_slot.to(tl.int64)

    o_l = tl.arange(0, PADDED_LENGTH)
    # The second condition keeps reads inside the tensors even if row_offsets are wrong.
    drafted = (o_l < count - 1) & (o_l < drafts)
    draft_rows = wide_slot * drafts + o_l
    partials = (p_partials, slots.to(tl.int64) * drafts * NUM_SPLITS, draft_rows, drafted)
    b_mean_sq = _sum(partials, 0, NUM_SPLITS, PADDED_SPLITS)
    b_gap_z = _sum(partials, 1, NUM_SPLITS, PADDED_SPLITS)
    if LEARNED:
        b_gap_sq, b_along, b_weight_gap, b_weight_error = compare_rows(
            b_mean_sq,
            b_gap_z,
            gap_slack=_sum(partials, 2, NUM_SPLITS, PADDED_SPLITS),
            gap_sq_over_left=_sum(partials, 3, NUM_SPLITS, PADDED_SPLITS),
            gap_sq_over_root=_sum(partials, 4, NUM_SPLITS, PADDED_SPLITS),
            gap_shared_over_root=_sum(partials, 5, NUM_SPLITS, PADDED_SPLITS),
            shared_error_sq=_sum(partials, 6, NUM_SPLITS, PADDED_SPLITS),
            gap_error_shared_error=_sum(partials, 7, NUM_SPLITS, PADDED_SPLITS),
            gap_error_sq=_sum(partials, 8, NUM_SPLITS, PADDED_SPLITS),
            gap_shared_error=_sum(partials, 9, NUM_SPLITS, PADDED_SPLITS),
            gap_gap_error=_sum(partials, 10, NUM_SPLITS, PADDED_SPLITS),
            noise_shared_error=_sum(partials, 11, NUM_SPLITS, PADDED_SPLITS),
            noise_gap_error=_sum(partials, 12, NUM_SPLITS, PADDED_SPLITS),
        )
        b_error_sq = _sum(partials, ERROR_SQ, NUM_SPLITS, PADDED_SPLITS)
        b_narrow = _sum(partials, NARROW, NUM_SPLITS, PADDED_SPLITS)
        feasible = (b_narrow == 0.0) & ((1.0 + b_mean_sq) * (1.0 + b_error_sq) < MAX_GAP_SQ)
    else:
        b_gap_sq, b_along = b_mean_sq, b_gap_z
        feasible = b_gap_sq < MAX_GAP_SQ

    image, draw_round = 0, 0
    if ROUNDS:
        draw_round = tl.load(p_rounds + i_slot)
    # Joint decisions also need the uniform of a slot's last row.
    live = (o_l < count) & (o_l < length)
    if PHILOX:
        image = tl.load(p_images + i_slot)
        b_steps = tl.load(p_steps + wide_slot * length + o_l, mask=live, other=0)
        key = (seed_low, seed_high, image, b_steps, draw_round)
        b_uniform = uniform_first((o_l * 0).to(tl.uint32), key, PURPOSE_ACCEPT)
    else:
        p_draws = p_uniform + wide_slot * uniform_stride_s + o_l * uniform_stride_l
        b_uniform = tl.load(p_draws, mask=live, other=1.0)
    if JOINT:
        first, replaced, ahead = decide_jointly(b_gap_sq, b_along, b_uniform, drafted & feasible, o_l, PADDED_LENGTH)
        chosen = o_l == first
    else:
        if RELAXED:
            p_weights = p_relaxation + wide_slot * relaxation_stride_s + o_l * relaxation_stride_l
            keep = 1.0 - tl.load(p_weights, mask=drafted, other=0.0)
            b_score = keep * b_along - keep * keep * b_gap_sq / 2.0
        else:
            b_score = b_along - b_gap_sq / 2.0
        accepted = drafted & feasible & (tl.log(b_uniform) <= b_score)
        # Where the slot stops: at its first refused draft, else at its last row.
        first = tl.min(tl.where(accepted, PADDED_LENGTH, o_l), 0)
        chosen = o_l == first
        replaced = (tl.sum((chosen & drafted & feasible).to(tl.int32), 0) > 0) & (count > 0)
        gap_sq = at(b_gap_sq, chosen)
        ahead = -2.0 * tl.div_rn(at(b_along, chosen), tl.where(gap_sq > 0.0, gap_sq, 1.0))

    if i_block == 0:
        tl.store(p_committed + i_slot, tl.where(count > 0, first + 1, 0).to(tl.int64))
        within = o_l < drafts
        tl.store(p_gap_sq + draft_rows, b_gap_sq, mask=within)

    # An idle slot reads nothing, because its first row may lie past the end of a tensor. Its state is zero.
    i_first = i_block * BLOCK
    o = i_first + tl.arange(0, BLOCK)
    mask = o < tl.where(count > 0, numel, 0)
    state_row = wide_slot * length + first
    row_start = state_row * numel
    p_output_row = p_output + (first_row + first) * output_stride
    p_columns_row = p_columns + state_row * NUM_COLUMNS
    step = 0
    if PHILOX:
        step = tl.load(p_steps + state_row)
    key = (seed_low, seed_high, image, step, draw_round)
    b_z = noise_block(p_noise, row_start, key, o, mask, i_first, PURPOSE_STEP, BLOCK, PHILOX)
    given = (p_states + row_start, p_output_row, output_rows.to(tl.int64) * output_stride, p_columns_row)
    b_mean_q = target_mean(given, o, mask, guided_numel, guidance_scale, clip, GUIDED, CLIPPED)
    b_std_q = target_std(p_output_row, p_columns_row, o, mask, numel, LEARNED)
    b_next = b_mean_q + b_std_q * b_z
    if replaced:
        p_draft = (wide_slot * drafts + first) * numel + o
        b_mean_p = tl.load(p_draft_mean + p_draft, mask=mask, other=0.0)
        b_std_p = tl.load(p_draft_std + p_draft, mask=mask, other=1.0)
        b_lead = b_mean_q - b_mean_p
        if LEARNED:
            b_z_slack = noise_block(p_slack_noise, row_start, key, o, mask, i_first, PURPOSE_SLACK, BLOCK, PHILOX)
            b_gap, _, _, b_error, b_shared = compare_elements(b_lead, b_std_p, b_std_q, b_z, b_z_slack, mask)
            of_gap, of_error = at(b_weight_gap, chosen), at(b_weight_error, chosen)
            # Added to z and not to the gap, which may be so large that the sum would round the shift away.
            b_shift = b_error * (b_shared + of_error * b_gap) - of_gap * b_gap
            b_z, b_lead = b_z + b_shift, b_std_p * (b_gap + b_shift)
        b_next = b_mean_q + b_std_p * b_z + ahead * b_lead
    tl.store(p_next_states + wide_slot * numel + o, tl.where(count > 0, b_next, 0.0), mask=o < numel)
