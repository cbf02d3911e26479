"""Which steps ahead earlier rounds have asked the target about, as far as draft lengths may know."""

from __future__ import annotations

from collections.abc import Sequence


class SeenSteps:
    """How many of the steps ahead of each slot an earlier round of its image has asked about, by what was planned.

    Draft lengths decide how noise is tested that nobody has looked at, so nothing here comes from discarded rows, such
    as whether they are finite: only lengths and committed steps of rounds that are over.

    Args:
        slots: S.
        most: how many steps ahead have a row that is kept, at most; 0 where none drafts again.

    Attributes:
        counts: ``[S]``.
    """

    def __init__(self, slots: int, most: int) -> None:
        self.most = most
        self.counts = [0] * slots

    def played(self, lengths: Sequence[int], committed: Sequence[int], steps: Sequence[int]) -> None:
        """Take in a round: rows and committed steps of each slot, and its step now; 0 where a new image begins."""
        if self.most:
            self.counts = [
                max(min(rows - done, self.most), count - done, 0) if step > 0 else 0
                for rows, done, step, count in zip(lengths, committed, steps, self.counts, strict=True)
            ]

    def forget(self) -> None:
        """Steps were taken without drafts, which leaves no rows."""
        self.counts = [0] * len(self.counts)
