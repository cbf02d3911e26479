"""Figures of several sets over joint bootstrap resamples, so that their differences have intervals as well."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from free_dit.quality import Estimate, frechet_of_moments, resampled_counts, weighted_moments, widened

# Resamples drawn at a time; part of the result, as it orders the random numbers.
CHUNK = 50


@dataclass
class Sample:
    """What the bootstrap needs of one set.

    Attributes:
        features: float64 ``[N, D]``.
        log_probabilities: float64 ``[N, K]``, log softmax of the logits.
        shares: indicators ``[N]`` by name, whose means are figures.
        reference_shares: indicators ``[M]`` by name, over the reference's points.
        strata: ``[N]``, labels whose counts were fixed, or zeros.
    """

    features: np.ndarray
    log_probabilities: np.ndarray
    strata: np.ndarray
    shares: dict[str, np.ndarray] = field(default_factory=dict)
    reference_shares: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Resampled:
    """A figure of a set and of its resamples.

    Attributes:
        sampled: of the set itself.
        values: ``[R]``.
        biased: whether sampling moves the figure on average, so that resampling shows by how much.
    """

    sampled: float
    values: np.ndarray
    biased: bool

    def __sub__(self, other: Resampled) -> Resampled:
        return Resampled(self.sampled - other.sampled, self.values - other.values, self.biased)

    def estimate(self, level: float) -> Estimate:
        """Basic bootstrap interval (Davison and Hinkley 1997, section 5.2); a biased figure without its bias."""
        low, high = np.quantile(self.values, [(1 - level) / 2, (1 + level) / 2])
        value = 2 * self.sampled - self.values.mean() if self.biased else self.sampled
        return Estimate(*(float(one) for one in (value, 2 * self.sampled - high, 2 * self.sampled - low)), level)


def score(log_probabilities: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """``exp(mean KL(p(y|x) || p(y)))``, at least 1, of rows ``[N, K]`` that count ``[R, N]`` times; ``[R]``.

    Source: Salimans et al., "Improved Techniques for Training GANs" (2016), with whatever network the rows come from.
    """
    probabilities = np.exp(log_probabilities)
    total = counts.sum(1, keepdims=True)
    negative_entropy = counts @ (probabilities * log_probabilities).sum(1) / total[:, 0]
    marginal = counts @ probabilities / total
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.where(marginal > 0, np.log(marginal), 0.0)
    return np.exp(negative_entropy - (marginal * logs).sum(1))


def bootstrap(
    samples: dict[str, Sample],
    reference: np.ndarray | tuple[np.ndarray, np.ndarray],
    reference_strata: np.ndarray | None,
    *,
    resamples: int,
    seed: int,
    paired: bool,
) -> dict[str, dict[str, Resampled]]:
    """Figures of every set over the same resamples of the reference.

    Manifolds of precision and recall are held fixed, as a point drawn twice would have itself for a neighbour.

    Args:
        samples: sets by name.
        reference: features ``[M, D]``, or (mean, covariance), which are then held fixed.
        reference_strata: ``[M]``, or None for statistics.
        resamples: R, at least 2.
        seed: of the resampling.
        paired: whether image i of every set came from the same noise: all sets are then resampled alike.

    Returns:
        ``"frechet"``, ``"score"`` and the names of the shares, for each set.
    """
    fixed = isinstance(reference, tuple)
    kept: dict[str, dict[str, list[np.ndarray]]] = {name: {} for name in samples}
    generators = {name: np.random.default_rng([seed, 1 if paired else 1 + i]) for i, name in enumerate(samples)}
    for_reference = np.random.default_rng([seed, 0])

    def figures(sample: Sample, counts: np.ndarray, features: np.ndarray, other, other_counts) -> dict[str, np.ndarray]:
        values = {
            "frechet": frechet_of_moments(*weighted_moments(features, counts), *other),
            "score": score(sample.log_probabilities, counts),
        }
        values |= {name: counts @ share / len(share) for name, share in sample.shares.items()}
        if other_counts is not None:
            values |= {name: other_counts @ one / len(one) for name, one in sample.reference_shares.items()}
        return values

    once = None if fixed else np.ones((1, len(reference)))
    moments = tuple(part[None] for part in reference) if fixed else weighted_moments(reference, once)
    sampled = {
        name: figures(sample, np.ones((1, len(sample.features))), sample.features, moments, once)
        for name, sample in samples.items()
    }
    wide = {name: widened(sample.features, sample.strata) for name, sample in samples.items()}
    wide_reference = None if fixed else widened(reference, reference_strata)
    for begin in range(0, resamples, CHUNK):
        number = min(CHUNK, resamples - begin)
        other, other_counts = moments, None
        if not fixed:
            other_counts = resampled_counts(reference_strata, number, for_reference)
            other = weighted_moments(wide_reference, other_counts)
        for name, sample in samples.items():
            counts = resampled_counts(sample.strata, number, generators[name])
            for key, value in figures(sample, counts, wide[name], other, other_counts).items():
                kept[name].setdefault(key, []).append(value)
    return {
        name: {
            key: Resampled(float(sampled[name][key][0]), np.concatenate(values), key in ("frechet", "score"))
            for key, values in parts.items()
        }
        for name, parts in kept.items()
    }
