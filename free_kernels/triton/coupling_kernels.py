"""The two kernels of ``couple``: reductions of every drafted row, then decision and commit of every slot.

Between them travel the row pass's partial sums, ``[figures, S (L - 1), NUM_SPLITS]``: no atomics, so that every run
gives the same bits, and every program of a slot comes to the same decision.
"""

from __future__ import annotations

import triton
import triton.language as tl

from free_kernels.triton.coupling_math import NUM_COLUMNS, noise_block, slack_gap, target_mean, target_std
from free_kernels.triton.philox import PURPOSE_ACCEPT, PURPOSE_SLACK, PURPOSE_STEP, uniform_first

# A squared gap beyond which a draft is refused outright: its acceptance probability is zero in any arithmetic.
MAX_GAP_SQ = tl.constexpr(1e30)
# Partial figures, in this order; the last three only with slack.
GAP_SQ, ALONG, MEAN_GAP_SQ, ERROR_SQ, SMALLEST = (tl.constexpr(i) for i in range(5))

# Sizes that change from call to call must not compile a kernel anew.
_UNSPECIALIZED = ["slots", "length", "output_rows", "seed_low", "seed_high"] + [
    f"{name}_stride_{axis}" for name in ("slack", "relaxation", "uniform") for axis in ("s", "l")
]


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def coupling_rows_kernel(
    p_states,
    p_draft_mean,
    p_draft_std,
    p_noise,
    p_slack_noise,
    p_images,
    p_steps,
    p_rounds,
    p_output,
    p_row_offsets,
    p_columns,
    p_slack,
    p_partials,
    seed_low,
    seed_high,
    slots,
    length,
    numel,
    guided_numel,
    output_rows,
    output_stride,
    slack_stride_s,
    slack_stride_l,
    guidance_scale,
    clip,
    LEARNED: tl.constexpr,
    SLACK: tl.constexpr,
    GUIDED: tl.constexpr,
    CLIPPED: tl.constexpr,
    PHILOX: tl.constexpr,
    ROUNDS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
):
    """Partial figures of one drafted row over ``CHUNKS * BLOCK`` of its elements."""
    i_split = tl.program_id(0) % NUM_SPLITS
    i_row = tl.program_id(0) // NUM_SPLITS
    drafts = length - 1
    i_slot, i_l = i_row // drafts, i_row % drafts
    first_row = tl.load(p_row_offsets + i_slot)
    # The last row of a slot has no draft, and the commit pass looks at no partials from there on.
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
    if SLACK:
        share = tl.load(p_slack + i_slot.to(tl.int64) * slack_stride_s + i_l * slack_stride_l)

    b_gap_sq = tl.zeros([BLOCK], tl.float32)
    b_along = tl.zeros([BLOCK], tl.float32)
    b_mean_gap_sq = tl.zeros([BLOCK], tl.float32)
    b_error_sq = tl.zeros([BLOCK], tl.float32)
    b_smallest = tl.full([BLOCK], float("inf"), tl.float32)
    for i_chunk in range(CHUNKS):
        i_first = (i_split * CHUNKS + i_chunk) * BLOCK
        o = i_first + tl.arange(0, BLOCK)
        mask = o < numel
        b_mean_p = tl.load(p_draft_mean + draft_row * numel + o, mask=mask, other=0.0)
        b_std_p = tl.load(p_draft_std + draft_row * numel + o, mask=mask, other=1.0)
        b_z = noise_block(p_noise, row_start, key, o, mask, i_first, PURPOSE_STEP, BLOCK, PHILOX)
        b_mean_q = target_mean(
            p_states + row_start,
            p_output_row,
            unconditional,
            p_columns_row,
            o,
            mask,
            guided_numel,
            guidance_scale,
            clip,
            GUIDED,
            CLIPPED,
        )
        if SLACK:
            b_z_slack = noise_block(p_slack_noise, row_start, key, o, mask, i_first, PURPOSE_SLACK, BLOCK, PHILOX)
            b_std_q = target_std(p_output_row, p_columns_row, o, mask, numel, LEARNED)
            b_z1, b_gap, b_whitened, b_ratio, b_excess, _ = slack_gap(
                b_mean_q - b_mean_p, b_std_p, b_std_q, b_z, b_z_slack, share
            )
            b_mean_gap_sq += tl.where(mask, b_whitened * b_whitened, 0.0)
            b_error_sq += tl.where(mask, (b_ratio - 1.0) * (b_ratio - 1.0), 0.0)
            # A NaN may get lost here; the sum of squares above keeps it.
            b_smallest = tl.minimum(b_smallest, tl.where(mask, b_excess, float("inf")))
        else:
            b_z1 = b_z
            b_gap = tl.div_rn(b_mean_q - b_mean_p, b_std_p)
        b_gap_sq += tl.where(mask, b_gap * b_gap, 0.0)
        b_along += tl.where(mask, b_z1 * b_gap, 0.0)

    p_own = p_partials + draft_row * NUM_SPLITS + i_split
    plane = slots.to(tl.int64) * drafts * NUM_SPLITS
    tl.store(p_own + plane * GAP_SQ, tl.sum(b_gap_sq, 0))
    tl.store(p_own + plane * ALONG, tl.sum(b_along, 0))
    if SLACK:
        tl.store(p_own + plane * MEAN_GAP_SQ, tl.sum(b_mean_gap_sq, 0))
        tl.store(p_own + plane * ERROR_SQ, tl.sum(b_error_sq, 0))
        tl.store(p_own + plane * SMALLEST, tl.min(b_smallest, 0))


