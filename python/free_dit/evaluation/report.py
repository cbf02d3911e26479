"""Figures of sample sets against a reference, and differences between sets, with intervals; as JSON and a table."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import log_softmax
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
from free_dit.markdown import table
from free_kernels.validation import check_int, fail
from free_kernels.version import __version__


@dataclass(frozen=True)
class EvaluationSettings:
    """How figures and intervals are made.

    Attributes:
        neighbours: k of precision and recall.
        rows: points of a set that precision, recall and kernel distance use: the first ones; their cost grows with the
            square of it.
        subsets: subsets of the kernel distance.
        subset_size: points of each.
        permutations: of the two-sample tests; 0 leaves them out.
        test_rows: points of each set that a two-sample test uses: the first ones.
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
    """Labels to resample within; none where some label occurs once, which has no variance."""
    if labels is None or np.unique(labels, return_counts=True)[1].min() < 2:
        return np.zeros(count, np.int64)
    return labels


def _splits(log_probabilities: np.ndarray, splits: int = 10) -> dict[str, float]:
    """Mean and spread of the score over ten parts in order, as it is usually published."""
    parts = np.array_split(log_probabilities, splits)
    values = [float(score(part, np.ones((1, len(part))))[0]) for part in parts if len(part)]
    return {"split_mean": float(np.mean(values)), "split_std": float(np.std(values)), "splits": len(values)}


class _Subject:
    """One set's features on the device and what is computed of them once."""

    def __init__(self, found: Features, settings: EvaluationSettings, device: torch.device | str) -> None:
        self.found, self.strata = found, _strata(found.labels, len(found.features))
        self.points = torch.from_numpy(found.features[: settings.rows]).double().to(device)
        self.row_strata = _strata(None if found.labels is None else found.labels[: settings.rows], len(self.points))
        self.means: KernelMeans | None = None
        self.own: np.ndarray | None = None

    def test(self, rows: int) -> tuple[Tensor, np.ndarray | None]:
        """The points of a two-sample test and their labels."""
        labels = self.found.labels
        return self.points[:rows], None if labels is None else labels[: len(self.points)][:rows]


