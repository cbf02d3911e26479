"""The decision of block verification inside a kernel; ``ops.coupling.reference_block`` derives the formulas.

Computed in float64, on a few numbers for each slot. A slot can stop at a row only if the row's uniform is below its
weight P, so a weight smaller than every uniform need not be accurate.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Larger logarithms of ratios count as _LARGEST_SCORE: after a huge one, rounding would lose the sum of those before it.
# Squared gaps are held between the other two; a gap of NaN counts as the largest.
_LARGEST_SCORE, _SMALLEST_GAP_SQ, _LARGEST_GAP_SQ = tl.constexpr(1e4), tl.constexpr(1e-60), tl.constexpr(1e36)
# As in free_kernels.ops.coupling.reference_block.
_RADIUS, _SECTIONS, _SECTION_STEPS = tl.constexpr(12.0), tl.constexpr(64), tl.constexpr(5)
# The probability that a standard normal is larger is 0 in float64.
_FARTHEST = tl.constexpr(40.0)


@triton.jit
def upper_tail(t):
    """``P(N(0, 1) > t)`` in float64; relative error at most ``1.6e-15 (1 + t^2 / 2)`` for t > 0, 1e-15 for t < 0.

    ``(1 + t) exp(t^2 / 2) P`` is expanded in a Chebyshev series of degree 21 in ``(t - 5) / (t + 5)``, whose
    coefficients are converted to those of powers and evaluated by Horner's rule.
    """
    size = tl.abs(t)
    size = tl.where(size < _FARTHEST, size, _FARTHEST)
    inverse = 1.0 / ((size + 5.0) * (size + 1.0))
    y = (size - 5.0) * (size + 1.0) * inverse
    b_p = (y * 2.2070652717459774e-09 + 2.0752306874165582e-09) * y - 2.54667816805072e-08
    b_p = (b_p * y - 2.259986670943523e-08) * y + 1.8846163807542468e-07
    b_p = (b_p * y + 1.2293076767873598e-07) * y - 1.3004549261799018e-06
    b_p = (b_p * y - 6.622356838353682e-08) * y + 9.055745037072721e-06
    b_p = (b_p * y - 9.898304711862822e-06) * y - 5.360602125091952e-05
    b_p = (b_p * y + 0.00018233490375638885) * y + 7.79121440702919e-06
    b_p = (b_p * y - 0.0016760725071201736) * y + 0.0065220007252342425
    b_p = (b_p * y - 0.015170415382194151) * y + 0.024536963238891124
    b_p = (b_p * y - 0.026401042967610918) * y + 0.010002352385413518
    b_p = (b_p * y + 0.031030368425996276) * y - 0.09155228183401112
    b_p = b_p * y + 0.46151582985003764
    tail = tl.exp(-0.5 * size * size) * (b_p * ((size + 5.0) * inverse))
    return tl.where(t < 0.0, 1.0 - tail, tail)


@triton.jit
def mass_beyond(a, delta, t):
    """Mass of ``a q - p`` above t, where t is at or above the residual's lower end; q has mean 0 and p mean -delta."""
    mass = a * upper_tail(t) - upper_tail(t + delta)
    return tl.where(mass > 0.0, mass, 0.0)


@triton.jit
def _larger(a, b):
    return tl.where(a > b, a, b)


@triton.jit
def at(b_values, chosen):
    """The value of a vector at the one place where ``chosen`` is true; 0 if there is none. Other values may be NaN."""
    return tl.sum(tl.where(chosen, b_values, 0.0), 0)


@triton.jit
def draw_residual(a, delta, low, level):
    """The point above which ``a q - p`` has mass ``level``: a draw of the residual, whose lower end is ``low``."""
    low = tl.where(low > -_RADIUS, low, -_RADIUS)
    width = tl.cast(2.0 * _RADIUS, tl.float64)
    o = tl.arange(0, _SECTIONS)
    for _ in range(_SECTION_STEPS):
        width = width / _SECTIONS
        beyond = mass_beyond(a, delta, low + width * (o + 1)) > level
        # There are only _SECTIONS - 1 inner edges.
        low = low + width * tl.sum((beyond & (o < _SECTIONS - 1)).to(tl.int32), 0)
    return low + 0.5 * width


@triton.jit
def decide_jointly(b_gap_sq, b_along, b_uniform, tested, o_l, PADDED_LENGTH: tl.constexpr):
    """The row at which a slot stops, and where along the lead its residual is, if its new state is drawn from one.

    Args:
        b_gap_sq: ``[rows]``, delta^2.
        b_along: ``[rows]``, ``<z1, Delta>``.
        b_uniform: ``[rows]``, in (0, 1]; entry 0 draws the residual.
        tested: rows that have a draft and shared slack; at least one row has not.
        o_l: numbers of the rows.
        PADDED_LENGTH: their count.

    Returns:
        The last committed row; whether its new state is drawn from the residual and not directly from the target; how
        many times the lead that residual is ahead of what the target draws with the draft's noise.
    """
    # The first row whose step is drawn directly. Rows after it do not count.
    last = tl.min(tl.where(tested, PADDED_LENGTH, o_l), 0)
    before = o_l < last
    gap_sq = tl.where(before, b_gap_sq, 1.0).to(tl.float64)
    gap_sq = tl.where(gap_sq < _LARGEST_GAP_SQ, gap_sq, _LARGEST_GAP_SQ)
    gap_sq = tl.where(gap_sq > _SMALLEST_GAP_SQ, gap_sq, _SMALLEST_GAP_SQ)
    along = tl.where(before, b_along, 0.0).to(tl.float64)
    score = along - 0.5 * gap_sq
    # Written so that a NaN becomes the lowest score.
    score = tl.where(score > -_LARGEST_SCORE, tl.where(score < _LARGEST_SCORE, score, _LARGEST_SCORE), -_LARGEST_SCORE)
    # log P of each row: the sum of the scores of the drafts before it, held at or below 0 after each of them.
    walk = tl.cumsum(score, 0) - score
    log_a = walk - tl.associative_scan(walk, 0, _larger)
    a = tl.where(o_l <= last, tl.exp(log_a), 0.0)
    delta = tl.sqrt(gap_sq)
    low = -0.5 * delta - log_a / delta
    mass = tl.where(before, mass_beyond(a, delta, low), a)
    missing = 1.0 - a
    # Where P is 1, the threshold is 1 too, even if the mass is 0.
    certain = missing <= 0.0
    threshold = tl.where(certain, 1.0, mass / tl.where(certain, 1.0, mass + missing))
    stop = tl.max(tl.where(b_uniform.to(tl.float64) <= threshold, o_l, 0), 0)

    ahead = tl.cast(0.0, tl.float64)
    if stop < last:
        chosen = o_l == stop
        at_delta, at_low, at_mass = at(delta, chosen), at(low, chosen), at(mass, chosen)
        # The threshold of row 0 is 1, so its uniform is not needed for a test and is used for the draw.
        level = at_mass * at(b_uniform, o_l == 0).to(tl.float64)
        drawn = draw_residual(at(a, chosen), at_delta, at_low, level)
        ahead = (drawn - at(along, chosen) / at_delta) / at_delta
    return stop, stop < last, ahead.to(tl.float32)
