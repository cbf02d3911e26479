"""Metrics of several sets over joint bootstrap resamples, so that their differences have intervals as well."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from free_dit.evaluation.frechet import check_features, frechet_of_moments, weighted_moments
from free_dit.evaluation.intervals import Estimate, check_level
from free_kernels.validation import check_int, describe, fail

# Resamples drawn at a time. The results depend on it, because it sets the order of the random numbers.
CHUNK = 50
Arrays = dict[str, np.ndarray]


@dataclass
class Sample:
    """What the bootstrap needs of one set.

    Attributes:
        features: float64 ``[N, D]``.
        log_probabilities: float64 ``[N, K]``, log softmax of the logits; None where no score is wanted.
        shares: indicators ``[N]`` by name, whose means are metrics.
        reference_shares: indicators ``[M]`` by name, over the reference's points.
        strata: ``[N]``, labels whose counts were fixed, or zeros.
    """

    features: np.ndarray
    log_probabilities: np.ndarray | None
    strata: np.ndarray
    shares: dict[str, np.ndarray] = field(default_factory=dict)
    reference_shares: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Resampled:
    """A metric of a set and of its resamples.

    Attributes:
        sampled: of the set itself.
        values: ``[R]``.
        biased: whether the estimate is biased; resampling then shows the bias.
    """

    sampled: float
    values: np.ndarray
    biased: bool

    def __sub__(self, other: Resampled) -> Resampled:
        return Resampled(self.sampled - other.sampled, self.values - other.values, self.biased)

    def estimate(self, level: float) -> Estimate:
        """Basic bootstrap interval (Davison and Hinkley 1997, section 5.2); the bias is subtracted."""
        low, high = np.quantile(self.values, [(1 - level) / 2, (1 + level) / 2])
        value = 2 * self.sampled - self.values.mean() if self.biased else self.sampled
        return Estimate(*(float(one) for one in (value, 2 * self.sampled - high, 2 * self.sampled - low)), level)


def resampled_counts(strata: np.ndarray, resamples: int, generator: np.random.Generator) -> np.ndarray:
    """How often each row ``[N]`` is in each of R resamples, ``[R, N]``; each stratum is resampled to its own size."""
    counts = np.empty((resamples, len(strata)))
    for stratum in np.unique(strata):
        (rows,) = np.nonzero(strata == stratum)
        counts[:, rows] = generator.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), resamples)
    return counts


def widened(features: np.ndarray, strata: np.ndarray) -> np.ndarray:
    """Features ``[N, D]`` moved from their strata's centres: resamples of them have the strata's own variance.

    Drawing from a sample instead of its law loses 1 / size of the variance.
    """
    moved = np.empty_like(features)
    for stratum in np.unique(strata):
        (rows,) = np.nonzero(strata == stratum)
        centre = features[rows].mean(0)
        moved[rows] = centre + np.sqrt(len(rows) / (len(rows) - 1)) * (features[rows] - centre)
    return moved


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
    """Metrics of every set over the same resamples of the reference.

    The manifolds of precision and recall are not resampled: a point drawn twice would be its own neighbour.

    Args:
        samples: sets by name.
        reference: features ``[M, D]``, or (mean, covariance), which are then held fixed.
        reference_strata: ``[M]``, or None for statistics.
        resamples: R, at least 2.
        seed: of the resampling.
        paired: whether image i of every set came from the same noise: all sets are then resampled alike.

    Returns:
        ``"frechet"``, ``"score"`` (where there are probabilities) and the names of the shares, for each set.
    """
    fixed = isinstance(reference, tuple)
    kept: dict[str, dict[str, list[np.ndarray]]] = {name: {} for name in samples}
    generators = {name: np.random.default_rng([seed, 1 if paired else 1 + i]) for i, name in enumerate(samples)}
    for_reference = np.random.default_rng([seed, 0])

    def metrics_of(
        sample: Sample, counts: np.ndarray, features: np.ndarray, other, other_counts
    ) -> dict[str, np.ndarray]:
        values = {"frechet": frechet_of_moments(*weighted_moments(features, counts), *other)}
        if sample.log_probabilities is not None:
            values["score"] = score(sample.log_probabilities, counts)
        values |= {name: counts @ share / len(share) for name, share in sample.shares.items()}
        if other_counts is not None:
            values |= {name: other_counts @ one / len(one) for name, one in sample.reference_shares.items()}
        return values

    once = None if fixed else np.ones((1, len(reference)))
    moments = tuple(part[None] for part in reference) if fixed else weighted_moments(reference, once)
    sampled = {
        name: metrics_of(sample, np.ones((1, len(sample.features))), sample.features, moments, once)
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
            for key, value in metrics_of(sample, counts, wide[name], other, other_counts).items():
                kept[name].setdefault(key, []).append(value)
    return {
        name: {
            key: Resampled(float(sampled[name][key][0]), np.concatenate(values), key in ("frechet", "score"))
            for key, values in parts.items()
        }
        for name, parts in kept.items()
    }


def _check_strata(where: str, argument: str, strata: np.ndarray | None, count: int) -> np.ndarray:
    if strata is None:
        return np.zeros(count, np.int64)
    if not isinstance(strata, np.ndarray) or strata.shape != (count,):
        fail(where, argument, f"an array [{count}]", describe(strata))
    fewest = int(np.unique(strata, return_counts=True)[1].min())
    if fewest < 2:
        fail(where, argument, "two rows or more of every stratum", f"{fewest} of one")
    return strata


def frechet_interval(
    features_a: np.ndarray,
    features_b: np.ndarray,
    *,
    strata_a: np.ndarray | None = None,
    strata_b: np.ndarray | None = None,
    resamples: int = 400,
    level: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """The Frechet distance without its bias, and a basic bootstrap interval; both sets are resampled.

    Resampling moves the distance up once more by what sampling did, so ``value`` is twice the sample's distance minus
    the mean of the resampled ones, and the interval is mirrored likewise: quantiles of the resampled distances
    themselves would lie above the distance of the two laws altogether. Where the laws hardly differ the interval is
    wider than its level says, and the estimate may be negative, as unbiased estimates of what is at least 0 are.
    Source: Davison and Hinkley, "Bootstrap Methods and their Application" (1997), sections 2.1 and 5.2.

    Args:
        features_a: ``[N, D]``, N at least 2.
        features_b: ``[M, D]``, M at least 2.
        strata_a: ``[N]``, such as class labels, where each stratum's size was fixed and not left to chance.
        strata_b: ``[M]``, likewise.
        resamples: bootstrap resamples.
        level: confidence level, in (0, 1).
        seed: seed of the resampling.

    Raises:
        ValueError, TypeError: an argument has another shape or range, or is not finite.
    """
    where = "frechet_interval"
    features_a = check_features(where, "features_a", features_a)
    features_b = check_features(where, "features_b", features_b, features_a.shape[1])
    strata_a = _check_strata(where, "strata_a", strata_a, len(features_a))
    strata_b = _check_strata(where, "strata_b", strata_b, len(features_b))
    level, resamples = check_level(where, level), check_int(where, "resamples", resamples, 2)
    found = bootstrap(
        {"a": Sample(features_a, None, strata_a)},
        features_b,
        strata_b,
        resamples=resamples,
        seed=check_int(where, "seed", seed, 0),
        paired=False,
    )
    return found["a"]["frechet"].estimate(level)