def _two_sample(first: _Subject, second: _Subject, settings: EvaluationSettings) -> dict[str, Any]:
    (ones, labels), (others, other_labels) = (one.test(settings.test_rows) for one in (first, second))
    generator = np.random.default_rng([settings.resampling_seed, 2])
    p_value = permutation_p_value(ones, others, settings.permutations, generator, (labels, other_labels))
    within = labels is not None and other_labels is not None
    return {"p_value": p_value, "rows": [len(ones), len(others)], "within_classes": within}


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
    """Figures of every set against the reference; differences of every set from the first.

    Images are read in pieces; features of a set (float32 ``[N, D]``) are held in memory.

    Args:
        sets: by name; the first is the one that the others are compared with.
        reference: images, or statistics, which allow the Frechet distance alone.
        extractor: the network whose features and classes are used; every figure is named after it.
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
    samples = {
        name: Sample(one.features.astype(np.float64), log_softmax(one.logits.astype(np.float64), 1), subject.strata)
        for (name, one), subject in zip(found.items(), subjects.values(), strict=True)
    }
    baseline = None
    if isinstance(reference, Statistics):
        width = next(iter(samples.values())).features.shape[1]
        if len(reference.mu) != width:
            fail(WHERE, reference.source, f"statistics of {width} features", str(len(reference.mu)))
        other: Any = (reference.mu, reference.sigma)
    else:
        real = extract(reference, extractor, cache, progress)
        _check_sizes(reference.source, real, settings)
        baseline = _Subject(real, settings, device)
        baseline.own = own_means(baseline.points, baseline.row_strata)
        other = real.features.astype(np.float64)
        for name, subject in subjects.items():
            precise, recalled = precision_and_recall(subject.points, baseline.points, settings.neighbours)
            samples[name].shares["precision"] = _padded(precise, len(subject.found.features))
            samples[name].reference_shares["recall"] = _padded(recalled, len(real.features))
            subject.means = kernel_means(subject.points, baseline.points, subject.row_strata)
    if extractor.reads_labels:
        for name, one in found.items():
            if one.labels is not None:
                samples[name].shares["accuracy"] = one.logits.argmax(1) == one.labels
    resampled = bootstrap(
        samples,
        other,
        None if baseline is None else baseline.strata,
        resamples=settings.resamples,
        seed=settings.resampling_seed,
        paired=settings.paired,
    )
    records = {
        name: {
            "source": sets[name].source,
            "images": sets[name].count,
            "features_sha256": hashlib.sha256(found[name].features.tobytes()).hexdigest(),
            "sampling": images.drawn.sampling_figures() if isinstance(images := sets[name], DrawnSet) else None,
            "metrics": _metrics(samples[name], subject, baseline, resampled[name], extractor, settings),
        }
        for name, subject in subjects.items()
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
        "differences": {
            name: _differences(subjects, resampled, baseline, name, first, extractor, settings) for name in rest
        },
    }


def _padded(indicator: np.ndarray, count: int) -> np.ndarray:
    """Indicators of the first rows as weights over all: zero beyond them, scaled so that the mean is theirs."""
    if len(indicator) == count:
        return indicator
    whole = np.zeros(count)
    whole[: len(indicator)] = indicator * (count / len(indicator))
    return whole


def _check_pairs(found: dict[str, Features], settings: EvaluationSettings) -> None:
    first, *rest = found.values()
    for one in rest if settings.paired else []:
        same = (first.labels is None) == (one.labels is None) and len(first.features) == len(one.features)
        if not same or (first.labels is not None and not np.array_equal(first.labels, one.labels)):
            fail(WHERE, "paired", "False for sets of different sizes or labels", "True")


def _metrics(
    sample: Sample,
    subject: _Subject,
    baseline: _Subject | None,
    resampled: dict[str, Resampled],
    extractor: Extractor,
    settings: EvaluationSettings,
) -> dict[str, Any]:
    """Figures of one set, named after the network."""
    level, title = settings.level, extractor.name
    metrics: dict[str, Any] = {
        f"{key}_{title}": {**asdict(resampled[key].estimate(level)), "sampled": resampled[key].sampled}
        for key in ("frechet", "score")
    }
    metrics[f"score_{title}"] |= _splits(sample.log_probabilities)
    if baseline is not None:
        rows = len(subject.points)
        precise, recalled = sample.shares["precision"][:rows], sample.reference_shares["recall"]
        metrics[f"precision_{title}"] = {**asdict(share_interval(precise > 0, level)), "rows": rows}
        metrics[f"recall_{title}"] = {
            **asdict(share_interval(recalled[: len(baseline.points)] > 0, level)),
            "rows": rows,
        }
        generator = np.random.default_rng([settings.resampling_seed, 3])
        kernel = kernel_distance(subject.means, baseline.own, subject.row_strata, baseline.row_strata, level)
        kernel["over_subsets"] = subset_distances(
            subject.points, baseline.points, settings.subsets, settings.subset_size, generator
        )
        kernel["two_sample_test"] = _two_sample(subject, baseline, settings) if settings.permutations else None
        metrics[f"kernel_distance_{title}"] = kernel
    if "accuracy" in sample.shares:
        labels, right = subject.found.labels, sample.shares["accuracy"]
        metrics[f"accuracy_{title}"] = {
            **asdict(share_interval(right, level)),
            "by_class": {
                str(label): asdict(share_interval(right[labels == label], level)) for label in np.unique(labels)
            },
        }
    return metrics


def _differences(
    subjects: dict[str, _Subject],
    resampled: dict[str, dict[str, Resampled]],
    baseline: _Subject | None,
    name: str,
    first: str,
    extractor: Extractor,
    settings: EvaluationSettings,
) -> dict[str, Any]:
    """Figures of one set minus those of the first."""
    title = extractor.name
    differences: dict[str, Any] = {
        f"{key}_{title}": asdict((resampled[name][key] - resampled[first][key]).estimate(settings.level))
        for key in resampled[name]
        if key in resampled[first]
    }
    one, other = subjects[name], subjects[first]
    if baseline is not None:
        differences[f"kernel_distance_{title}"] = kernel_difference(
            one.means,
            other.means,
            (one.row_strata, other.row_strata),
            baseline.row_strata,
            settings.paired,
            settings.level,
        )
    tested = settings.permutations and not settings.paired
    differences["two_sample_test"] = _two_sample(one, other, settings) if tested else None
    return differences


def _cell(estimate: dict[str, Any] | None, digits: int) -> str:
    if estimate is None:
        return "-"
    return f"{estimate['value']:.{digits}g} [{estimate['low']:.{digits}g}, {estimate['high']:.{digits}g}]"


def render(report: dict[str, Any]) -> str:
    """The report as Markdown tables."""
    title, sets = report["extractor"]["name"], report["sets"]
    names = ("frechet", "kernel_distance", "score", "precision", "recall", "accuracy")
    keys = [f"{name}_{title}" for name in names if any(f"{name}_{title}" in one["metrics"] for one in sets.values())]
    level, size = f"{report['settings']['level']:.0%}", report["reference"]["images"]
    figures = [f"`{key}`" for key in keys]

    def cells(metrics: dict[str, Any], test: dict[str, Any] | None, digits: int) -> list[str]:
        p_value = "-" if test is None else f"{test['p_value']:.3f}"
        return [*(_cell(metrics.get(key), digits) for key in keys), p_value]

    rows = []
    for name, one in sets.items():
        test = (one["metrics"].get(f"kernel_distance_{title}") or {}).get("two_sample_test")
        rows.append([name, str(one["images"]), *cells(one["metrics"], test, 4)])
    lines = [
        f"Against `{Path(report['reference']['source']).name}` ({'statistics' if size is None else f'{size} images'}), "
        f"with {level} intervals:",
        "",
        *table(["set", "images", *figures, "p-value"], rows),
    ]
    if report["differences"]:
        lines += [f"Minus `{report['compared_with']}`:", ""]
        rows = [[name, *cells(one, one["two_sample_test"], 3)] for name, one in report["differences"].items()]
        lines += table(["set", *figures, "p-value of equal laws"], rows)
    return "\n".join(lines)
