"""The kernels of a round: what it begins with, drafts from outputs, its tally, renewed slots.

Drafts of given outputs are independent from element to element, so programs share a state's elements and go through
the drafts with theirs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from free_kernels.ops.coupling.triton_math import NUM_COLUMNS, guided_output, target_std, transition_mean
from free_kernels.ops.triton_masks import where_also

# As in free_kernels.ops.drafting.reference.
_LARGEST_GAP_SQ = tl.constexpr(1e30)


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
        used = where_also(mask, drafted)
        b_output = guided_output(p_row, unconditional, o, used, guided_numel, guidance_scale, GUIDED)
        b_mean = transition_mean(b_state, b_output, p_columns_row, clip, CLIPPED)
        b_std = target_std(p_row, p_columns_row, o, used, numel, LEARNED) + tl.zeros([BLOCK], tl.float32)
        b_next = b_mean + b_std * tl.load(p_noise + place * numel + o, mask=used, other=0.0)
        tl.store(p_mean + draft * numel + o, b_mean, mask=used)
        tl.store(p_std + draft * numel + o, b_std, mask=used)
        tl.store(p_states + (place + 1) * numel + o, b_next, mask=used)
        # A draft that is not made here is there already, or is of no interest.
        b_there = tl.load(p_states + (place + 1) * numel + o, mask=where_also(mask, row < 0), other=0.0)
        b_state = tl.where(drafted, b_next, b_there)


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


@triton.jit(do_not_specialize=["length", "num_steps"])
def open_kernel(
    p_state, p_current, p_timesteps, p_table, p_steps, p_network_steps, p_columns, p_states, length, num_steps, numel,
    PADDED_LENGTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of one slot's state; the first program of a slot has its steps and coefficients, too."""
    blocks = tl.cdiv(numel, BLOCK)
    i_slot, i_block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    o = i_block * BLOCK + tl.arange(0, BLOCK)
    b_state = tl.load(p_state + i_slot * numel + o, mask=o < numel, other=0.0)
    tl.store(p_states + i_slot * length * numel + o, b_state, mask=o < numel)
    if i_block == 0:
        o_l = tl.arange(0, PADDED_LENGTH)
        mask = o_l < length
        step = tl.minimum(tl.load(p_current + i_slot) + o_l, num_steps - 1)
        tl.store(p_steps + i_slot * length + o_l, step, mask=mask)
        tl.store(p_network_steps + i_slot * length + o_l, tl.load(p_timesteps + step, mask=mask, other=0), mask=mask)
        for column in tl.static_range(NUM_COLUMNS):
            b_column = tl.load(p_table + step * NUM_COLUMNS + column, mask=mask, other=0.0)
            tl.store(p_columns + (i_slot * length + o_l) * NUM_COLUMNS + column, b_column, mask=mask)


@triton.jit(do_not_specialize=["slots"])
def renew_kernel(p_steps, p_images, p_numbers, p_indices, p_rounds, p_fresh, slots, BLOCK: tl.constexpr):
    """A block of slots."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = o < slots
    b_fresh = tl.load(p_steps + o, mask=mask, other=1) == 0
    image = tl.maximum(tl.load(p_images + o, mask=mask, other=0), 0)
    tl.store(p_indices + o, tl.load(p_numbers + image, mask=mask, other=0), mask=mask)
    tl.store(p_rounds + o, tl.where(b_fresh, 0, tl.load(p_rounds + o, mask=mask, other=0) + 1), mask=mask)
    tl.store(p_fresh + o, b_fresh, mask=mask)


@triton.jit(do_not_specialize=["rows", "length", "draft"])
def rows_kernel(
    p_states, p_timesteps, p_active, p_out, p_out_t, rows, length, draft, numel,
    BRANCHES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of one row's state, for every branch; the first program of a row has its timestep, too."""
    blocks = tl.cdiv(numel, BLOCK)
    i_row, i_block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    o = i_block * BLOCK + tl.arange(0, BLOCK)
    slot = i_row
    if p_active is not None:
        slot = tl.load(p_active + i_row)
    place = slot * length + draft
    b_state = tl.load(p_states + place * numel + o, mask=o < numel, other=0.0)
    t = tl.load(p_timesteps + place)
    for branch in tl.static_range(BRANCHES):
        to_row = branch * rows + i_row
        tl.store(p_out + to_row * numel + o, b_state, mask=o < numel)
        if i_block == 0:
            tl.store(p_out_t + to_row, t)
