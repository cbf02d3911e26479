"""The kernel of ``drafter_tokens``."""

from __future__ import annotations

import triton
import triton.language as tl

_SMALLEST_SQUARE = tl.constexpr(1e-12)


# Timesteps may begin anywhere in a buffer.
@triton.jit(do_not_specialize=["time_unit"], do_not_specialize_on_alignment=["p_t"])
def tokens_kernel(
    p_feature, p_previous, p_state, p_t, p_change_rms, p_out, time_unit, tokens, width, channels, height, across,
    PATCH_H: tl.constexpr, PATCH_W: tl.constexpr, STATE_AT: tl.constexpr, UNIT_AT: tl.constexpr,
    SCALED_AT: tl.constexpr, PARTS: tl.constexpr, STATE_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of one row's tokens; with a unit change every program of a row measures the row's change."""
    numel = channels * height * across
    patch_numel = PARTS * channels * PATCH_H * PATCH_W
    full = width + patch_numel
    blocks = tl.cdiv(tokens * full, BLOCK)
    i_row = (tl.program_id(0) // blocks).to(tl.int64)
    o = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    used = o < tokens * full
    token, place = o // full, o % full
    is_feature = place < width
    p_from = p_feature + (i_row * tokens + token) * width + place
    b_feature = tl.load(p_from, mask=used & is_feature, other=0.0)
    # Which element of the state a place of a patch is: part, channel, line and column.
    inside = tl.maximum(place - width, 0)
    part, element = inside // (channels * PATCH_H * PATCH_W), inside % (channels * PATCH_H * PATCH_W)
    channel, line, column = element // (PATCH_H * PATCH_W), element // PATCH_W % PATCH_H, element % PATCH_W
    per_line = across // PATCH_W
    y, x = token // per_line * PATCH_H + line, token % per_line * PATCH_W + column
    at = i_row * numel + (channel * height + y) * across + x
    of_patch = used & (place >= width)
    b_state = tl.load(p_state + at, mask=of_patch, other=0.0)
    b_change = b_state - tl.load(p_previous + at, mask=of_patch, other=0.0)
    b_patch = tl.zeros([BLOCK], tl.float32)
    if STATE_AT >= 0:
        b_patch = tl.where(part == STATE_AT, b_state, b_patch)
    if UNIT_AT >= 0:
        b_square = tl.zeros([STATE_BLOCK], tl.float32)
        for i in range(0, numel, STATE_BLOCK):
            o_state = i + tl.arange(0, STATE_BLOCK)
            b_now = tl.load(p_state + i_row * numel + o_state, mask=o_state < numel, other=0.0)
            b_before = tl.load(p_previous + i_row * numel + o_state, mask=o_state < numel, other=0.0)
            b_square += (b_now - b_before) * (b_now - b_before)
        size = tl.sqrt_rn(tl.sum(b_square, 0) / numel + _SMALLEST_SQUARE)
        b_patch = tl.where(part == UNIT_AT, b_change / size, b_patch)
    if SCALED_AT >= 0:
        size = tl.load(p_change_rms + tl.load(p_t + i_row) // time_unit)
        b_patch = tl.where(part == SCALED_AT, b_change / size, b_patch)
    b_out = tl.where(is_feature, b_feature, b_patch.to(b_feature.dtype))
    tl.store(p_out + i_row * tokens * full + o, b_out, mask=used)
