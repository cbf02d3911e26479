"""What both kernels of ``couple`` compute of a block of elements: transition, noise, shared-slack gap."""

from __future__ import annotations

import triton
import triton.language as tl

from free_kernels.triton.philox import normals

# Columns of a transition table (free_kernels.schedule.TransitionColumn).
MEAN_FROM_STATE, MEAN_FROM_OUTPUT = tl.constexpr(0), tl.constexpr(1)
LOG_STD, LOG_STD_SLOPE = tl.constexpr(2), tl.constexpr(3)
X0_FROM_STATE, X0_FROM_OUTPUT = tl.constexpr(4), tl.constexpr(5)
MEAN_FROM_X0, MEAN_FROM_STATE_GIVEN_X0 = tl.constexpr(6), tl.constexpr(7)
NUM_COLUMNS = tl.constexpr(8)
_LOG2_E = tl.constexpr(1.4426950408889634)
_LN2_HIGH = tl.constexpr(0.693359375)
_LN2_LOW = tl.constexpr(-2.12194440e-4)


@triton.jit
def _exp(x):
    """exp(x); the hardware's exp2 of ``x log2(e)`` would lose the bits that the product rounds away."""
    n = tl.minimum(tl.maximum(tl.floor(x * _LOG2_E + 0.5), -200.0), 200.0)
    return tl.exp((x - n * _LN2_HIGH) - n * _LN2_LOW) * tl.exp2(n)


@triton.jit
def target_mean(
    p_state,
    p_output,
    unconditional,
    p_columns,
    o,
    mask,
    guided_numel,
    scale,
    clip,
    GUIDED: tl.constexpr,
    CLIPPED: tl.constexpr,
):
    """Mean of the target's transition for elements ``o`` of one row; ``p_*`` point at the row."""
    b_state = tl.load(p_state + o, mask=mask, other=0.0)
    b_output = tl.load(p_output + o, mask=mask, other=0.0).to(tl.float32)
    if GUIDED:
        guided = mask & (o < guided_numel)
        b_other = tl.load(p_output + unconditional + o, mask=guided, other=0.0).to(tl.float32)
        # From the nearer end, which rounds least.
        difference = b_output - b_other
        mixed = tl.where(scale < 0.5, b_other + scale * difference, b_output - (1.0 - scale) * difference)
        b_output = tl.where(guided, mixed, b_output)
    if CLIPPED:
        b_x0 = tl.load(p_columns + X0_FROM_STATE) * b_state + tl.load(p_columns + X0_FROM_OUTPUT) * b_output
        # Comparisons let a NaN through, which the sampler looks for in the result.
        b_x0 = tl.where(b_x0 > clip, clip, tl.where(b_x0 < -clip, -clip, b_x0))
        b_mean = tl.load(p_columns + MEAN_FROM_STATE_GIVEN_X0) * b_state + tl.load(p_columns + MEAN_FROM_X0) * b_x0
    else:
        b_mean = tl.load(p_columns + MEAN_FROM_STATE) * b_state + tl.load(p_columns + MEAN_FROM_OUTPUT) * b_output
    return b_mean


@triton.jit
def target_std(p_output, p_columns, o, mask, numel, LEARNED: tl.constexpr):
    """Deviation of the target's transition: a scalar where it is fixed."""
    log_std = tl.load(p_columns + LOG_STD)
    if LEARNED:
        b_variance = tl.load(p_output + numel + o, mask=mask, other=0.0).to(tl.float32)
        log_std = log_std + tl.load(p_columns + LOG_STD_SLOPE) * b_variance
    return _exp(log_std)


@triton.jit
def slack_gap(b_gap_mean, b_std_p, b_std_q, b_z, b_z_slack, share):
    """Shared-slack gap: z1, whitened gap, gap of the means, ratio of the variances, shift and the shared z2's part.

    In units of the draft's deviation: the target keeps the same z2 with what its variance leaves over.
    """
    own, other = tl.sqrt_rn(share), tl.sqrt_rn(1.0 - share)
    b_z1 = own * b_z + other * b_z_slack
    b_z2 = other * b_z - own * b_z_slack
    b_ratio = tl.div_rn(b_std_q, b_std_p)
    b_ratio = b_ratio * b_ratio
    b_excess = b_ratio - share
    b_shift = (tl.sqrt_rn(tl.where(b_excess < 0.0, 0.0, b_excess)) - other) * b_z2
    b_whitened = tl.div_rn(b_gap_mean, b_std_p)
    b_gap = tl.div_rn(b_whitened + b_shift, own)
    return b_z1, b_gap, b_whitened, b_ratio, b_excess, b_shift + other * b_z2


@triton.jit
def noise_block(
    p_noise, row_start, key, o, mask, i_first, PURPOSE: tl.constexpr, BLOCK: tl.constexpr, PHILOX: tl.constexpr
):
    """Noise of elements ``o = i_first + arange(BLOCK)`` of a row, read or made; of no use where masked out.

    ``i_first`` is a multiple of 4.
    """
    if PHILOX:
        b_noise = normals((i_first // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32), key, PURPOSE)
    else:
        b_noise = tl.load(p_noise + row_start + o, mask=mask, other=0.0)
    return b_noise
