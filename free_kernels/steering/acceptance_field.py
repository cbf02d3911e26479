"""Acceptance at every step, kind and place of a draft, smoothed from the drafts of a few rounds."""

from __future__ import annotations

import numpy as np

from free_kernels.steering.round_chain import CLASSES, STAND_IN

# Width of the kernel in steps, in distances between positions; and in places, in doublings of the place.
_STEP_WIDTH, _PLACE_WIDTH = 0.5, 0.25
# Drafts for which the class that stands in counts.
_PRIOR = 0.1


class AcceptanceField:
    """Kernel means of acceptance, weighted by how likely a test is to be reached.

    Tails of the kernel are heavy, so that where nothing was seen the nearest stands in. A kind of which little was seen
    is drawn to another that stands in for it and is accepted less readily.

    Args:
        num_steps: K.
        positions: P, of the places where rounds began.
        places: M, how many places of a kind are asked for.
        probe: int64 ``[n]``, the round's place, all positions of an image before those of the next.
        step, kind, place: int64 ``[n]``, of each draft.
        acceptance: ``[n]``, probability.
        reached: ``[n]``, probability that its test is reached.
    """

    def __init__(
        self,
        num_steps: int,
        positions: int,
        places: int,
        probe: np.ndarray,
        step: np.ndarray,
        kind: np.ndarray,
        place: np.ndarray,
        acceptance: np.ndarray,
        reached: np.ndarray,
    ) -> None:
        spacing = num_steps / positions
        grid = (np.arange(positions) + 0.5) * spacing
        near = 1 / (1 + ((grid[:, None] - step - 0.5) / (_STEP_WIDTH * spacing)) ** 4)
        doublings = np.log2(np.arange(1, places + 1)[:, None] / (place + 1))
        alike = 1 / (1 + (doublings / _PLACE_WIDTH) ** 4)
        # Accepted and counted, by place of the round: [2, probes, P, classes, M].
        self.sums = np.zeros((2, int(probe.max()) + 1, positions, len(CLASSES), places))
        for number in range(self.sums.shape[1]):
            for which in range(len(CLASSES)):
                chosen = (probe == number) & (kind == which)
                weights = near[:, chosen] * reached[chosen]
                self.sums[0, number, :, which] = (weights * acceptance[chosen]) @ alike[:, chosen].T
                self.sums[1, number, :, which] = weights @ alike[:, chosen].T
        self._between = np.stack(
            [np.interp(np.arange(num_steps) + 0.5, grid, np.eye(positions)[i]) for i in range(positions)], axis=1
        )

    def table(self, weights: np.ndarray) -> np.ndarray:
        """Acceptance ``[K, classes, M]`` with each probe counted ``weights [probes]`` times."""
        accepted, counted = np.einsum("n,snpcm->spcm", weights, self.sums)
        for which, other in enumerate(STAND_IN):
            prior = 1e-9 if which == other else _PRIOR
            accepted[:, which] += prior * accepted[:, other] / counted[:, other]
            counted[:, which] += prior
        flat = [self._between @ part.reshape(len(part), -1) for part in (accepted, counted)]
        return (flat[0] / flat[1]).reshape(-1, *accepted.shape[1:])
