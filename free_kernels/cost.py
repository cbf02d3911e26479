"""What a round costs, learned from the rounds themselves."""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass, field

import numpy as np

# Recent timings of a kind of round, of which the lower quartile counts: other work on the machine only adds time.
_KEPT = 9
# Timings of each kind that the fit looks at, against one pseudo-timing for each coefficient's first guess.
_GUESS_WEIGHT = 0.05


def _typical(times: deque[float]) -> float:
    return float(np.quantile(times, 0.25))


@dataclass
class RoundCost:
    """Seconds of a round of S slots: ``base + row * rows + draft * (longest - 1)``; an ordinary step: ``longest`` 1.

    A kind of round that was timed is predicted by the lower quartile of its latest timings; any other by a fit to those
    (relative errors), drawn to a first guess where they say nothing. Ordinary steps, which neither draft nor pack, are
    kept apart. The first round of each length is not counted: it makes what later ones reuse.

    Attributes:
        grain: row counts of drafting rounds are rounded to multiples of this, so that kinds are few.
        timings: recent seconds by (longest, rows).
    """

    grain: int = 1
    timings: dict[tuple[int, int], deque[float]] = field(
        default_factory=lambda: defaultdict(lambda: deque(maxlen=_KEPT))
    )
    _begun: set[int] = field(default_factory=set)
    _coefficients: np.ndarray | None = None

    def observe(self, longest: int, rows: int, seconds: float) -> None:
        """Take in the time of one round."""
        if longest not in self._begun:
            self._begun.add(longest)
            return
        if longest > 1:
            rows = max(1, round(rows / self.grain)) * self.grain
        self.timings[longest, rows].append(seconds)
        self._coefficients = None

    def ordinary(self, rows: int) -> float:
        """Seconds of an ordinary step of ``rows`` images; needs one to have been timed."""
        known = {count: _typical(times) for (longest, count), times in self.timings.items() if longest == 1}
        if rows in known:
            return known[rows]
        nearest = min(known, key=lambda count: abs(count - rows))
        return known[nearest]

    def round(self, longest: int, rows: np.ndarray) -> np.ndarray:
        """Seconds of rounds whose longest draft is ``longest >= 2``, for each of the row counts."""
        base, row, draft = self._fit()
        seconds = base + row * rows + draft * (longest - 1)
        rounded = np.maximum(1, np.round(rows / self.grain)) * self.grain
        for (kind, count), times in self.timings.items():
            if kind == longest:
                seconds = np.where(rounded == count, _typical(times), seconds)
        return seconds

    def _fit(self) -> np.ndarray:
        if self._coefficients is None:
            count = max(rows for longest, rows in self.timings if longest == 1)
            step = self.ordinary(count)
            # Before anything is known: rows beyond the first cost half of it, a draft a fifth.
            guess = np.array([0.5 * step, 0.5 * step / count, 0.2 * step])
            kinds = [(longest, rows) for longest, rows in self.timings if longest > 1]
            features = np.array([[1.0, rows, longest - 1] for longest, rows in kinds]).reshape(-1, 3)
            typical = np.array([_typical(self.timings[kind]) for kind in kinds])
            # In units of the guess, so that one weight fits all three.
            scaled = features * guess / np.maximum(typical, 1e-12)[:, None]
            left = scaled.T @ scaled + _GUESS_WEIGHT * np.eye(3)
            self._coefficients = np.maximum(np.linalg.solve(left, scaled.sum(0) + _GUESS_WEIGHT), 0.0) * guess
        return self._coefficients
