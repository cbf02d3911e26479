"""Distance between laws of actions given an observation, over several observations."""

from __future__ import annotations

import numpy as np

from free_dit.evaluation.intervals import Estimate, check_level
from free_kernels.validation import check_int, fail


def _pooled_distances(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Euclidean distances of all draws of an observation, ``[M, 2 n, 2 n]``."""
    from scipy.spatial.distance import cdist

    pooled = np.concatenate([first, second], axis=1).reshape(len(first), 2 * first.shape[1], -1).astype(np.float64)
    return np.stack([cdist(one, one) for one in pooled])


def _energies(distances: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Unbiased energy distance of each observation, ``[M]``, where ``first [M, 2 n]`` says which draws are whose."""
    n = first.shape[1] // 2
    one, two = first.astype(np.float64), 1.0 - first
    within = np.einsum("mi,mij,mj->m", one, distances, one) + np.einsum("mi,mij,mj->m", two, distances, two)
    return 2 * np.einsum("mi,mij,mj->m", one, distances, two) / n**2 - within / (n * (n - 1))


def energy_distance(
    first: np.ndarray,
    second: np.ndarray,
    *,
    permutations: int = 1000,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[Estimate, float]:
    """Mean energy distance ``2 E|X - Y| - E|X - X'| - E|Y - Y'|`` over observations, and a p-value of equal laws.

    It is unbiased, so that equal laws give values around 0 of either sign. The interval is a percentile bootstrap over
    observations; the p-value is exact: draws are exchanged between the two sets within each observation. Source:
    Szekely and Rizzo, "Energy statistics", J. Stat. Plan. Inference 143 (2013).

    Args:
        first: ``[M, n, ...]``, n independent draws at each of M observations, n >= 2.
        second: alike, at the same observations and independent of the first.
        permutations: how many.
        resamples: of the bootstrap.
        level: of the interval.
        seed: of both.

    Raises:
        ValueError: the two are not of one shape, or have too few draws.
    """
    where = "energy_distance"
    check_int(where, "permutations", permutations, 1)
    check_int(where, "resamples", resamples, 1)
    check_level(where, level)
    if first.shape != second.shape or first.ndim < 3 or first.shape[1] < 2:
        fail(where, "first, second", "[M, n, ...] of one shape with n >= 2", f"{first.shape}, {second.shape}")
    generator, distances = np.random.default_rng(seed), _pooled_distances(first, second)
    count, draws = len(first), first.shape[1]
    mine = np.tile(np.arange(2 * draws) < draws, (count, 1))
    found = _energies(distances, mine)
    exchanged = np.array([_energies(distances, generator.permuted(mine, axis=1)).mean() for _ in range(permutations)])
    # Values that are equal up to rounding count as at least as large.
    reached = exchanged >= found.mean() - 1e-12 * np.abs(distances).max()
    means = found[generator.integers(count, size=(resamples, count))].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    estimate = Estimate(float(found.mean()), float(low), float(high), level)
    return estimate, float((1 + reached.sum()) / (1 + permutations))
