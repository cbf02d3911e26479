"""The kernel of ``adaptive_norm``."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _sum(p_x, p_update, p_gate, o, used, UPDATED: tl.constexpr, GATED: tl.constexpr):
    """The residual sum of a block of a token."""
    b_x = tl.load(p_x + o, mask=used, other=0.0).to(tl.float32)
    if UPDATED:
        b_update = tl.load(p_update + o, mask=used, other=0.0).to(tl.float32)
        if GATED:
            b_update *= tl.load(p_gate + o, mask=used, other=0.0).to(tl.float32)
        b_x += b_update
    return b_x


# Places differ from call to call of one network.
@triton.jit(do_not_specialize=["tokens", "updates", "count", "gate_at", "shift_at", "scale_at", "gain_at"])
def norm_kernel(
    p_x, p_update, p_modulations, p_skip, p_sum, p_out, tokens, updates, width, count,
    gate_at, shift_at, scale_at, gain_at, eps,
    UPDATED: tl.constexpr, GATED: tl.constexpr, SKIPS: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token of all rows' tokens, with one of ``updates``; ``WHOLE``: in one block, which stays in registers."""
    i = tl.program_id(0).to(tl.int64)
    p_row = p_modulations + i // tokens * count * width
    p_gate, p_shift, p_scale = p_row + gate_at * width, p_row + shift_at * width, p_row + scale_at * width
    p_gain = p_row + gain_at * width
    p_x += i * width
    p_sum += i * width
    p_out += i * width
    if UPDATED:
        p_update += i % updates * width
    if SKIPS:
        p_skip += i * width
    o = tl.arange(0, BLOCK)
    b_x = _sum(p_x, p_update, p_gate, o, o < width, UPDATED, GATED)
    tl.store(p_sum + o, b_x, mask=o < width)
    if WHOLE:
        mean = tl.sum(b_x, 0) / width
        b_centred = tl.where(o < width, b_x - mean, 0.0)
        variance = tl.sum(b_centred * b_centred, 0) / width
    else:
        b_total = b_x
        for first in range(BLOCK, width, BLOCK):
            used = first + o < width
            b_x = _sum(p_x, p_update, p_gate, first + o, used, UPDATED, GATED)
            tl.store(p_sum + first + o, b_x, mask=used)
            b_total += b_x
        mean = tl.sum(b_total, 0) / width
        b_square = tl.zeros([BLOCK], tl.float32)
        for first in range(0, width, BLOCK):
            used = first + o < width
            b_x = _sum(p_x, p_update, p_gate, first + o, used, UPDATED, GATED)
            b_centred = tl.where(used, b_x - mean, 0.0)
            b_square += b_centred * b_centred
        variance = tl.sum(b_square, 0) / width
    inverse = 1.0 / tl.sqrt_rn(variance + eps)
    for first in range(0, width, BLOCK):
        used = first + o < width
        if not WHOLE:
            b_x = _sum(p_x, p_update, p_gate, first + o, used, UPDATED, GATED)
        b_shift = tl.load(p_shift + first + o, mask=used, other=0.0).to(tl.float32)
        b_scale = tl.load(p_scale + first + o, mask=used, other=0.0).to(tl.float32)
        b_out = b_shift + b_scale * ((b_x - mean) * inverse)
        if SKIPS:
            b_gain = tl.load(p_gain + first + o, mask=used, other=0.0).to(tl.float32)
            b_out += b_gain * tl.load(p_skip + first + o, mask=used, other=0.0).to(tl.float32)
        tl.store(p_out + first + o, b_out, mask=used)
