"""Rounds of one trajectory as a Markov chain over steps, from the acceptance of drafts: exact expectations.

A round that begins at step k has ``n = min(L, K - k)`` rows (one at step 0, if that is not drafted). It commits
more than j of them with probability ``a(k, 0) a(k + 1, 1) ... a(k + j - 1, j - 1)``, where ``a(s, i)`` is the
acceptance of the draft of step s that lies i + 1 steps past the last exact feature, if those before it were accepted;
the row behind the last draft is always committed. Rounds are taken to be independent given the step they begin at, so
the better first draft after a refusal is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from free_kernels.validation import check_int, fail


def acceptance_table(acceptance: np.ndarray, num_steps: int) -> np.ndarray:
    """``[K, A]`` for a chain of K steps, from probabilities ``[bins, A]`` by part of the chain and look-ahead.

    ``[bins, A]`` is what a drafter's ``calibration`` holds; longer look-aheads take the last column.

    Raises:
        ValueError: not a table of numbers in [0, 1].
    """
    table = np.asarray(acceptance, np.float64)
    if table.ndim != 2 or not table.size or not ((table >= 0) & (table <= 1)).all():
        fail("acceptance_table", "acceptance", "probabilities [bins, look-ahead]", f"an array {list(table.shape)}")
    return table[np.arange(num_steps) * len(table) // num_steps]


def acceptance_of_stats(by_step: np.ndarray) -> np.ndarray:
    """``[K, 1]`` from a run's ``stats.acceptance_by_step``; a step where no draft was tested takes its neighbours'."""
    by_step = np.asarray(by_step, np.float64)
    known = np.flatnonzero(np.isfinite(by_step))
    if not len(known):
        fail("acceptance_of_stats", "by_step", "known at one step at least", "none")
    return np.interp(np.arange(len(by_step)), known, by_step[known])[:, None]


@dataclass(frozen=True)
class CommitChain:
    """A trajectory of K steps under draft length L.

    Attributes:
        acceptance: ``[K, A]``, of a draft by step and look-ahead; the last column holds for longer look-aheads.
        length: L.
        first_step: whether drafts begin at step 0 already.
    """

    acceptance: np.ndarray
    length: int
    first_step: bool = False

    def __post_init__(self) -> None:
        check_int("CommitChain", "length", self.length, 1, len(self.acceptance))

    @property
    def num_steps(self) -> int:
        """K."""
        return len(self.acceptance)

    @cached_property
    def rows(self) -> np.ndarray:
        """int64 ``[K]``, rows of a round that begins at each step."""
        rows = np.minimum(self.length, self.num_steps - np.arange(self.num_steps))
        if not self.first_step:
            rows[0] = 1
        return rows

    @cached_property
    def transition(self) -> np.ndarray:
        """``[K, K + 1]``, probability that a round from step k ends at each step; K is finished."""
        steps, ahead = np.arange(self.num_steps)[:, None], np.arange(self.length - 1)
        column = np.minimum(ahead, self.acceptance.shape[1] - 1)
        accepted = self.acceptance[np.minimum(steps + ahead, self.num_steps - 1), column]
        # [k, j]: more than j rows are committed.
        beyond = np.cumprod(np.hstack([np.ones((self.num_steps, 1)), accepted]), axis=1)
        beyond *= np.arange(self.length) < self.rows[:, None]
        commits = beyond - np.hstack([beyond[:, 1:], np.zeros((self.num_steps, 1))])
        matrix = np.zeros((self.num_steps, self.num_steps + 1))
        for count in range(1, self.length + 1):
            begin = np.flatnonzero(self.rows >= count)
            matrix[begin, begin + count] = commits[begin, count - 1]
        return matrix

    @cached_property
    def visits(self) -> np.ndarray:
        """``[K]``, probability that a round of an image begins at each step; they sum to its expected rounds."""
        visits = np.zeros(self.num_steps + 1)
        visits[0] = 1.0
        for step in range(self.num_steps):
            visits += visits[step] * self.transition[step]
        # Rounding may take a sum of probabilities above 1; clipped here and below, so that 1 - p stays at least 0.
        return visits[:-1].clip(0.0, 1.0)

    @property
    def rounds(self) -> float:
        """Expected rounds of an image."""
        return float(self.visits.sum())

    @property
    def call_reduction(self) -> float:
        """Steps committed per round, as ``stats.call_reduction`` of many images."""
        return self.num_steps / self.rounds

    @cached_property
    def drafting(self) -> np.ndarray:
        """``[L]``, share of the rounds, of an image or of a slot that is never idle, with more than j rows."""
        more = self.rows[:, None] > np.arange(self.length)
        return (self.visits @ more / self.rounds).clip(0.0, 1.0)

    @cached_property
    def profile(self) -> np.ndarray:
        """``[K, L]``, probability that an image's round r = 0 ... K - 1 takes place and has more than j rows."""
        more = self.rows[:, None] > np.arange(self.length)
        profile = np.empty((self.num_steps, self.length))
        at = np.zeros(self.num_steps)
        at[0] = 1.0
        for r in range(self.num_steps):
            profile[r] = at @ more
            at = at @ self.transition[:, :-1]
        return profile.clip(0.0, 1.0)

    def rounds_of_slowest(self, images: int) -> float:
        """Expected rounds until the last of so many independent images is finished."""
        return float((1 - (1 - self.profile[:, 0]) ** images).sum())
