"""How likely drafts are accepted, and what it is worth to ask about a step before it is tested."""

from __future__ import annotations

from collections.abc import Iterable

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
        # Of each step's draft: if it is the first new one, and if it is a seen one; behind the chain all is refused.
        behind = np.full(self._width + 1, np.inf)
        self._first_odds, self._seen_odds = (np.concatenate([kind.by_step[:, 0], behind]) for kind in self._kinds)

    @property
    def odds(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, float, float]:
        """What :func:`free_kernels.steering.plan.plan_round` reads.

        Odds of refusal of new drafts ``[K + 1, A]`` by step of the round and look-ahead; of the draft of each step as
        the first new one and as a seen one; and the factors of this run's latest rounds for new and seen ones.
        """
        return self._new.by_step, self._first_odds, self._seen_odds, self._new.factor, self._seen.factor

    def survival(self, steps: np.ndarray, seen: np.ndarray | None = None, width: int | None = None) -> np.ndarray:
        """``[S, A]``: probability that the first a + 1 drafts of a round beginning at each step are all accepted.

        Args:
            steps: int ``[S]``.
            seen: int ``[S]``, how many of the steps ahead an earlier round asked about; none if None.
            width: A of the answer, at most the calibration's, which is the default.
        """
        width = self._width if width is None else width
        as_seen = None
        if seen is not None and any(seen.tolist()):
            as_seen = _acceptance(self._seen, self._seen_odds, steps[:, None] + self._ahead[:width])
        return np.multiply.accumulate(self._planned(steps, seen, as_seen, width), axis=1)

    def _planned(
        self, steps: np.ndarray, seen: np.ndarray | None, as_seen: np.ndarray | None, width: int
    ) -> np.ndarray:
        """``[S, width]``: acceptance of each draft if those before are; ``as_seen`` where an earlier round asked."""
        ahead = self._ahead[:width]
        if as_seen is None:
            return _acceptance(self._new, self._new.by_step, (steps * self._width)[:, None] + ahead)
        as_new = _acceptance(self._new, self._new.by_step, ((steps + seen) * self._width - seen)[:, None] + ahead)
        return np.where(ahead < seen[:, None], as_seen[:, :width], as_new)

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
        place = steps[:, None] + self._ahead[: width + 1]
        as_seen = _acceptance(self._seen, self._seen_odds, place)
        survival = np.multiply.accumulate(self._planned(steps, seen, as_seen, width), axis=1)
        # All drafts up to this one accepted in the next round.
        later = np.maximum(np.multiply.accumulate(as_seen[:, :width], axis=1), 1e-300)
        refused = 1.0 - survival
        refused[:, 1:] -= refused[:, :-1].copy()
        tested = later * np.add.accumulate(refused / later, axis=1)
        as_new = _acceptance(self._new, self._first_odds, place[:, 1:])
        saved = tested * np.maximum(as_seen[:, 1:] - as_new, 0.0)
        return survival, saved * (self._ahead[1 : width + 1] >= seen[:, None])

    def update(self, rounds: Iterable[tuple[int, int, int, int]]) -> None:
        """Take in a round of slots that drafted: step, rows, committed steps of each, and how many steps were seen.

        Rows tested are those up to and including the first refused one.
        """
        of_seen, of_new = [], []
        for step, length, committed, seen in rounds:
            tested, accepted = min(committed, length - 1), committed - 1
            if seen:
                of_seen.append((step, min(tested, seen), min(accepted, seen)))
            if tested > seen:
                of_new.append((step + seen, tested - seen, max(accepted - seen, 0)))
        self._seen.update(of_seen)
        self._new.update(of_new)


def _acceptance(kind: RefusalOdds, odds: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Of drafts whose odds stand at some places of an array, counted row by row."""
    return 1 / (1 + kind.factor * odds.take(places, mode="clip"))
