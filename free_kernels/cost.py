"""What a round costs, learned from the rounds themselves."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np

# Recent timings of a kind of round, of which the lower quartile counts: other work on the machine only adds time.
_KEPT = 7
# Rounds after which a timing no longer counts: the machine may have become free since.
_EXPIRY = 120
# Timings between two fits.
_REFIT_EVERY = 8
# Weight of the first guess of each coefficient against a kind of round that was timed.
_GUESS_WEIGHT = 0.01

# Latest timings of a kind of round: when, counted in rounds, and seconds.
Timings = deque[tuple[int, float]]


def _lower_quartile(values: list[float]) -> float:
    """As ``np.quantile(values, 0.25)``, which takes longer than all else here: this stands in every round's way."""
    ordered, place = sorted(values), (len(values) - 1) / 4
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


@dataclass
class RoundCost:
    """Seconds of a round of S slots: ``base + row * rows + draft * (longest - 1)``; an ordinary step: ``longest`` 1.

    A kind of round that was timed lately is predicted by the lower quartile of its latest timings; any other by a fit
    to those (relative errors), drawn to a first guess where they say nothing. Ordinary steps, which neither draft nor
    pack, are kept apart. The first round of each length is not counted: it makes what later ones reuse.

    Attributes:
        slots: S. With many, row counts of drafting rounds are rounded to multiples of ``grain``: kinds are few.
        longest: largest draft length.
    """

    slots: int = 1
    longest: int = 16
    _ordinary: dict[int, Timings] = field(default_factory=dict)  # by images
    _timings: dict[tuple[int, int], Timings] = field(default_factory=dict)  # by longest draft and rows / grain
    _begun: set[int] = field(default_factory=set)
    _round: int = 0
    _unfitted: int = 0  # timings since the last fit
    # Predictions by longest draft and rows / grain, once they were needed.
    _predicted: np.ndarray | None = None

    def __post_init__(self) -> None:
        self.grain = max(1, self.slots // 8)

    @property
    def ordinary_timings(self) -> int:
        """How many ordinary steps are timed, of those that are kept."""
        return sum(map(len, self._ordinary.values()))

    @property
    def ordinary_age(self) -> int:
        """Rounds since an ordinary step was timed last."""
        return self._round - self._latest_ordinary()[0]

    @property
    def latest_ordinary(self) -> float:
        """Seconds of the latest ordinary step; 0 before any."""
        return self._latest_ordinary()[1]

    def _latest_ordinary(self) -> tuple[int, float]:
        return max((times[-1] for times in self._ordinary.values()), default=(0, 0.0))

    def has_begun(self, longest: int) -> bool:
        """Whether a round of this length was observed before."""
        return longest in self._begun

    def observe(self, longest: int, rows: int, seconds: float, rounds: int = 1) -> None:
        """Take in the time of a round, or the mean of several."""
        self._round += rounds
        self._unfitted += 1
        if longest not in self._begun:
            self._begun.add(longest)
        elif longest == 1:
            self._ordinary.setdefault(rows, deque(maxlen=_KEPT)).append((self._round, seconds))
        else:
            kind = longest, self._grains(rows)
            times = self._timings.setdefault(kind, deque(maxlen=_KEPT))
            times.append((self._round, seconds))
            if len(times) == 1 or self._unfitted >= _REFIT_EVERY:
                self._predicted = None
            elif self._predicted is not None:
                self._predicted[kind] = self._typical(times)

    def _grains(self, rows: int | np.ndarray) -> int | np.ndarray:
        return (rows + self.grain // 2) // self.grain

    def ordinary(self, rows: int) -> float:
        """Seconds of an ordinary step of ``rows`` images; needs one to have been timed."""
        return self._typical(self._ordinary[min(self._ordinary, key=lambda count: abs(count - rows))])

    def round(self, longest: int | np.ndarray, rows: int | np.ndarray) -> float | np.ndarray:
        """Seconds of rounds with ``rows``, whose longest draft is ``longest >= 2``; the two are broadcast."""
        if self._predicted is None:
            self._predicted = self._predict()
        return self._predicted[longest, self._grains(rows)]

    def _predict(self) -> np.ndarray:
        """Predict all rounds anew."""
        self._unfitted = 0
        oldest = self._round - _EXPIRY
        lately = {kind: self._typical(times) for kind, times in self._timings.items() if times[-1][0] > oldest}
        base, row, draft = self._fit(lately)
        rows = self.grain * np.arange(self._grains(self.slots * self.longest) + 1)
        predicted = base + row * rows + draft * np.arange(-1, self.longest)[:, None]
        # Drafts do not make a round cheaper than an ordinary step.
        predicted = np.maximum(predicted, self.ordinary(max(self._ordinary)))
        for kind, seconds in lately.items():
            predicted[kind] = seconds
        return predicted

    def _typical(self, times: Timings) -> float:
        """Of the timings that have not expired, or of all where none is left."""
        kept = [seconds for when, seconds in times if when > self._round - _EXPIRY]
        return _lower_quartile(kept or [seconds for _, seconds in times])

    def _fit(self, lately: dict[tuple[int, int], float]) -> np.ndarray:
        """The three coefficients, given typical seconds of some kinds of round."""
        count = max(self._ordinary)
        step = self.ordinary(count)
        # Before anything is known: rows beyond the first cost half of it, a draft a fifth.
        guess = np.array([0.5 * step, 0.5 * step / count, 0.2 * step])
        features = np.array([[1.0, kind * self.grain, longest - 1] for longest, kind in lately]).reshape(-1, 3)
        # In units of the guess, so that one weight fits all three.
        scaled = features * guess / np.maximum(list(lately.values()), 1e-12).reshape(-1, 1)
        left = scaled.T @ scaled + _GUESS_WEIGHT * np.eye(3)
        return np.maximum(np.linalg.solve(left, scaled.sum(0) + _GUESS_WEIGHT), 0.0) * guess
