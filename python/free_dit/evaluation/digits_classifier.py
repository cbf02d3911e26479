"""Quality of sampled digits: class accuracy and Frechet distance in the features of a small classifier of digits.

The features are this classifier's own, so the distance is no FID and compares with nothing outside this project.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from free_dit.data import load_digits
from free_dit.training import iteration_seed
from free_kernels.checkpoint import load_checkpoint
from free_kernels.validation import check_float, check_int, describe, fail

FEATURES = 16
_EPOCHS, _BATCH, _PEAK_RATE, _SEED = 20, 64, 4e-3, 0
# Resamples whose second moments are held at a time: bounds memory, changes no number.
_CHUNK = 64
# Features above this many have their moments taken resample by resample.
_WIDE = 64


@dataclass(frozen=True)
class Estimate:
    """A figure and its interval.

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


class DigitsClassifier(nn.Module):
    """Reads 8 x 8 digits: two convolutions, a hidden layer of 16 features, 10 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(16, 32, 3, padding=1, stride=2),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(32 * 4 * 4, FEATURES),
        )
        self.classes = nn.Linear(FEATURES, 10)

    def features(self, images: Tensor) -> Tensor:
        """Hidden layer before its nonlinearity, ``[N, 16]``, of images ``[N, 1, 8, 8]``."""
        return self.body(images)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[N, 10]`` of images ``[N, 1, 8, 8]``."""
        return self.classes(nn.functional.silu(self.features(images)))


CLASSIFIER = Path(__file__).parent / "models" / "digits_classifier" / "classifier.safetensors"
CLASSIFIER_KIND = "digits_classifier"


@lru_cache(maxsize=1)
def digits_classifier() -> DigitsClassifier:
    """The bundled classifier: the same numbers on every machine, as training anew would not give."""
    tensors, _ = load_checkpoint(CLASSIFIER, CLASSIFIER_KIND)
    # The shapes are all that construction is for; whoever draws random numbers next must not notice it.
    with torch.device("meta"):
        classifier = DigitsClassifier()
    classifier.load_state_dict(tensors, strict=True, assign=True)
    return classifier.eval().requires_grad_(False)


def train_digits_classifier() -> DigitsClassifier:
    """The classifier that is bundled: trained on the training split in a few seconds, from the same seed every time.

    Training images get the noise of one grey level, as those of the sampled DiT do: real digits have 17 levels, sampled
    ones do not, and a feature that saw the difference would measure nothing else.
    """
    data = load_digits("train")
    with iteration_seed(_SEED, 0):
        classifier = DigitsClassifier()
    steps = _EPOCHS * (len(data.labels) // _BATCH)
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _PEAK_RATE, total_steps=steps)
    with torch.enable_grad():
        for step in range(steps):
            with iteration_seed(_SEED, step + 1):
                rows = torch.randint(len(data.labels), (_BATCH,))
                images = data.images[rows] + data.level_width * (torch.rand(_BATCH, 1, 8, 8) - 0.5)
            loss = nn.functional.cross_entropy(classifier(images), data.labels[rows], label_smoothing=0.05)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    return classifier.eval().requires_grad_(False)


def _check_images(where: str, images: object) -> Tensor:
    if not isinstance(images, Tensor):
        fail(where, "images", "a tensor [N, 1, 8, 8]", type(images).__name__, TypeError)
    if images.ndim != 4 or tuple(images.shape[1:]) != (1, 8, 8) or not len(images) or not images.is_floating_point():
        fail(where, "images", "floating point [N, 1, 8, 8] with N >= 1", images)
    if not bool(images.isfinite().all()):
        fail(where, "images", "finite", f"{int((~images.isfinite()).sum())} elements that are not")
    return images.detach().float().cpu().clamp(-1, 1)


@torch.no_grad()
def digit_features(images: Tensor) -> np.ndarray:
    """Features of the classifier, the inputs of :func:`frechet_distance`.

    Args:
        images: ``[N, 1, 8, 8]``; clamped to ``[-1, 1]``.

    Returns:
        float64 ``[N, 16]``.

    Raises:
        ValueError, TypeError: ``images`` has another shape or is not finite.
    """
    return digits_classifier().features(_check_images("digit_features", images)).double().numpy()


@torch.no_grad()
def class_accuracy(images: Tensor, labels: Tensor, level: float = 0.95) -> Estimate:
    """Share of images that the classifier reads as their label, with Wilson's score interval (JASA 22, 1927).

    Args:
        images: ``[N, 1, 8, 8]``; clamped to ``[-1, 1]``.
        labels: int64 ``[N]`` in ``[0, 10)``.
        level: confidence level, in (0, 1).

    Raises:
        ValueError, TypeError: an argument has another shape or range.
    """
    from scipy.stats import binomtest

    where = "class_accuracy"
    images, level = _check_images(where, images), _check_level(where, level)
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
        fail(where, "labels", f"int64 [{len(images)}]", describe(labels))
    right = int((digits_classifier()(images).argmax(1) == labels.cpu()).sum())
    interval = binomtest(right, len(images)).proportion_ci(level, method="wilson")
    return Estimate(right / len(images), float(interval.low), float(interval.high), level)


