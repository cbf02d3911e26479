"""What both coupling kernels compute: the target's transition, noise, and how a draft differs from the target."""

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
def exp(x):
    """exp(x). The hardware's ``exp2(x log2(e))`` alone would lose the digits that rounding the product drops."""
    n = tl.minimum(tl.maximum(tl.floor(x * _LOG2_E + 0.5), -200.0), 200.0)
    return tl.exp((x - n * _LN2_HIGH) - n * _LN2_LOW) * tl.exp2(n)


@triton.jit
def guided_output(p_output, unconditional, o, mask, guided_numel, scale, GUIDED: tl.constexpr):
    """Elements ``o`` of a row's output, float32; the unconditional row lies ``unconditional`` elements after it."""
    b_output = tl.load(p_output + o, mask=mask, other=0.0).to(tl.float32)
    if GUIDED:
        guided = mask & (o < guided_numel)
        b_other = tl.load(p_output + unconditional + o, mask=guided, other=0.0).to(tl.float32)
        # Written from the end that the result is nearer to, which has the smaller rounding error.
        difference = b_output - b_other
        mixed = tl.where(scale < 0.5, b_other + scale * difference, b_output - (1.0 - scale) * difference)
        b_output = tl.where(guided, mixed, b_output)
    return b_output


@triton.jit
def clipped(b_x0, clip, CLIPPED: tl.constexpr):
    """Clean samples within their bound, where there is one."""
    if CLIPPED:
        # These comparisons leave a NaN as it is; the sampler looks for it in the result.
        b_x0 = tl.where(b_x0 > clip, clip, tl.where(b_x0 < -clip, -clip, b_x0))
    return b_x0


@triton.jit
def transition_mean(b_state, b_output, p_columns, clip, CLIPPED: tl.constexpr):
    """Mean of a transition from states and guided outputs."""
    if CLIPPED:
        b_x0 = tl.load(p_columns + X0_FROM_STATE) * b_state + tl.load(p_columns + X0_FROM_OUTPUT) * b_output
        b_x0 = clipped(b_x0, clip, CLIPPED)
        b_mean = tl.load(p_columns + MEAN_FROM_STATE_GIVEN_X0) * b_state + tl.load(p_columns + MEAN_FROM_X0) * b_x0
    else:
        b_mean = tl.load(p_columns + MEAN_FROM_STATE) * b_state + tl.load(p_columns + MEAN_FROM_OUTPUT) * b_output
    return b_mean


@triton.jit
def target_mean(given, o, mask, guided_numel, scale, clip, GUIDED: tl.constexpr, CLIPPED: tl.constexpr):
    """Mean of the target's transition for elements ``o`` of one row.

    ``given``: pointers to the row's state and to its output; how many elements after that the unconditional output is;
    pointer to the row's columns.
    """
    p_state, p_output, unconditional, p_columns = given
    b_state = tl.load(p_state + o, mask=mask, other=0.0)
    b_output = guided_output(p_output, unconditional, o, mask, guided_numel, scale, GUIDED)
    return transition_mean(b_state, b_output, p_columns, clip, CLIPPED)


@triton.jit
def target_std(p_output, p_columns, o, mask, numel, LEARNED: tl.constexpr):
    """Standard deviation of the target's transition; a scalar if it is fixed."""
    log_std = tl.load(p_columns + LOG_STD)
    if LEARNED:
        b_variance = tl.load(p_output + numel + o, mask=mask, other=0.0).to(tl.float32)
        log_std = log_std + tl.load(p_columns + LOG_STD_SLOPE) * b_variance
    return exp(log_std)


