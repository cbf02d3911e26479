"""How likely drafts are accepted, and what it is worth to ask about a step before it is tested."""

from __future__ import annotations

import numpy as np

from free_kernels.steering.refusal_odds import UNKNOWN_ACCEPTANCE, RefusalOdds


class AcceptanceModel:
    """Acceptance probability of drafts of two kinds: of steps that an earlier round asked about, and of new ones.

    In a round that begins at step k with m seen steps, the drafts of steps k to k + m - 1 are seen ones, whatever their
    look-ahead; those behind are new, with the look-ahead past the seen stretch. Nothing that is learned of one kind
    says anything of the other.

    Args:
        calibration: acceptance probabilities ``[K, A]`` of new drafts, of step k and a + 1 steps past the last exact
            feature.
        decay: weight of the past after each round that tests a kind.
    """

    def __init__(self, calibration: np.ndarray, decay: float = 0.9) -> None:
        # A seen row is taken to be worth an exact feature of the step before, before any was tested.
        seen = np.maximum(calibration[:, :1], UNKNOWN_ACCEPTANCE)
        self._new = RefusalOdds(calibration, decay)
        self._seen = RefusalOdds(np.broadcast_to(seen, calibration.shape), decay)
        self._kinds = self._new, self._seen
        self._width = calibration.shape[1]
        self._ahead = np.arange(self._width + 1)
        self._read()

    def begin(self) -> None:
        """Start a run: what is expected takes in the counts of those before."""
        for kind in self._kinds:
            kind.begin()
        self._read()

    def _read(self) -> None:
        self._new_odds = self._new.by_step.ravel()
        # Of the draft of step k + a: if it is the first new one, and if it is a seen one.
        odds = (_from_step_on(kind.by_step[:, 0], self._width + 1) for kind in self._kinds)
        self._first_odds, self._seen_odds = odds

    def survival(self, steps: np.ndarray, seen: np.ndarray | None = None, width: int | None = None) -> np.ndarray:
        """``[S, A]``: probability that the first a + 1 drafts of a round beginning at each step are all accepted.

        Args:
            steps: int ``[S]``.
            seen: int ``[S]``, how many of the steps ahead an earlier round asked about; none if None.
            width: A of the answer, at most the calibration's, which is the default.
        """
        width = self._width if width is None else width
        as_seen = None
        if seen is not None and seen.any():
            as_seen = self._acceptance(self._seen, self._seen_odds, steps, width)
        return np.cumprod(self._planned(steps, seen, as_seen, width), axis=1)

    def _planned(
        self, steps: np.ndarray, seen: np.ndarray | None, as_seen: np.ndarray | None, width: int
    ) -> np.ndarray:
        """``[S, width]``: acceptance of each draft if those before are; ``as_seen`` where an earlier round asked."""
        if seen is None or not seen.any():
            return self._acceptance(self._new, self._new.by_step, steps, width)
        ahead, seen = self._ahead[:width], seen[:, None]
        place = ((steps[:, None] + seen) * self._width - seen) + ahead
        as_new = 1 / (1 + self._new.factor * self._new_odds.take(place, mode="clip"))
        return np.where(ahead < seen, as_seen[:, :width], as_new)

    @staticmethod
    def _acceptance(kind: RefusalOdds, odds: np.ndarray, steps: np.ndarray, width: int) -> np.ndarray:
        return 1 / (1 + kind.factor * odds[steps, :width])

    def outlook(self, steps: np.ndarray, seen: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
        """What the rows of a round bring now and later.

        Every step is tested once, and each refusal ends a round. Asking about a step that is not tested in this round
        makes a seen one of it: it saves a refusal, and so a round, where the step would be refused as a new one only.
        That is counted if the step is tested in the next round, after a single refusal; before a later one there is
        another opportunity to ask.

        Args:
            steps: int ``[S]``, no later than the last but one.
            seen: int ``[S]``, how many of the steps ahead an earlier round asked about.
            width: A of the answer.

        Returns:
            ``[S, A]``, :meth:`survival`; and ``[S, A]``, refusals in the next round that are expected to be saved by
            the row of step k + a + 1, which draft a makes.
        """
        as_seen = self._acceptance(self._seen, self._seen_odds, steps, width + 1)
        survival = np.cumprod(self._planned(steps, seen, as_seen, width), axis=1)
        # All drafts up to this one accepted in the next round.
        later = np.maximum(np.cumprod(as_seen[:, :width], axis=1), 1e-300)
        refused = 1.0 - survival
        refused[:, 1:] -= refused[:, :-1].copy()
        tested = later * np.cumsum(refused / later, axis=1)
        as_new = self._acceptance(self._new, self._first_odds, steps + 1, width)
        saved = tested * np.maximum(as_seen[:, 1:] - as_new, 0.0)
        return survival, saved * (self._ahead[1 : width + 1] >= seen[:, None])

    def update(
        self, steps: np.ndarray, lengths: np.ndarray, committed: np.ndarray, seen: np.ndarray | None = None
    ) -> None:
        """Take in a round of slots that drafted: rows tested are those up to and including the first refused one."""
        tested, accepted = np.minimum(committed, lengths - 1), committed - 1
        if seen is not None and seen.any():
            tested_seen, accepted_seen = np.minimum(tested, seen), np.minimum(accepted, seen)
            self._seen.update(steps, tested_seen, accepted_seen)
            steps, tested, accepted = steps + seen, tested - tested_seen, accepted - accepted_seen
        self._new.update(steps, tested, accepted)


def _from_step_on(odds: np.ndarray, width: int) -> np.ndarray:
    """``[K + 1, width]``: odds ``[K + 1]`` of each step and those after it; behind the chain all is refused."""
    padded = np.concatenate([odds, np.full(width, np.inf)])
    return np.lib.stride_tricks.sliding_window_view(padded, width)
