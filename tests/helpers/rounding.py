"""How far results may be off by rounding alone: from the format, the sizes of what is added and the number of terms."""

from __future__ import annotations

import torch
from scipy.stats import norm
from torch import Tensor


def largest_normal(count: int, false_alarm: float = 1e-6) -> float:
    """What the largest of ``count`` normal errors exceeds with a probability of ``false_alarm``, in deviations."""
    return float(norm.isf(false_alarm / (2 * count)))


def attention_rounding(q: Tensor, k: Tensor, v: Tensor, scale: float, *ring: Tensor | None) -> float:
    """How far two correct attentions may be apart, whatever luck one of them has against float64.

    A score of size S is rounded when it is scaled, when the largest is taken off it (up to 2 S) and when the exponent's
    base is changed (2 S): two spacings of float32 times S, and as much, relatively, in its weight. A mean of values up
    to V moves by V times that. In the result's own format the weights, which sum to 1, are rounded by half a spacing;
    that of the mean itself is in either's error.

    Args:
        q: ``[R, T, H, Dh]``.
        k: likewise, as v.
        v: likewise.
        scale: of the scores.
        ring: keys and values of earlier steps, ``[R, C, T, H, Dh]`` with NaN in slots out of use.
    """
    keys, values = k.double(), v.double()
    if len(ring) >= 2 and ring[0] is not None and ring[1] is not None:
        keys, values = (
            torch.cat([own, held.double().flatten(1, 2)], 1).nan_to_num(0.0)
            for own, held in ((keys, ring[0]), (values, ring[1]))
        )
    score = float(torch.einsum("rqhd,rkhd->rhqk", q.double(), keys).abs().max()) * scale
    single, own = torch.finfo(torch.float32).eps, torch.finfo(q.dtype).eps
    return float(values.abs().max()) * (2 * score * single + own / 2)