@triton.jit
def compare_elements(b_gap_mean, b_std_p, b_std_q, b_z, b_z_slack, mask):
    """Draft and target for a block of elements, in units of the draft's deviation.

    Returns:
        Gap m of the means, 0 where masked out; ratio of the target's variance to the draft's; root of what that leaves
        after the compared half; error e of that root, from the root if the ratio were 1; shared noise v.
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
    mean_sq, gap_z, gap_slack, gap_sq_over_left, gap_sq_over_root, gap_shared_over_root,
    shared_error_sq, gap_error_shared_error, gap_error_sq, gap_shared_error, gap_gap_error,
    noise_shared_error, noise_gap_error,
):  # fmt: skip
    """delta^2, ``<z1, Delta>`` and two weights of rows from sums over their elements.

    With m the gap of the means, e the error of the shared root, v the noise ``sqrt(1/2) (z - z')``, the arguments are
    the sums of m m, m z, m z', m m / root^2, m m / root, m v / root, (e v)^2, (e m) (e v), (e m)^2, m (e v), m (e m),
    (z + z') (e v), (z + z') (e m). ``free_kernels.ops.coupling.reference.compare_variances`` derives the formulas. Here
    its lead is multiplied out, ``m + e (v + b m) - a m`` with weights a and b: one pass over the elements is enough.
    """
    directed = mean_sq > SMALLEST_MEAN_GAP_SQ
    inverse = tl.where(directed, tl.div_rn(1.0, tl.sqrt_rn(tl.where(directed, mean_sq, 1.0))), 0.0)
    kappa = tl.where(directed, gap_sq_over_left * inverse * inverse, 1.0 / (1.0 - ACROSS))
    error = tl.div_rn(1.0, kappa) - (1.0 - ACROSS)
    longest = tl.sqrt_rn(error * error + 4.0 * mean_sq)
    size = tl.abs(error)
    shared_p = tl.div_rn(size, tl.where(directed, size + longest, 1.0))
    shared_p = tl.where(shared_p < -error, -error, shared_p) + LEAST_SHARED
    shared_p = tl.where(directed, shared_p, 1.0 - ACROSS)
    own = 1.0 - shared_p
    kept_p, kept_q = tl.sqrt_rn(shared_p), tl.sqrt_rn(kappa * (error + shared_p))

    z_u, slack_u = inverse * gap_z, inverse * gap_slack
    z2_u = kept_p * z_u - tl.sqrt_rn(own) * slack_u
    turned = z2_u - ROOT_ACROSS * (z_u - slack_u)
    w_z2 = inverse * gap_shared_over_root + turned * inverse * inverse * gap_sq_over_root
    moved = tl.div_rn((1.0 - kept_q) * w_z2, kappa) + (kept_p - ROOT_ACROSS) * z2_u
    a, b = moved * inverse, turned * inverse

    kept = 1.0 - a
    lead_u = inverse * (kept * mean_sq + gap_shared_error + b * gap_gap_error)
    lead_sq = kept * kept * mean_sq + shared_error_sq + b * b * gap_error_sq
    lead_sq += 2.0 * (kept * gap_shared_error + b * (kept * gap_gap_error + gap_error_shared_error))
    gap_sq = lead_sq / ACROSS + (tl.div_rn(1.0, own) - 1.0 / ACROSS) * lead_u * lead_u
    along = (
        kept * (gap_z + gap_slack)
        + noise_shared_error
        + b * noise_gap_error
        + (tl.sqrt_rn(tl.div_rn(shared_p, own)) - 1.0) * slack_u * lead_u
    )
    # Rounding may make delta^2 negative; a NaN stays.
    return tl.where(gap_sq < 0.0, 0.0, gap_sq), along, a, b


@triton.jit
def noise_block(
    p_noise, row_start, key, o, mask, i_first, PURPOSE: tl.constexpr, BLOCK: tl.constexpr, PHILOX: tl.constexpr
):
    """Noise of elements ``o = i_first + arange(BLOCK)`` of a row, loaded or made; any value where masked out.

    ``i_first`` is a multiple of 4, because the generator makes four elements at a time.
    """
    if PHILOX:
        b_noise = normals((i_first // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32), key, PURPOSE)
    else:
        b_noise = tl.load(p_noise + row_start + o, mask=mask, other=0.0)
    return b_noise
