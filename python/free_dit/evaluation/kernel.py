"""Kernel two-sample test with the cubic polynomial kernel of the kernel inception distance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Rows of the kernel matrix in memory at a time; the results do not depend on it.
_BLOCK = 1024


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    """``(a . b / D + 1)^3``, the kernel of Binkowski et al., "Demystifying MMD GANs" (2018)."""
    return (a @ b.T / a.shape[1] + 1) ** 3


def _row_sums(a: Tensor, b: Tensor) -> Tensor:
    return torch.cat([_kernel(part, b).sum(1) for part in a.split(_BLOCK)])


def _row_means(a: Tensor, b: Tensor) -> np.ndarray:
    """Mean kernel of each row of ``a`` with the rows of ``b``, another set."""
    return (_row_sums(a, b) / len(b)).cpu().numpy()


def own_means(points: Tensor, strata: np.ndarray) -> np.ndarray:
    """Mean kernel of each point with an independent one of its set's law, without bias; ``[N]``.

    Where the sizes of the strata were fixed, a point has one partner too few in its own stratum, so pairs within a
    stratum get a larger weight. With a single stratum this is the mean over the other points.

    Args:
        points: float64 ``[N, D]``.
        strata: ``[N]``, two or more of each.
    """
    itself = ((points * points).sum(1) / points.shape[1] + 1) ** 3
    sums = _row_sums(points, points) - itself
    for stratum in np.unique(strata):
        rows = torch.from_numpy(np.nonzero(strata == stratum)[0]).to(points.device)
        sums[rows] += (_row_sums(points[rows], points[rows]) - itself[rows]) / (len(rows) - 1)
    return (sums / len(points)).cpu().numpy()


@dataclass(frozen=True)
class KernelMeans:
    """Mean kernels, point by point, from which a set's distance from a reference is computed.

    Attributes:
        own: ``[N]``, :func:`own_means`.
        across: ``[N]``, with the reference.
        reference: ``[M]``, of each reference point with the set.
    """

    own: np.ndarray
    across: np.ndarray
    reference: np.ndarray


def kernel_means(points: Tensor, reference: Tensor, strata: np.ndarray) -> KernelMeans:
    """:class:`KernelMeans` of points float64 ``[N, D]`` with strata ``[N]`` and a reference ``[M, D]``."""
    return KernelMeans(own_means(points, strata), _row_means(points, reference), _row_means(reference, points))


def variance_of_mean(values: np.ndarray, strata: np.ndarray) -> float:
    """Variance of the mean of ``values [N]`` whose strata have fixed, not random, sizes."""
    total = 0.0
    for stratum in np.unique(strata):
        part = values[strata == stratum]
        total += len(part) * float(part.var(ddof=1))
    return total / len(values) ** 2


def _estimate(value: float, variance: float, level: float) -> dict[str, float]:
    from scipy.stats import norm

    margin = norm.ppf((1 + level) / 2) * variance**0.5
    return {"value": value, "low": value - margin, "high": value + margin, "level": level, "se": variance**0.5}


def kernel_distance(
    means: KernelMeans,
    reference_own: np.ndarray,
    strata: np.ndarray,
    reference_strata: np.ndarray,
    level: float = 0.95,
) -> dict[str, float]:
    """Unbiased squared maximum mean discrepancy over all pairs, its standard error and normal interval.

    The error is that of the first-order part of the statistic. Where the laws hardly differ that part vanishes and the
    interval says little: the permutation test is for that. Source: Gretton et al., JMLR 13 (2012), section 3 and
    appendix B.

    Args:
        means: of the set and the reference.
        reference_own: ``[M]``, :func:`own_means` of the reference.
        strata: ``[N]``, labels whose counts were fixed; zeros where nothing was.
        reference_strata: ``[M]``, likewise.
        level: confidence level.
    """
    value = float(means.own.mean() + reference_own.mean() - 2 * means.across.mean())
    variance = 4 * variance_of_mean(means.own - means.across, strata)
    variance += 4 * variance_of_mean(reference_own - means.reference, reference_strata)
    return _estimate(value, variance, level)


def kernel_difference(
    first: KernelMeans,
    second: KernelMeans,
    strata: tuple[np.ndarray, np.ndarray],
    reference_strata: np.ndarray,
    paired: bool = False,
    level: float = 0.95,
) -> dict[str, float]:
    """Distance of the first set minus that of the second from the same reference, whose sampling error partly cancels.

    Args:
        first: means of the first set.
        second: of the second.
        strata: labels of both.
        reference_strata: labels of the reference.
        paired: whether point i of both sets came from the same noise.
        level: confidence level.
    """
    ones, others = first.own - first.across, second.own - second.across
    # The mean kernel within the reference is part of both distances and cancels.
    value = float((first.own - 2 * first.across).mean() - (second.own - 2 * second.across).mean())
    variance = 4 * variance_of_mean(second.reference - first.reference, reference_strata)
    if paired:
        variance += 4 * variance_of_mean(ones - others, strata[0])
    else:
        variance += 4 * (variance_of_mean(ones, strata[0]) + variance_of_mean(others, strata[1]))
    return _estimate(value, variance, level)


def subset_distances(
    points: Tensor, reference: Tensor, subsets: int, size: int, generator: np.random.Generator
) -> dict[str, Any]:
    """Mean and spread of the distance over random subsets, as kernel distances are usually published.

    The spread is that of subsets, which overlap: it is no standard error of the mean. Fixed numbers of each label are
    not allowed for, nor do published values.

    Args:
        points: float64 ``[N, D]``.
        reference: ``[M, D]``.
        subsets: how many.
        size: points of each subset, at most N and M.
        generator: draws them.
    """
    size = min(size, len(points), len(reference))
    values = []
    for _ in range(subsets):
        a, b = (
            one[torch.from_numpy(generator.permutation(len(one))[:size]).to(one.device)] for one in (points, reference)
        )
        own = [own_means(one, np.zeros(size)).mean() for one in (a, b)]
        values.append(sum(own) - 2 * _row_means(a, b).mean())
    return {"mean": float(np.mean(values)), "std": float(np.std(values)), "subsets": subsets, "size": size}


def permutation_p_value(
    first: Tensor,
    second: Tensor,
    permutations: int,
    generator: np.random.Generator,
    strata: tuple[np.ndarray | None, np.ndarray | None] = (None, None),
) -> float:
    """P-value of equal laws by the unbiased squared discrepancy, exact for independent points.

    With strata it permutes within them and tests equal laws within each. Every permuted value is from the same pooled
    kernel matrix. Source: Gretton et al., JMLR 13 (2012); (1 + count) / (1 + permutations) as Phipson and Smyth (2010).

    Args:
        first: float64 ``[N, D]``.
        second: ``[M, D]``.
        permutations: how many.
        generator: draws them.
        strata: labels of both, or None.
    """
    count, other = len(first), len(second)
    pooled = torch.cat([first, second])
    # Centred before the conversion to float32, for less rounding; the order of the permuted statistics is the same.
    kernel = torch.cat([_kernel(part, pooled) for part in pooled.split(_BLOCK)])
    kernel = (kernel - kernel.mean()).float()
    kernel.fill_diagonal_(0.0)
    rows = kernel.sum(1, dtype=torch.float64)
    total = float(rows.sum())
    known = strata[0] is not None and strata[1] is not None
    groups = np.concatenate(strata) if known else np.zeros(count + other, np.int64)
    members = [np.nonzero(groups == group)[0] for group in np.unique(groups)]
    original = np.arange(count + other) < count
    statistics = []
    for begin in range(0, permutations + 1, 128):
        chosen = np.tile(original, (min(128, permutations + 1 - begin), 1))
        for row in chosen[1:] if begin == 0 else chosen:
            for places in members:
                row[places] = original[places][generator.permutation(len(places))]
        picked = torch.from_numpy(chosen).to(kernel)
        within = ((picked @ kernel) * picked).sum(1, dtype=torch.float64)
        linked = picked.double() @ rows
        across = linked - within
        rest = total - linked - across
        statistics.append(within / (count * (count - 1)) + rest / (other * (other - 1)) - 2 * across / (count * other))
    values = torch.cat(statistics).cpu().numpy()
    # Values that are equal up to rounding count as at least as large.
    reached = values[1:] >= values[0] - 1e-9 * np.abs(values).max()
    return float((1 + reached.sum()) / (1 + permutations))
