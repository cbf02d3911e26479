"""Estimates with confidence intervals."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from free_kernels.validation import check_float, fail


@dataclass(frozen=True)
class Estimate:
    """An estimate and its interval.

    Attributes:
        value: the estimate.
        low: lower end.
        high: upper end.
        level: confidence level of the interval.
    """

    value: float
    low: float
    high: float
    level: float


def check_level(where: str, level: float) -> float:
    """A confidence level in (0, 1)."""
    if not 0.0 < check_float(where, "level", level, 0.0) < 1.0:
        fail(where, "level", "in (0, 1)", f"{level:g}")
    return float(level)


def share_interval(indicator: np.ndarray, level: float) -> Estimate:
    """Share of True in bool ``[N]`` with Wilson's score interval (JASA 22, 1927)."""
    from scipy.stats import binomtest

    right, count = int(indicator.sum()), len(indicator)
    interval = binomtest(right, count).proportion_ci(level, method="wilson")
    return Estimate(right / count, float(interval.low), float(interval.high), level)
