"""Which steps ahead earlier rounds have asked the target about, as far as draft lengths may know."""

from __future__ import annotations

import numpy as np


class SeenSteps:
    """How many of the steps ahead of each slot an earlier round of its image has asked about, by what was planned.

    Draft lengths decide how noise is tested that nobody has looked at, so nothing here comes from discarded rows, such
    as whether they are finite: only lengths and committed steps of rounds that are over.

    Args:
        slots: S.
        most: how many steps ahead have a row that is kept, at most; 0 where none drafts again.

    Attributes:
        counts: int64 ``[S]``.
    """

    def __init__(self, slots: int, most: int) -> None:
        self.most = most
        self.counts = np.zeros(slots, np.int64)

    def played(self, lengths: np.ndarray, committed: np.ndarray, steps: np.ndarray) -> None:
        """Take in a round: rows and committed steps of each slot, and its step now; 0 where a new image begins."""
        if self.most:
            asked = np.minimum(lengths - committed, self.most)
            self.counts = np.where(steps > 0, np.maximum(asked, self.counts - committed), 0).clip(min=0)

    def forget(self) -> None:
        """Steps were taken without drafts, which leaves no rows."""
        self.counts = np.zeros_like(self.counts)