def _check_level(where: str, level: float) -> float:
    if not 0.0 < check_float(where, "level", level, 0.0) < 1.0:
        fail(where, "level", "in (0, 1)", f"{level:g}")
    return float(level)


def _check_features(where: str, argument: str, features: object, width: int | None = None) -> np.ndarray:
    if not isinstance(features, np.ndarray):
        fail(where, argument, "an array [N, D]", type(features).__name__, TypeError)
    wanted = "[N, D] with N >= 2" if width is None else f"[N, {width}] with N >= 2"
    if features.ndim != 2 or len(features) < 2 or not features.shape[1] or width not in (None, features.shape[1]):
        fail(where, argument, wanted, str(list(features.shape)))
    if not np.isfinite(features).all():
        fail(where, argument, "finite", f"{int((~np.isfinite(features)).sum())} elements that are not")
    return features.astype(np.float64)


def weighted_moments(features: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means ``[R, D]`` and unbiased covariances ``[R, D, D]`` of features ``[N, D]`` that count ``[R, N]`` times."""
    number, width = features.shape
    centre = features.mean(0)
    moved = features - centre
    mean = counts @ moved / number
    if width <= _WIDE:
        second = (counts @ (moved[:, :, None] * moved[:, None, :]).reshape(number, -1)).reshape(-1, width, width)
    else:
        # All products at once would be N D^2 numbers.
        second = np.stack([(moved * count[:, None]).T @ moved for count in counts])
    covariance = (second / number - mean[:, :, None] * mean[:, None, :]) * number / (number - 1)
    return mean + centre, covariance


def frechet_of_moments(
    mean_a: np.ndarray, covariance_a: np.ndarray, mean_b: np.ndarray, covariance_b: np.ndarray
) -> np.ndarray:
    """Squared Frechet distance of Gaussians: ``|m_a - m_b|^2 + tr(A + B - 2 (A B)^(1/2))``, at least 0.

    The trace of the root is the sum of the roots of the eigenvalues of ``A^(1/2) B A^(1/2)``, which is symmetric and
    non-negative as ``A B`` is not. Source: Dowson and Landau, J. Multivariate Analysis 12 (1982).

    Args:
        mean_a: ``[..., D]``.
        covariance_a: ``[..., D, D]``, symmetric.
        mean_b: ``[..., D]``.
        covariance_b: ``[..., D, D]``, symmetric.

    Returns:
        float64 ``[...]``.
    """
    values, vectors = np.linalg.eigh(covariance_a)
    root = (vectors * np.sqrt(values.clip(0.0))[..., None, :]) @ np.swapaxes(vectors, -1, -2)
    inner = root @ covariance_b @ root
    shared = np.sqrt(np.linalg.eigvalsh((inner + np.swapaxes(inner, -1, -2)) / 2).clip(0.0)).sum(-1)
    traces = np.trace(covariance_a, axis1=-2, axis2=-1) + np.trace(covariance_b, axis1=-2, axis2=-1)
    return (((mean_a - mean_b) ** 2).sum(-1) + traces - 2 * shared).clip(0.0)


def frechet_distance(features_a: np.ndarray, features_b: np.ndarray) -> float:
    """Squared Frechet distance of the Gaussians with the sample moments of two feature sets.

    Biased upwards, the more the fewer samples; :func:`frechet_interval` takes the bias off. Source: Heusel et al.,
    "GANs Trained by a Two Time-Scale Update Rule" (2017), with other features than theirs.

    Args:
        features_a: ``[N, D]``, N at least 2.
        features_b: ``[M, D]``, M at least 2.

    Raises:
        ValueError, TypeError: an argument has another shape or is not finite.
    """
    where = "frechet_distance"
    features_a = _check_features(where, "features_a", features_a)
    features_b = _check_features(where, "features_b", features_b, features_a.shape[1])
    parts = [part[0] for one in (features_a, features_b) for part in weighted_moments(one, np.ones((1, len(one))))]
    return float(frechet_of_moments(*parts))


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


def _resampled_moments(
    features: np.ndarray, strata: np.ndarray, resamples: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Moments of bootstrap resamples, each stratum resampled to its own size."""
    return weighted_moments(widened(features, strata), resampled_counts(strata, resamples, generator))


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
    """:func:`frechet_distance` without its bias, and a basic bootstrap interval; both sets are resampled.

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
    features_a = _check_features(where, "features_a", features_a)
    features_b = _check_features(where, "features_b", features_b, features_a.shape[1])
    strata_a = _check_strata(where, "strata_a", strata_a, len(features_a))
    strata_b = _check_strata(where, "strata_b", strata_b, len(features_b))
    resamples, level = check_int(where, "resamples", resamples, 2), _check_level(where, level)
    sampled = frechet_distance(features_a, features_b)
    generator = np.random.default_rng(check_int(where, "seed", seed, 0))
    resampled = np.empty(resamples)
    for begin in range(0, resamples, _CHUNK):
        part = resampled[begin : begin + _CHUNK]
        moments_a = _resampled_moments(features_a, strata_a, len(part), generator)
        part[:] = frechet_of_moments(*moments_a, *_resampled_moments(features_b, strata_b, len(part), generator))
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    mirrored = [float(2 * sampled - value) for value in (resampled.mean(), high, low)]
    return Estimate(*mirrored, level)
