"""Improved precision and recall: shares of one set within the k-nearest-neighbour manifold of the other."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# Largest number of distances in memory at a time; the results do not depend on it.
_BLOCK_ELEMENTS = 2**24


def _blocks(queries: Tensor, points: Tensor):
    """Blocks of queries: their squared norms ``[B]``, and squared distances ``[B, N]`` to the points."""
    squares = (points * points).sum(1)
    for part in queries.split(max(1, _BLOCK_ELEMENTS // len(points))):
        own = (part * part).sum(1)
        yield own, torch.addmm(own[:, None] + squares, part, points.T, alpha=-2).clamp_(min=0.0)


def radii(points: Tensor, neighbours: int = 3) -> Tensor:
    """Squared distance ``[N]`` of each point to its k-th nearest other one; k at most N - 1.

    Args:
        points: float64 ``[N, D]``.
        neighbours: k.
    """
    # One more, because the nearest point is the point itself.
    return torch.cat([squared.kthvalue(neighbours + 1, 1).values for _, squared in _blocks(points, points)])


def covered(queries: Tensor, points: Tensor, squared_radii: Tensor) -> np.ndarray:
    """Whether each query lies within the ball of some point; bool ``[N]``.

    Args:
        queries: float64 ``[N, D]``.
        points: ``[M, D]``.
        squared_radii: ``[M]``.
    """
    # Rounding gives identical points a small distance; with a radius of 0 they would not be covered.
    slack = 1e-12 * (points * points).sum(1)
    inside = [
        (squared <= squared_radii + slack + 1e-12 * own[:, None]).any(1) for own, squared in _blocks(queries, points)
    ]
    return torch.cat(inside).cpu().numpy()


def precision_and_recall(points: Tensor, reference: Tensor, neighbours: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Indicators whose means are precision (of the points) and recall (of the reference).

    Source: Kynkaanniemi et al., "Improved Precision and Recall Metric for Assessing Generative Models" (2019).

    Args:
        points: float64 ``[N, D]``, the sampled images' features.
        reference: ``[M, D]``, the real ones'.
        neighbours: k.

    Returns:
        bool ``[N]`` and ``[M]``.
    """
    # Relative to the reference's centre, where the squares, and so the rounding errors, are smallest.
    centre = reference.mean(0)
    points, reference = points - centre, reference - centre
    return (
        covered(points, reference, radii(reference, neighbours)),
        covered(reference, points, radii(points, neighbours)),
    )
