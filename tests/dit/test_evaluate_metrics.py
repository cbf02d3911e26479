"""Figures of the evaluation against closed forms, and their intervals and tests against what they promise."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.stats import binom, norm

from free_dit.evaluation import manifolds
from free_dit.evaluation.bootstrap import Sample, bootstrap, score
from free_dit.evaluation.kernel import (
    kernel_difference,
    kernel_distance,
    kernel_means,
    own_means,
    permutation_p_value,
    subset_distances,
)
from free_dit.evaluation.manifolds import precision_and_recall
from free_dit.quality import frechet_distance, weighted_moments

# Each statistical bound below is left with this probability by correct code.
FALSE_ALARM = 1e-5


def sample_of(features: np.ndarray) -> Sample:
    return Sample(features, np.log(np.full((len(features), 2), 0.5)), np.zeros(len(features), np.int64))


def points(generator: np.random.Generator, *shape: int) -> torch.Tensor:
    return torch.from_numpy(generator.normal(size=shape))


def test_moments_of_wide_features_are_those_of_narrow_ones():
    generator = np.random.default_rng(0)
    features, counts = generator.normal(size=(40, 70)) + 3, generator.integers(0, 4, (3, 40)).astype(float)
    counts *= 40 / counts.sum(1, keepdims=True)
    mean, covariance = weighted_moments(features, counts)
    for i, count in enumerate(counts):
        np.testing.assert_allclose(mean[i], np.average(features, axis=0, weights=count))
        np.testing.assert_allclose(covariance[i], np.cov(features.T, aweights=count, ddof=0) * 40 / 39, atol=1e-12)
    narrow = weighted_moments(features[:, :9], counts)
    np.testing.assert_allclose(narrow[1], covariance[:, :9, :9], atol=1e-12)


def difference_of(first: np.ndarray, second: np.ndarray, reference: np.ndarray, paired: bool = False, level=0.9):
    found = bootstrap(
        {"first": sample_of(first), "second": sample_of(second)},
        reference,
        np.zeros(len(reference), np.int64),
        resamples=100,
        seed=0,
        paired=paired,
    )
    assert found["first"]["frechet"].sampled == pytest.approx(frechet_distance(first, reference))
    return (found["first"]["frechet"] - found["second"]["frechet"]).estimate(level)


def test_intervals_of_differences_cover_at_their_level():
    """First set N(1, 1.5^2), second N(0.5, 1), reference N(0, 1) in 2 dimensions: 2 (1 + 0.25) - 2 (0.25) = 2."""
    runs, hits, misses, generator = 150, 0, 0, np.random.default_rng(1)
    for _ in range(runs):
        first, second = 1.5 * generator.normal(size=(150, 2)) + 1, generator.normal(size=(150, 2)) + 0.5
        estimate = difference_of(first, second, generator.normal(size=(60, 2)))
        hits += estimate.low <= 2 <= estimate.high
        # Negative control: another truth.
        misses += estimate.low <= 1 <= estimate.high
    # Three percent for the bootstrap's own error with 60 points and 100 resamples.
    least = binom.ppf(FALSE_ALARM, runs, 0.87)
    assert least <= hits <= binom.isf(FALSE_ALARM, runs, 0.93)
    assert misses < least


def test_a_shared_reference_and_shared_noise_narrow_a_difference():
    generator = np.random.default_rng(2)
    first, reference = generator.normal(size=(800, 3)), generator.normal(size=(80, 3))
    second = first + 0.05 * generator.normal(size=first.shape)
    unpaired, paired = (difference_of(first, second, reference, flag) for flag in (False, True))
    assert paired.high - paired.low < (unpaired.high - unpaired.low) / 2
    same = difference_of(first, first, reference, paired=True)
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_score_of_known_tables():
    sure = np.log(np.clip(np.eye(5)[np.arange(50) % 5], 1e-300, None))
    ones = np.ones((1, 50))
    assert score(sure, ones) == pytest.approx(5)
    assert score(np.tile(sure[:1], (50, 1)), ones) == pytest.approx(1)
    assert score(np.log(np.full((50, 5), 0.2)), ones) == pytest.approx(1)
    generator = np.random.default_rng(3)
    table = generator.dirichlet(np.ones(4), 30)
    divergence = (table * np.log(table / table.mean(0))).sum(1).mean()
    assert score(np.log(table), np.ones((1, 30))) == pytest.approx(np.exp(divergence))
    # A row that counts twice is a row that is there twice.
    twice = np.ones((1, 30))
    twice[0, 7] = 2
    assert score(np.log(table), twice) == pytest.approx(score(np.log(np.vstack([table, table[7]])), np.ones((1, 31))))


def cubic(a: np.ndarray, b: np.ndarray) -> float:
    return float((a @ b / len(a) + 1) ** 3)


def test_kernel_distance_is_the_mean_over_all_pairs():
    generator = np.random.default_rng(4)
    a, b = points(generator, 9, 3) + 0.5, points(generator, 7, 3)
    own = [np.mean([cubic(x, y) for x, y in itertools.permutations(one.numpy(), 2)]) for one in (a, b)]
    across = np.mean([cubic(x, y) for x in a.numpy() for y in b.numpy()])
    zeros = np.zeros(9, np.int64), np.zeros(7, np.int64)
    found = kernel_distance(kernel_means(a, b, zeros[0]), own_means(b, zeros[1]), *zeros)
    assert found["value"] == pytest.approx(sum(own) - 2 * across)
    everything = subset_distances(a[:7], b, 2, 1000, generator)
    assert everything["std"] == pytest.approx(0, abs=1e-9)
    assert everything["size"] == 7


def population_kernel(mean_a: float, mean_b: float) -> float:
    """E (x y + 1)^3 of independent x ~ N(mean_a, 1), y ~ N(mean_b, 1)."""
    moments = [(1, m, m**2 + 1, m**3 + 3 * m) for m in (mean_a, mean_b)]
    return sum(c * x * y for c, x, y in zip((1, 3, 3, 1), *moments, strict=True))


def test_kernel_distance_has_no_bias_and_its_interval_covers():
    truth = population_kernel(0.8, 0.8) + population_kernel(0, 0) - 2 * population_kernel(0.8, 0)
    runs, generator, values, hits = 400, np.random.default_rng(5), [], 0
    zeros = np.zeros(120, np.int64)
    for _ in range(runs):
        a, b = points(generator, 120, 1) + 0.8, points(generator, 120, 1)
        found = kernel_distance(kernel_means(a, b, zeros), own_means(b, zeros), zeros, zeros, 0.9)
        values.append(found["value"])
        hits += found["low"] <= truth <= found["high"]
    error = np.std(values) / np.sqrt(runs)
    assert abs(np.mean(values) - truth) < norm.isf(FALSE_ALARM / 2) * error
    # The statistic is skewed at this size: five percent for the normal interval.
    assert binom.ppf(FALSE_ALARM, runs, 0.85) <= hits <= binom.isf(FALSE_ALARM, runs, 0.95)


def test_fixed_numbers_of_each_label_leave_no_bias():
    labels, runs, generator = np.arange(40) % 4, 300, np.random.default_rng(6)
    centres = torch.from_numpy(2.0 * np.eye(4)[labels])
    right, wrong = [], []
    for _ in range(runs):
        a, b = (centres + points(generator, 40, 4) for _ in range(2))
        for strata, values in ((labels, right), (np.zeros(40, np.int64), wrong)):
            values.append(kernel_distance(kernel_means(a, b, strata), own_means(b, strata), strata, strata)["value"])
    bound = norm.isf(FALSE_ALARM / 2) / np.sqrt(runs)
    assert abs(np.mean(right)) < bound * np.std(right)
    # Negative control: as if labels had been left to chance.
    assert np.mean(wrong) < -2 * bound * np.std(wrong)


def test_the_interval_of_a_kernel_difference():
    """Covers the truth where both sets are the same noise moved; a set against itself in pairs is zero exactly."""
    truth = population_kernel(0.3, 0.3) - 2 * population_kernel(0.3, 0)
    truth -= population_kernel(0, 0) - 2 * population_kernel(0, 0)
    runs, generator, hits = 200, np.random.default_rng(7), 0
    # A small reference, whose chance is most of it. Cubes are skewed: ten percent for the normal interval.
    zeros, few = np.zeros(300, np.int64), np.zeros(60, np.int64)
    for _ in range(runs):
        reference, noise = points(generator, 60, 1), points(generator, 300, 1)
        first, second = (kernel_means(noise + shift, reference, zeros) for shift in (0.3, 0.0))
        found = kernel_difference(first, second, (zeros, zeros), few, True, 0.9)
        hits += found["low"] <= truth <= found["high"]
    assert binom.ppf(FALSE_ALARM, runs, 0.8) <= hits <= binom.isf(FALSE_ALARM, runs, 0.95)
    same = kernel_difference(first, first, (zeros, zeros), few, True)
    assert (same["value"], same["se"]) == (0, 0)
    assert kernel_difference(first, first, (zeros, zeros), few)["se"] > 0


@pytest.mark.parametrize("stratified", [False, True])
def test_permutation_p_values_under_equal_and_other_laws(stratified):
    runs, permutations, generator = 200, 59, np.random.default_rng(8)
    labels = (np.arange(30) % 3, np.arange(24) % 3)
    # Within strata only the laws of the strata count.
    shifts = [3.0 * torch.from_numpy(one)[:, None] if stratified else 0.0 for one in labels]
    p_values, found = [], 0
    for _ in range(runs):
        a, b = points(generator, 30, 2) + shifts[0], points(generator, 24, 2) + shifts[1]
        strata = labels if stratified else (None, None)
        p_values.append(permutation_p_value(a, b, permutations, generator, strata))
        found += permutation_p_value(a + 1.0, b, permutations, generator, strata) <= 0.05
    for level in (0.05, 0.1, 0.25, 0.5, 0.75):
        rejected = sum(p <= level + 1e-12 for p in p_values)
        assert binom.ppf(FALSE_ALARM, runs, level) <= rejected <= binom.isf(FALSE_ALARM, runs, level)
    # Negative control: the bound on rejections at 5 % that equal laws keep.
    assert found > 2 * binom.isf(FALSE_ALARM, runs, 0.05)


def test_the_permuted_statistic_is_the_kernel_distance():
    """Exhaustively: 3 against 2 points have 10 splits; the p-value is the rank of the given one among them."""
    generator = np.random.default_rng(9)
    pooled = points(generator, 5, 2)

    def distance(chosen: tuple[int, ...]) -> float:
        a, b = pooled[list(chosen)], pooled[[i for i in range(5) if i not in chosen]]
        zeros = np.zeros(3, np.int64), np.zeros(2, np.int64)
        return kernel_distance(kernel_means(a, b, zeros[0]), own_means(b, zeros[1]), *zeros)["value"]

    values = [distance(chosen) for chosen in itertools.combinations(range(5), 3)]
    expected = np.mean([value >= values[0] - 1e-12 for value in values])
    permutations = 4000
    found = permutation_p_value(pooled[:3], pooled[3:], permutations, generator)
    assert abs(found - expected) < norm.isf(FALSE_ALARM / 2) * 0.5 / np.sqrt(permutations) + 1 / permutations


def brute_force(samples: np.ndarray, reference: np.ndarray, neighbours: int) -> list[float]:
    shares = []
    for queries, manifold in ((samples, reference), (reference, samples)):
        apart = np.linalg.norm(manifold[:, None] - manifold[None], axis=2)
        radius = np.sort(apart, 1)[:, neighbours]
        inside = np.linalg.norm(queries[:, None] - manifold[None], axis=2) <= radius
        shares.append(inside.any(1).mean())
    return shares


def test_precision_and_recall_of_constructed_sets(monkeypatch):
    monkeypatch.setattr(manifolds, "_BLOCK_ELEMENTS", 100)  # many blocks
    generator = np.random.default_rng(10)
    cluster, far = points(generator, 60, 2), points(generator, 40, 2) + 100
    both = torch.cat([cluster, far])
    # Samples of one of two modes: precise, and 60 % recalled. The other way around likewise.
    precise, recalled = precision_and_recall(cluster, both)
    assert (precise.mean(), recalled.mean()) == (1.0, 0.6)
    precise, recalled = precision_and_recall(both, cluster)
    assert (precise.mean(), recalled.mean()) == (0.6, 1.0)
    for one in precision_and_recall(cluster, far):
        assert not one.any()
    for k in (1, 3, 5):
        samples, reference = generator.normal(size=(70, 3)) + 0.5, generator.normal(size=(50, 3))
        found = precision_and_recall(torch.from_numpy(samples), torch.from_numpy(reference), k)
        assert [one.mean() for one in found] == brute_force(samples, reference, k)
    # Copies of a few points, far from the origin: radii of zero still hold their own point.
    copies = torch.from_numpy(generator.normal(size=(3, 40)) + 1e3).repeat(5, 1)
    for one in precision_and_recall(copies, copies.flip(0)):
        assert one.all()
