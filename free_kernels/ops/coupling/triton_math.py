"""What both kernels of ``couple`` compute: transition and noise of a block of elements, gap of a drafted row."""

from __future__ import annotations

import triton
import triton.language as tl

from free_kernels.constants import TransitionColumn
from free_kernels.ops.random.triton_philox import normals

# Columns of a transition table (free_kernels.constants.TransitionColumn).
MEAN_FROM_STATE = tl.constexpr(int(TransitionColumn.MEAN_FROM_STATE))
MEAN_FROM_OUTPUT = tl.constexpr(int(TransitionColumn.MEAN_FROM_OUTPUT))
LOG_STD = tl.constexpr(int(TransitionColumn.LOG_STD))
LOG_STD_SLOPE = tl.constexpr(int(TransitionColumn.LOG_STD_SLOPE))
X0_FROM_STATE = tl.constexpr(int(TransitionColumn.X0_FROM_STATE))
X0_FROM_OUTPUT = tl.constexpr(int(TransitionColumn.X0_FROM_OUTPUT))
MEAN_FROM_X0 = tl.constexpr(int(TransitionColumn.MEAN_FROM_X0))
MEAN_FROM_STATE_GIVEN_X0 = tl.constexpr(int(TransitionColumn.MEAN_FROM_STATE_GIVEN_X0))
NUM_COLUMNS = tl.constexpr(len(TransitionColumn))
# As in free_kernels.ops.coupling.reference.
ACROSS, ROOT_ACROSS = tl.constexpr(0.5), tl.constexpr(0.5**0.5)
LEAST_LEFT, LEAST_SHARED = tl.constexpr(1 / 64), tl.constexpr(1 / 1024)
SMALLEST_MEAN_GAP_SQ = tl.constexpr(1e-24)
_LOG2_E = tl.constexpr(1.4426950408889634)
_LN2_HIGH = tl.constexpr(0.693359375)
_LN2_LOW = tl.constexpr(-2.12194440e-4)


@triton.jit
def _exp(x):
    """exp(x); the hardware's exp2 of ``x log2(e)`` would lose the bits that the product rounds away."""
    n = tl.minimum(tl.maximum(tl.floor(x * _LOG2_E + 0.5), -200.0), 200.0)
    return tl.exp((x - n * _LN2_HIGH) - n * _LN2_LOW) * tl.exp2(n)


@triton.jit
def target_mean(given, o, mask, guided_numel, scale, clip, GUIDED: tl.constexpr, CLIPPED: tl.constexpr):
    """Mean of the target's transition for elements ``o`` of one row.

    ``given``: pointers to the row's state and to its output; how many elements after that the unconditional output is;
    pointer to the row's columns.
    """
    p_state, p_output, unconditional, p_columns = given
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
def compare_elements(b_gap_mean, b_std_p, b_std_q, b_z, b_z_slack, mask):
    """Of elements: gap of the means, ratio of the variances, root of what the target shares, its error, shared noise.

    In units of the draft's deviation; 0 where masked out, but for ratio and root.
    """
    b_gap = tl.where(mask, tl.div_rn(b_gap_mean, b_std_p), 0.0)
    b_ratio = tl.where(mask, tl.div_rn(b_std_q, b_std_p), 1.0)
    b_ratio = b_ratio * b_ratio
    b_left = b_ratio - ACROSS
    b_root = tl.sqrt_rn(tl.where(b_left < LEAST_LEFT, LEAST_LEFT, b_left))
    b_error = tl.div_rn(b_ratio - 1.0, b_root + ROOT_ACROSS)
    b_shared = ROOT_ACROSS * (b_z - b_z_slack)
    return b_gap, b_ratio, b_root, b_error, b_shared


@triton.jit
def compare_rows(
    mean_sq, along_z, along_slack, over_left, over_root, shared_root,
    e_shared_sq, e_sq_shared, e_sq, e_m_shared, e_m_sq, e_shared_z, e_z,
):  # fmt: skip
    """delta^2, ``<z1, Delta>`` and two weights of rows from sums over their elements.

    With m the gap of the means, e the error of the shared root, v the noise ``sqrt(1/2) (z - z')``, in this order: sums
    of m m, m z, m z', m m / root^2, m m / root, m v / root, (e v)^2, (e m) (e v), (e m)^2, m (e v), m (e m),
    (z + z') (e v), (z + z') (e m). The lead is ``m + e (v + b m) - a m`` with the weights a, b: as
    ``free_kernels.ops.coupling.reference.compare_variances`` has it, which says why, multiplied out for one pass.
    """
    directed = mean_sq > SMALLEST_MEAN_GAP_SQ
    inverse = tl.where(directed, tl.div_rn(1.0, tl.sqrt_rn(tl.where(directed, mean_sq, 1.0))), 0.0)
    kappa = tl.where(directed, over_left * inverse * inverse, 1.0 / (1.0 - ACROSS))
    error = tl.div_rn(1.0, kappa) - (1.0 - ACROSS)
    longest = tl.sqrt_rn(error * error + 4.0 * mean_sq)
    size = tl.abs(error)
    shared_p = tl.div_rn(size, tl.where(directed, size + longest, 1.0))
    shared_p = tl.where(shared_p < -error, -error, shared_p) + LEAST_SHARED
    shared_p = tl.where(directed, shared_p, 1.0 - ACROSS)
    own = 1.0 - shared_p
    kept_p, kept_q = tl.sqrt_rn(shared_p), tl.sqrt_rn(kappa * (error + shared_p))

    z_u, slack_u = inverse * along_z, inverse * along_slack
    z2_u = kept_p * z_u - tl.sqrt_rn(own) * slack_u
    turned = z2_u - ROOT_ACROSS * (z_u - slack_u)
    w_z2 = inverse * shared_root + turned * inverse * inverse * over_root
    moved = tl.div_rn((1.0 - kept_q) * w_z2, kappa) + (kept_p - ROOT_ACROSS) * z2_u
    a, b = moved * inverse, turned * inverse

    kept = 1.0 - a
    lead_u = inverse * (kept * mean_sq + e_m_shared + b * e_m_sq)
    lead_sq = kept * kept * mean_sq + e_shared_sq + b * b * e_sq
    lead_sq += 2.0 * (kept * e_m_shared + b * (kept * e_m_sq + e_sq_shared))
    gap_sq = lead_sq / ACROSS + (tl.div_rn(1.0, own) - 1.0 / ACROSS) * lead_u * lead_u
    along = (
        kept * (along_z + along_slack)
        + e_shared_z
        + b * e_z
        + (tl.sqrt_rn(tl.div_rn(shared_p, own)) - 1.0) * slack_u * lead_u
    )
    # Rounding may leave a little less than nothing; a NaN stays.
    return tl.where(gap_sq < 0.0, 0.0, gap_sq), along, a, b


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
