"""Rounds that an image takes, by an exact Markov chain over its step and the refused rows ahead of it."""

from __future__ import annotations

import numpy as np

# How often the target was asked about a draft's step before: never, once, more often. The first two are told apart by
# whether drafts seen (for the second: seen again) stand before them in the round: those lie further from what is exact.
CLASSES = ("new", "new", "seen once", "seen once", "seen again")
NEW, NEW_BEHIND, ONCE, ONCE_BEHIND, AGAIN = range(len(CLASSES))
# The class that stands in for one of which little is known: never one that is accepted more readily.
STAND_IN = (NEW, NEW, NEW, ONCE, ONCE)


def classify(drafts: int, ahead: np.ndarray | int, again: np.ndarray | int) -> tuple[np.ndarray, np.ndarray]:
    """Class of each draft of a round, and its place among those seen as often.

    Args:
        drafts: J.
        ahead: a, drafts that were seen; an int, or ``[n, 1]``.
        again: b, those of them that were seen more than once.

    Returns:
        int64 ``[J]`` or ``[n, J]`` each.
    """
    j = np.arange(drafts)
    once = np.where(again > np.zeros_like(j), ONCE_BEHIND, ONCE)
    new = np.where(ahead > np.zeros_like(j), NEW_BEHIND, NEW)
    kinds = np.where(j < again, AGAIN, np.where(j < ahead, once, new))
    return kinds, j - np.where(j < again, 0, np.where(j < ahead, again, ahead))


def _behind(rows: int, ahead: int, refused: int) -> tuple[int, int]:
    """What a round of ``rows`` that refuses draft ``refused`` leaves: rows ahead, and those of them seen before."""
    left = rows - 1 - refused
    return left, min(max(0, ahead - refused - 1), left)


class RoundChain:
    """Expected rounds of an image that makes K steps in rounds of at most L rows.

    A state of the chain is a step with two numbers: how many steps ahead have a row of an earlier round (``a``), and
    how many of those were asked about more than once (``b``). A round that begins at step k refuses draft j with the
    probabilities given, goes on at step k + j + 1, and leaves ``L - 1 - j`` rows ahead, of which ``a - j - 1`` had one
    before. A round without a refusal leaves none.

    Args:
        num_steps: K.
        length: L, at least 2; no more than K count.
        first: the first step that is drafted; those before are rounds of one row.
        reuse: whether rows of earlier rounds draft; without, every draft is new.
    """

    def __init__(self, num_steps: int, length: int, first: int = 1, reuse: bool = True) -> None:
        self.num_steps, self.length, self.first = num_steps, min(length, num_steps), first
        top = self.length - 1
        pairs = [(a, b) for a in range(top + 1 if reuse else 1) for b in range(a + 1)]
        number = {pair: i for i, pair in enumerate(pairs)}
        ahead, again = (np.array(column, np.int64)[:, None] for column in zip(*pairs, strict=True))
        # By state and draft: its class, and its place among the drafts of its class, as one index.
        classes, places = classify(top, ahead, again)
        self._kinds = classes * top + places
        # By rows of the round, state and draft: the state that a refusal leads to.
        self._after = {
            rows: np.array(
                [[number[_behind(rows, a, i)] if reuse else 0 for i in range(rows - 1)] for a in ahead[:, 0].tolist()],
                np.int64,
            ).reshape(len(pairs), rows - 1)
            for rows in range(1, self.length + 1)
        }
        self._states = len(pairs)

    def expected_rounds(self, acceptance: np.ndarray) -> tuple[float, np.ndarray]:
        """Rounds of an image, and how they change with each probability.

        Args:
            acceptance: ``[K, classes, M]``, of a draft of step k that is number m of its class (:data:`CLASSES`) in its
                round; M at least L - 1. The last step is never drafted.

        Returns:
            The expectation, and its gradient, alike.
        """
        top, states = self.length - 1, self._states
        flat = np.ascontiguousarray(acceptance[:, :, :top], np.float64).reshape(self.num_steps, -1)
        expected = np.zeros((self.num_steps + 1, states))
        for k in range(self.num_steps - 1, -1, -1):
            accepted, reached, left = self._round(k, slice(None), flat, expected)
            refused = reached[:, :-1] * (1.0 - accepted)
            expected[k] = 1.0 + (refused * left).sum(1) + reached[:, -1] * expected[k + 1 + accepted.shape[1], 0]

        gradient, visits = np.zeros_like(flat), np.zeros((self.num_steps + 1, states))
        visits[0, 0] = 1.0
        for k in range(self.num_steps):
            visited = np.flatnonzero(visits[k])
            accepted, reached, left = self._round(k, visited, flat, expected)
            drafts, weight = accepted.shape[1], visits[k, visited, None]
            refused = weight * reached[:, :-1] * (1.0 - accepted)
            done = k + 1 + drafts
            visits[done, 0] += float((weight[:, 0] * reached[:, -1]).sum())
            # Rounds still to come once draft j is accepted, from the last draft to the first.
            to_come = expected[done, 0]
            for j in range(drafts - 1, -1, -1):
                slope = weight[:, 0] * reached[:, j] * (to_come - left[:, j])
                gradient[k + j] += np.bincount(self._kinds[visited, j], slope, gradient.shape[1])
                to_come = (1.0 - accepted[:, j]) * left[:, j] + accepted[:, j] * to_come
                visits[k + 1 + j] += np.bincount(self._after[drafts + 1][visited, j], refused[:, j], states)
        whole = np.zeros_like(acceptance, dtype=np.float64)
        whole[:, :, :top] = gradient.reshape(self.num_steps, len(CLASSES), top)
        return float(expected[0, 0]), whole

    def _round(
        self, k: int, states: slice | np.ndarray, flat: np.ndarray, expected: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of rounds at step k from some states: acceptance ``[n, J]``, reached ``[n, J + 1]``, rounds after refusal."""
        rows = min(self.length, self.num_steps - k) if k >= self.first else 1
        drafts = np.arange(rows - 1)
        accepted = flat[k + drafts, self._kinds[states, : rows - 1]]
        reached = np.ones((len(accepted), rows))
        np.cumprod(accepted, axis=1, out=reached[:, 1:])
        return accepted, reached, expected[k + 1 + drafts, self._after[rows][states]]
