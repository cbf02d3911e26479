"""What a round costs, learned from the rounds themselves."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np

# Recent timings of a kind of round, of which the lower quartile counts: other work on the machine only adds time.
_KEPT = 7
# Rounds after which a timing no longer counts: the machine may have become free since.
_EXPIRY = 120
# Timings between two fits, which only say something of kinds that were not timed themselves.
_REFIT_EVERY = 8
# Weight of the first guess of each coefficient against a kind of round that was timed.
_GUESS_WEIGHT = 0.01


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
        grain: row counts of drafting rounds are rounded to multiples of this, so that kinds are few.
    """

    grain: int = 1
    _timings: dict[tuple[int, int], deque[tuple[int, float]]] = field(default_factory=dict)
    _begun: set[int] = field(default_factory=set)
    _round: int = 0
    _coefficients: np.ndarray | None = None
    _unfitted: int = 0  # timings since the last fit
    # Typical time of a kind, and until which round it stands if no timing is added.
    _typicals: dict[tuple[int, int], tuple[float, int]] = field(default_factory=dict)

    @property
    def ordinary_timings(self) -> int:
        """How many ordinary steps are timed, of those that are kept."""
        return sum(len(times) for (longest, _), times in self._timings.items() if longest == 1)

    @property
    def ordinary_age(self) -> int:
        """Rounds since an ordinary step was timed last."""
        return self._round - self._latest_ordinary()[0]

    @property
    def latest_ordinary(self) -> float:
        """Seconds of the latest ordinary step; 0 before any."""
        return self._latest_ordinary()[1]

    def _latest_ordinary(self) -> tuple[int, float]:
        return max((times[-1] for (longest, _), times in self._timings.items() if longest == 1), default=(0, 0.0))

    def has_begun(self, longest: int) -> bool:
        """Whether a round of this length was observed before."""
        return longest in self._begun

    def observe(self, longest: int, rows: int, seconds: float, rounds: int = 1) -> None:
        """Take in the time of a round, or the mean of several."""
        self._round += rounds
        self._unfitted += 1
        if longest not in self._begun:
            self._begun.add(longest)
            return
        if longest > 1:
            rows = max(1, round(rows / self.grain)) * self.grain
        if (longest, rows) not in self._timings or self._unfitted >= _REFIT_EVERY:
            self._coefficients = None
        self._timings.setdefault((longest, rows), deque(maxlen=_KEPT)).append((self._round, seconds))
        self._typicals.pop((longest, rows), None)

    def ordinary(self, rows: int) -> float:
        """Seconds of an ordinary step of ``rows`` images; needs one to have been timed."""
        known = [count for longest, count in self._timings if longest == 1]
        kind = 1, min(known, key=lambda count: abs(count - rows))
        fresh = self._timings[kind][-1][0] > self._round - _EXPIRY
        return self._typical(kind, expire=fresh)

    def round(self, longest: int | np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Seconds of rounds with ``rows``, whose longest draft is ``longest >= 2``, which is broadcast to them."""
        rounded = np.maximum(1, np.round(rows / self.grain)) * self.grain
        seconds = np.full(np.broadcast_shapes(np.shape(longest), rounded.shape), np.nan)
        for kind in self._lately():
            seconds[(rounded == kind[1]) & (longest == kind[0])] = self._typical(kind)
        untimed = np.isnan(seconds)
        if untimed.any():
            base, row, draft = self._fit()
            seconds = np.where(untimed, base + row * rows + draft * (longest - 1), seconds)
        return seconds

    def _lately(self) -> list[tuple[int, int]]:
        """Kinds of drafting rounds with a timing that still counts."""
        return [kind for kind, times in self._timings.items() if kind[0] > 1 and times[-1][0] > self._round - _EXPIRY]

    def _typical(self, kind: tuple[int, int], expire: bool = True) -> float:
        value, until = self._typicals.get(kind, (0.0, -1)) if expire else (0.0, -1)
        if until < self._round:
            oldest = self._round - _EXPIRY if expire else -1
            kept = [(when, seconds) for when, seconds in self._timings[kind] if when > oldest]
            value = _lower_quartile([seconds for _, seconds in kept])
            if expire:
                self._typicals[kind] = value, kept[0][0] + _EXPIRY - 1
        return value

    def _fit(self) -> np.ndarray:
        if self._coefficients is None:
            self._unfitted = 0
            count = max(rows for longest, rows in self._timings if longest == 1)
            step = self.ordinary(count)
            # Before anything is known: rows beyond the first cost half of it, a draft a fifth.
            guess = np.array([0.5 * step, 0.5 * step / count, 0.2 * step])
            kinds = self._lately()
            features = np.array([[1.0, rows, longest - 1] for longest, rows in kinds]).reshape(-1, 3)
            typical = np.array([self._typical(kind) for kind in kinds])
            # In units of the guess, so that one weight fits all three.
            scaled = features * guess / np.maximum(typical, 1e-12)[:, None]
            left = scaled.T @ scaled + _GUESS_WEIGHT * np.eye(3)
            self._coefficients = np.maximum(np.linalg.solve(left, scaled.sum(0) + _GUESS_WEIGHT), 0.0) * guess
        return self._coefficients
