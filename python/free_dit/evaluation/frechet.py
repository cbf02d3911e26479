"""Frechet distance of the Gaussians with the moments of two sets of features."""

from __future__ import annotations

import numpy as np

from free_kernels.validation import fail

# For wider features the second moments are summed for one resample at a time: all products at once are N D^2 numbers.
_WIDE = 64


def check_features(where: str, argument: str, features: object, width: int | None = None) -> np.ndarray:
    """Finite features ``[N, D]``, N at least 2, as float64; ``width`` prescribes D."""
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

    Biased upwards, the more the fewer samples; :func:`free_dit.evaluation.bootstrap.frechet_interval` removes the bias.
    Source: Heusel et al., "GANs Trained by a Two Time-Scale Update Rule" (2017), with other features than theirs.

    Args:
        features_a: ``[N, D]``, N at least 2.
        features_b: ``[M, D]``, M at least 2.

    Raises:
        ValueError, TypeError: an argument has another shape or is not finite.
    """
    where = "frechet_distance"
    features_a = check_features(where, "features_a", features_a)
    features_b = check_features(where, "features_b", features_b, features_a.shape[1])
    parts = [part[0] for one in (features_a, features_b) for part in weighted_moments(one, np.ones((1, len(one))))]
    return float(frechet_of_moments(*parts))