@triton.jit
def _figure(p_figure, o_rows, valid, NUM_SPLITS: tl.constexpr, PADDED_SPLITS: tl.constexpr, padding):
    """``[rows, splits]`` partials of one figure; whatever is not valid is ``padding``."""
    o_splits = tl.arange(0, PADDED_SPLITS)
    mask = valid[:, None] & (o_splits < NUM_SPLITS)[None, :]
    return tl.load(p_figure + o_rows[:, None] * NUM_SPLITS + o_splits[None, :], mask=mask, other=padding)


@triton.jit
def _at(b_values, chosen):
    """The one value of a vector where ``chosen`` holds, whatever the others are; 0 if there is none."""
    return tl.sum(tl.where(chosen, b_values, 0.0), 0)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def coupling_commit_kernel(
    p_states,
    p_draft_mean,
    p_draft_std,
    p_noise,
    p_slack_noise,
    p_images,
    p_steps,
    p_rounds,
    p_output,
    p_row_offsets,
    p_columns,
    p_slack,
    p_partials,
    seed_low,
    seed_high,
    slots,
    length,
    numel,
    guided_numel,
    output_rows,
    output_stride,
    slack_stride_s,
    slack_stride_l,
    guidance_scale,
    clip,
    p_uniform,
    p_relaxation,
    p_next_states,
    p_committed,
    p_gap_sq,
    p_figures,
    relaxation_stride_s,
    relaxation_stride_l,
    uniform_stride_s,
    uniform_stride_l,
    LEARNED: tl.constexpr,
    SLACK: tl.constexpr,
    GUIDED: tl.constexpr,
    CLIPPED: tl.constexpr,
    RELAXED: tl.constexpr,
    PHILOX: tl.constexpr,
    ROUNDS: tl.constexpr,
    BLOCK: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    PADDED_SPLITS: tl.constexpr,
    PADDED_LENGTH: tl.constexpr,
):
    """Decision of one slot, which each of its programs comes to by itself, and ``BLOCK`` elements of its new state."""
    i_block = tl.program_id(0) % NUM_BLOCKS
    i_slot = tl.program_id(0) // NUM_BLOCKS
    first_row = tl.load(p_row_offsets + i_slot)
    count = (tl.load(p_row_offsets + i_slot + 1) - first_row).to(tl.int32)
    drafts = length - 1
    wide_slot = i_slot.to(tl.int64)

    o_l = tl.arange(0, PADDED_LENGTH)
    # The second bound keeps reads inside the tensors whatever the offsets say.
    drafted = (o_l < count - 1) & (o_l < drafts)
    draft_rows = wide_slot * drafts + o_l
    plane = slots.to(tl.int64) * drafts * NUM_SPLITS
    b_gap_sq = tl.sum(_figure(p_partials + plane * GAP_SQ, draft_rows, drafted, NUM_SPLITS, PADDED_SPLITS, 0.0), 1)
    b_along = tl.sum(_figure(p_partials + plane * ALONG, draft_rows, drafted, NUM_SPLITS, PADDED_SPLITS, 0.0), 1)
    if SLACK:
        p_slack_slot = p_slack + wide_slot * slack_stride_s
        b_mean_gap_sq = tl.sum(
            _figure(p_partials + plane * MEAN_GAP_SQ, draft_rows, drafted, NUM_SPLITS, PADDED_SPLITS, 0.0), 1
        )
        b_error_sq = tl.sum(
            _figure(p_partials + plane * ERROR_SQ, draft_rows, drafted, NUM_SPLITS, PADDED_SPLITS, 0.0), 1
        )
        # Padding splits must not be the smallest.
        b_smallest = tl.min(
            _figure(p_partials + plane * SMALLEST, draft_rows, drafted, NUM_SPLITS, PADDED_SPLITS, float("inf")), 1
        )
        feasible = (b_smallest >= 0.0) & (b_mean_gap_sq + b_error_sq < MAX_GAP_SQ)
    else:
        feasible = b_gap_sq < MAX_GAP_SQ

    if RELAXED:
        p_weights = p_relaxation + wide_slot * relaxation_stride_s + o_l * relaxation_stride_l
        keep = 1.0 - tl.load(p_weights, mask=drafted, other=0.0)
        b_score = keep * b_along - keep * keep * b_gap_sq / 2.0
    else:
        b_score = b_along - b_gap_sq / 2.0
    image, draw_round = 0, 0
    if ROUNDS:
        draw_round = tl.load(p_rounds + i_slot)
    if PHILOX:
        image = tl.load(p_images + i_slot)
        b_steps = tl.load(p_steps + wide_slot * length + o_l, mask=drafted, other=0)
        key = (seed_low, seed_high, image, b_steps, draw_round)
        b_uniform = uniform_first((o_l * 0).to(tl.uint32), key, PURPOSE_ACCEPT)
    else:
        p_draws = p_uniform + wide_slot * uniform_stride_s + o_l * uniform_stride_l
        b_uniform = tl.load(p_draws, mask=drafted, other=1.0)
    accepted = drafted & feasible & (tl.log(b_uniform) <= b_score)
    # The first row that stops: a refused draft, or the last row.
    first = tl.min(tl.where(accepted, PADDED_LENGTH, o_l), 0)
    chosen = o_l == first
    reflects = (tl.sum((chosen & drafted & feasible).to(tl.int32), 0) > 0) & (count > 0)
    gap_sq = _at(b_gap_sq, chosen)
    coefficient = 2.0 * tl.div_rn(_at(b_along, chosen), tl.where(gap_sq > 0.0, gap_sq, 1.0))

    if i_block == 0:
        tl.store(p_committed + i_slot, tl.where(count > 0, first + 1, 0).to(tl.int64))
        within = o_l < drafts
        tl.store(p_gap_sq + draft_rows, b_gap_sq, mask=within)
        if SLACK:
            figure_plane = slots.to(tl.int64) * drafts
            b_share = tl.load(p_slack_slot + o_l * slack_stride_l, mask=drafted, other=1.0)
            b_shrinkage = tl.where(drafted, 1.0 - b_share - b_smallest, 0.0)
            tl.store(p_figures + draft_rows, b_mean_gap_sq, mask=within)
            tl.store(p_figures + figure_plane + draft_rows, b_error_sq, mask=within)
            tl.store(p_figures + 2 * figure_plane + draft_rows, b_shrinkage, mask=within)

    # An idle slot reads nothing, for its rows may lie past the end, and its state is zero.
    i_first = i_block * BLOCK
    o = i_first + tl.arange(0, BLOCK)
    mask = (o < numel) & (count > 0)
    state_row = wide_slot * length + first
    row_start = state_row * numel
    p_output_row = p_output + (first_row + first) * output_stride
    p_columns_row = p_columns + state_row * NUM_COLUMNS
    step = 0
    if PHILOX:
        step = tl.load(p_steps + state_row)
    key = (seed_low, seed_high, image, step, draw_round)
    b_z = noise_block(p_noise, row_start, key, o, mask, i_first, PURPOSE_STEP, BLOCK, PHILOX)
    b_mean_q = target_mean(
        p_states + row_start,
        p_output_row,
        output_rows.to(tl.int64) * output_stride,
        p_columns_row,
        o,
        mask,
        guided_numel,
        guidance_scale,
        clip,
        GUIDED,
        CLIPPED,
    )
    b_std_q = target_std(p_output_row, p_columns_row, o, mask, numel, LEARNED)
    b_next = b_mean_q + b_std_q * b_z
    if reflects:
        p_draft = (wide_slot * drafts + first) * numel + o
        b_mean_p = tl.load(p_draft_mean + p_draft, mask=mask, other=0.0)
        b_std_p = tl.load(p_draft_std + p_draft, mask=mask, other=1.0)
        if SLACK:
            share = tl.load(p_slack_slot + first * slack_stride_l)
            b_z_slack = noise_block(p_slack_noise, row_start, key, o, mask, i_first, PURPOSE_SLACK, BLOCK, PHILOX)
            b_z1, b_gap, _, _, _, b_shared = slack_gap(b_mean_q - b_mean_p, b_std_p, b_std_q, b_z, b_z_slack, share)
            b_from = b_mean_q + b_std_p * b_shared
            b_root = tl.sqrt_rn(share) * b_std_p
        else:
            b_z1, b_from, b_root = b_z, b_mean_q, b_std_p
            b_gap = tl.div_rn(b_mean_q - b_mean_p, b_std_p)
        b_next = b_from + b_root * (b_z1 - coefficient * b_gap)
    tl.store(p_next_states + wide_slot * numel + o, tl.where(count > 0, b_next, 0.0), mask=o < numel)
