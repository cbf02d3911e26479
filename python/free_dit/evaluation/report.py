"""Metrics of sample sets against a reference, and differences between sets, with intervals; as JSON and a table."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from free_dit.evaluation.bootstrap import Resampled, Sample, bootstrap, score
from free_dit.evaluation.extractors import Extractor, Features, extract
from free_dit.evaluation.intervals import check_level, share_interval
from free_dit.evaluation.kernel import (
    KernelMeans,
    kernel_difference,
    kernel_distance,
    kernel_means,
    own_means,
    permutation_p_value,
    subset_distances,
)
from free_dit.evaluation.manifolds import precision_and_recall
from free_dit.evaluation.sets import WHERE, DrawnSet, ImageSet, Statistics
from free_kernels.validation import check_int, fail
from free_kernels.version import __version__

# The network whose plain Frechet distance is the FID.
INCEPTION = "inception_v3"
# Orders of the images that the score over parts is given for.
SPLIT_PERMUTATIONS = 10


@dataclass(frozen=True)
class EvaluationSettings:
    """How metrics and their intervals are computed.

    Attributes:
        neighbours: k of precision and recall.
        rows: points of a set that precision, recall and kernel distance use, drawn at random from larger sets; their
            cost grows with the square of it.
        subsets: subsets of the kernel distance.
        subset_size: points of each.
        permutations: of the two-sample tests; 0 leaves them out.
        test_rows: points of each set that a two-sample test uses, drawn at random from larger sets.
        resamples: bootstrap resamples.
        level: confidence level.
        paired: image i of every set came from the same noise, so that sets are resampled alike and not tested against
            one another, which needs independent images.
        resampling_seed: of all of it.
    """

    neighbours: int = 3
    rows: int = 10_000
    subsets: int = 100
    subset_size: int = 1000
    permutations: int = 1000
    test_rows: int = 4000
    resamples: int = 400
    level: float = 0.95
    paired: bool = False
    resampling_seed: int = 0

    def __post_init__(self) -> None:
        lowest = {"neighbours": 1, "rows": 2, "subsets": 1, "subset_size": 2, "permutations": 0, "test_rows": 2}
        for name, low in (lowest | {"resamples": 2, "resampling_seed": 0}).items():
            check_int(WHERE, name, getattr(self, name), low)
        check_level(WHERE, self.level)


def _strata(labels: np.ndarray | None, count: int) -> np.ndarray:
    """Labels to resample within; all zero where a label occurs once, because one image has no variance."""
    if labels is None or np.unique(labels, return_counts=True)[1].min() < 2:
        return np.zeros(count, np.int64)
    return labels


def _splits(
    log_probabilities: np.ndarray, seed: int, splits: int = 10, permutations: int = SPLIT_PERMUTATIONS
) -> dict[str, Any]:
    """Mean and spread of the score over ten parts, as it is usually published, and their range over permutations.

    Parts in order would be of one class each where a set is sorted by class.
    """
    generator, means, spreads = np.random.default_rng([seed, 4]), [], []
    for _ in range(permutations):
        parts = np.array_split(log_probabilities[generator.permutation(len(log_probabilities))], splits)
        values = [float(score(part, np.ones((1, len(part))))[0]) for part in parts if len(part)]
        means.append(float(np.mean(values)))
        spreads.append(float(np.std(values)))
    return {
        "split_mean": float(np.mean(means)),
        "split_mean_range": [min(means), max(means)],
        "split_std": float(np.mean(spreads)),
        "split_std_range": [min(spreads), max(spreads)],
        "splits": len(values),
        "split_permutations": permutations,
        "split_seed": seed,
    }


def _drawn_rows(count: int, wanted: int, seed: int, stream: int) -> np.ndarray:
    """Which of ``count`` rows are used: all in order, or ``wanted`` of them at random, ascending.

    Sets of one size get the same rows, as pairs of images need. The first rows would be of a few classes where a set is
    sorted by class.
    """
    if count <= wanted:
        return np.arange(count)
    return np.sort(np.random.default_rng([seed, stream]).permutation(count)[:wanted])


class _Subject:
    """One set's features on the device and what is computed of them once.

    Attributes:
        found: features, logits and labels of all images.
        rows: images that costly metrics use, ``[rows]``.
        points: float64 ``[rows, D]`` on the device, their features.
        row_strata: their labels, to resample within.
        sample: what the bootstrap takes of the set.
        means: mean kernels with the reference, where that is a set of images.
    """

    def __init__(self, found: Features, settings: EvaluationSettings, device: torch.device | str) -> None:
        from scipy.special import log_softmax

        self.found = found
        self.rows = _drawn_rows(len(found.features), settings.rows, settings.resampling_seed, 5)
        self._tested = _drawn_rows(len(self.rows), settings.test_rows, settings.resampling_seed, 6)
        self.points = torch.from_numpy(found.features[self.rows]).double().to(device)
        self.row_strata = _strata(None if found.labels is None else found.labels[self.rows], len(self.points))
        logits, strata = found.logits.astype(np.float64), _strata(found.labels, len(found.features))
        self.sample = Sample(found.features.astype(np.float64), log_softmax(logits, 1), strata)
        self.means: KernelMeans | None = None

    @cached_property
    def own(self) -> np.ndarray:
        """Mean kernel of each of the points with the others, ``[rows]``."""
        return own_means(self.points, self.row_strata)

    def compare(self, baseline: _Subject, neighbours: int) -> None:
        """Add precision, recall and mean kernels with a reference of images."""
        precise, recalled = precision_and_recall(self.points, baseline.points, neighbours)
        self.sample.shares["precision"] = _padded(precise, self.rows, len(self.found.features))
        self.sample.reference_shares["recall"] = _padded(recalled, baseline.rows, len(baseline.found.features))
        self.means = kernel_means(self.points, baseline.points, self.row_strata)

    def test(self) -> tuple[Tensor, np.ndarray | None]:
        """The points of a two-sample test and their labels."""
        labels = self.found.labels
        points = self.points[torch.from_numpy(self._tested).to(self.points.device)]
        return points, None if labels is None else labels[self.rows][self._tested]


def _check_sizes(name: str, found: Features, settings: EvaluationSettings) -> None:
    least = settings.neighbours + 2
    if min(len(found.features), settings.rows) < least:
        fail(WHERE, name, f"{least} images or more", str(len(found.features)))


def evaluate(
    sets: Mapping[str, ImageSet],
    reference: ImageSet | Statistics,
    extractor: Extractor,
    settings: EvaluationSettings = EvaluationSettings(),
    *,
    cache: Path | None = None,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> dict[str, Any]:
    """Metrics of every set against the reference; differences of every set from the first.

    Images are read in pieces; features of a set (float32 ``[N, D]``) are held in memory.

    Args:
        sets: by name; the first is the one that the others are compared with.
        reference: images, or statistics, which allow the Frechet distance alone.
        extractor: the network whose features and classes are used; every metric is named after it.
        settings: numbers of neighbours, subsets, resamples.
        cache: folder of finished pieces of features; None keeps none.
        device: of distances and kernels (the extractor has its own).
        progress: show bars.

    Returns:
        A JSON object: ``reference``, ``extractor``, ``settings``, ``sets`` (name to ``metrics``) and ``differences``
        (name to metrics: this set minus the first).

    Raises:
        ValueError: no sets; images that do not fit the network; too few of them; sets of different sizes or labels with
            ``paired``.
        FloatingPointError: a feature is not finite.
    """
    if not sets:
        fail(WHERE, "sets", "one or more", "none")
    found = {name: extract(one, extractor, cache, progress) for name, one in sets.items()}
    for name, one in found.items():
        _check_sizes(name, one, settings)
    _check_pairs(found, settings)
    subjects = {name: _Subject(one, settings, device) for name, one in found.items()}
    baseline = None
    if isinstance(reference, Statistics):
        width = next(iter(found.values())).features.shape[1]
        if len(reference.mu) != width:
            fail(WHERE, reference.source, f"statistics of {width} features", str(len(reference.mu)))
    else:
        real = extract(reference, extractor, cache, progress)
        _check_sizes(reference.source, real, settings)
        baseline = _Subject(real, settings, device)
    for subject in subjects.values():
        if baseline is not None:
            subject.compare(baseline, settings.neighbours)
        if extractor.reads_labels and subject.found.labels is not None:
            subject.sample.shares["accuracy"] = subject.found.logits.argmax(1) == subject.found.labels
    resampled = bootstrap(
        {name: subject.sample for name, subject in subjects.items()},
        (reference.mu, reference.sigma) if baseline is None else baseline.sample.features,
        None if baseline is None else baseline.sample.strata,
        resamples=settings.resamples,
        seed=settings.resampling_seed,
        paired=settings.paired,
    )
    metrics = _Metrics(subjects, resampled, baseline, extractor.name, settings)
    records = {
        name: {
            "source": images.source,
            "images": images.count,
            "features_sha256": hashlib.sha256(found[name].features.tobytes()).hexdigest(),
            "sampling": images.drawn.sampling_statistics() if isinstance(images, DrawnSet) else None,
            "metrics": metrics.of(name),
        }
        for name, images in sets.items()
    }
    first, *rest = subjects
    return {
        "kind": "free_dit evaluation",
        "version": __version__,
        "extractor": {"name": extractor.name, "sha256": extractor.sha256},
        "reference": {
            "source": reference.source,
            "images": None if isinstance(reference, Statistics) else reference.count,
        },
        "settings": asdict(settings),
        "sets": records,
        "compared_with": first,
        "differences": {name: metrics.difference(name, first) for name in rest},
    }


def _padded(indicator: np.ndarray, rows: np.ndarray, count: int) -> np.ndarray:
    """Indicators of some rows as weights over all: zero elsewhere, scaled so that the mean is theirs."""
    if len(rows) == count:
        return indicator
    whole = np.zeros(count)
    whole[rows] = indicator * (count / len(rows))
    return whole


def _check_pairs(found: dict[str, Features], settings: EvaluationSettings) -> None:
    first, *rest = found.values()
    for one in rest if settings.paired else []:
        same = (first.labels is None) == (one.labels is None) and len(first.features) == len(one.features)
        if not same or (first.labels is not None and not np.array_equal(first.labels, one.labels)):
            fail(WHERE, "paired", "False for sets of different sizes or labels", "True")


@dataclass(frozen=True)
class _Metrics:
    """Metrics of sets, named after the network.

    Attributes:
        subjects: the sets.
        resampled: their metrics over the bootstrap's resamples.
        baseline: the reference, where it is a set of images.
        network: name of the network.
        settings: of the evaluation.
    """

    subjects: dict[str, _Subject]
    resampled: dict[str, dict[str, Resampled]]
    baseline: _Subject | None
    network: str
    settings: EvaluationSettings

    def of(self, name: str) -> dict[str, Any]:
        """Metrics of one set."""
        subject, resampled, baseline = self.subjects[name], self.resampled[name], self.baseline
        settings, sample, rows = self.settings, subject.sample, len(subject.points)

        def share(indicator: np.ndarray) -> dict[str, float]:
            return asdict(share_interval(indicator, settings.level))

        metrics: dict[str, Any] = {
            key: {**asdict(resampled[key].estimate(settings.level)), "sampled": resampled[key].sampled}
            for key in ("frechet", "score")
        }
        metrics["score"] |= _splits(sample.log_probabilities, settings.resampling_seed)
        if self.network == INCEPTION:
            # Of all images, with the covariances of numpy.cov and nothing taken off, as it is published.
            reference = None if baseline is None else len(baseline.found.features)
            metrics["fid"] = {"value": resampled["frechet"].sampled, "images": len(subject.found.features)}
            metrics["fid"]["reference_images"] = reference
        if baseline is not None:
            recalled = sample.reference_shares["recall"][baseline.rows]
            metrics["precision"] = {**share(sample.shares["precision"][subject.rows] > 0), "rows": rows}
            metrics["recall"] = {**share(recalled > 0), "rows": rows}
            strata, generator = (subject.row_strata, baseline.row_strata), self._generator(3)
            kernel = kernel_distance(subject.means, baseline.own, *strata, settings.level)
            kernel["over_subsets"] = subset_distances(
                subject.points, baseline.points, settings.subsets, settings.subset_size, generator
            )
            kernel["two_sample_test"] = self._two_sample(subject, baseline) if settings.permutations else None
            metrics["kernel_distance"] = kernel
        if "accuracy" in sample.shares:
            labels, right = subject.found.labels, sample.shares["accuracy"]
            by_class = {str(label): share(right[labels == label]) for label in np.unique(labels)}
            metrics["accuracy"] = {**share(right), "by_class": by_class}
        return self._named(metrics)

    def difference(self, name: str, first: str) -> dict[str, Any]:
        """Metrics of one set minus those of the first."""
        one, other, settings = self.subjects[name], self.subjects[first], self.settings
        differences: dict[str, Any] = {
            key: asdict((mine - self.resampled[first][key]).estimate(settings.level))
            for key, mine in self.resampled[name].items()
            if key in self.resampled[first]
        }
        if self.baseline is not None:
            strata = (one.row_strata, other.row_strata)
            differences["kernel_distance"] = kernel_difference(
                one.means, other.means, strata, self.baseline.row_strata, settings.paired, settings.level
            )
        tested = settings.permutations and not settings.paired
        return self._named(differences) | {"two_sample_test": self._two_sample(one, other) if tested else None}

    def _named(self, metrics: dict[str, Any]) -> dict[str, Any]:
        return {f"{key}_{self.network}": value for key, value in metrics.items()}

    def _generator(self, stream: int) -> np.random.Generator:
        return np.random.default_rng([self.settings.resampling_seed, stream])

    def _two_sample(self, first: _Subject, second: _Subject) -> dict[str, Any]:
        (ones, labels), (others, other_labels) = (one.test() for one in (first, second))
        reason = _why_not_within(labels, other_labels)
        strata = (labels, other_labels) if reason is None else (None, None)
        p_value = permutation_p_value(ones, others, self.settings.permutations, self._generator(2), strata)
        rows = [len(ones), len(others)]
        return {"p_value": p_value, "rows": rows, "within_classes": reason is None, "over_all_because": reason}


def _why_not_within(labels: np.ndarray | None, others: np.ndarray | None) -> str | None:
    """Why images cannot be permuted within classes: those of a class that one side lacks would never move."""
    if labels is None or others is None:
        return "only one set has labels" if (labels is None) != (others is None) else "the sets have no labels"
    lacking = np.setxor1d(labels, others)
    if not len(lacking):
        return None
    side = "first" if lacking[0] in labels else "second"
    return f"{len(lacking)} labels are in one set only, such as {int(lacking[0])} in the {side}"
