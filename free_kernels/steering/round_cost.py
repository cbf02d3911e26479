"""What a round costs, learned from the rounds themselves."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np

# Recent timings of a kind of round, and the quantile of them that counts: other work on the machine only adds time.
_KEPT, _SHARE = 7, 0.25
# Rounds after which a timing no longer speaks for its kind, and after every so many its weight in the fit is halved: it
# may have been an unlucky one. With enough kinds that were timed lately, others are left out.
_EXPIRY, _ENOUGH_KINDS = 120, 3
# Timings between two fits.
_REFIT_EVERY = 16
# Timings for which the fit counts, beside a kind's own.
_FIT_COUNTS = 3.0
# Weight of the first guess of each coefficient against a kind of round that was timed.
_GUESS_WEIGHT = 0.01

# Latest timings of a kind of round: when, counted in rounds; seconds; seconds of an ordinary step at that time.
Timings = deque[tuple[int, float, float]]


def _quantile(values: list[float], share: float) -> float:
    """As ``np.quantile``, which takes longer than all else here: this stands in every round's way."""
    ordered, place = sorted(values), (len(values) - 1) * share
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


@dataclass
class RoundCost:
    """Seconds of a round of S slots: ``base + row * rows + draft * (longest - 1)``; an ordinary step: ``longest`` 1.

    Where drafts are free, that is made without a drafter, the last term is left out.

    A fit (relative errors) to the lower quartiles of the latest timings of each kind of round, drawn to a first guess
    where they say nothing; a kind that was timed lately is predicted by its own quartile, the more timings the more.
    Ordinary steps, which neither draft nor pack, are kept apart, and are the unit of whatever is not recent: the
    machine may become faster or slower. The first round of each length is not counted: it makes what later ones reuse.

    Attributes:
        slots: S. With many, row counts of drafting rounds are rounded to multiples of ``grain``: kinds are few.
        longest: largest draft length.
    """

    slots: int = 1
    longest: int = 32
    _ordinary: dict[int, Timings] = field(default_factory=dict)  # by images
    # By whether drafts are free (1 or 0, the first index of what is predicted), longest draft and rows / grain.
    _timings: dict[tuple[int, int, int], Timings] = field(default_factory=dict)
    _begun: set[tuple[int, int]] = field(default_factory=set)  # by whether drafts are free, and longest draft
    _round: int = 0
    _step_s: float = 0.0  # of an ordinary step of as many images as ever, when it was asked for last
    _unfitted: int = 0  # timings since the last fit
    # Alike, once they were needed: the fit, and what is predicted.
    _fitted: np.ndarray | None = None
    _predicted: np.ndarray | None = None

    def __post_init__(self) -> None:
        self.grain = max(1, self.slots // 8)

    @property
    def kinds_begun(self) -> int:
        """How many lengths, of each kind of drafts, were observed before."""
        return len(self._begun)

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

    def _latest_ordinary(self) -> tuple[int, float, float]:
        return max((times[-1] for times in self._ordinary.values()), default=(0, 0.0, 0.0))

    def has_begun(self, longest: int, free: bool = False) -> bool:
        """Whether a round of this length, with drafts of this kind, was observed before."""
        return (int(free), longest) in self._begun

    def observe(self, longest: int, rows: int, seconds: float, rounds: int = 1, *, free: bool = False) -> None:
        """Take in the time of a round, or the mean of several; ``free`` if no drafter made its drafts."""
        self._round += rounds
        self._unfitted += 1
        if not self.has_begun(longest, free):
            self._begun.add((int(free), longest))
        elif longest == 1:
            self._ordinary.setdefault(rows, deque(maxlen=_KEPT)).append((self._round, seconds, seconds))
            self._step()
        elif self._ordinary:
            kind = int(free), longest, self._grains(rows)
            times = self._timings.setdefault(kind, deque(maxlen=_KEPT))
            times.append((self._round, seconds, self._step_s))
            if len(times) == 1:
                self._predicted = None
            elif self._predicted is not None:
                self._predicted[kind] = self._blended(kind)

    def _step(self) -> float:
        """Seconds of an ordinary step of as many images as ever."""
        self._step_s = self.ordinary(max(self._ordinary))
        return self._step_s

    def _grains(self, rows: int) -> int:
        return max((rows + self.grain // 2) // self.grain, 1)

    def ordinary(self, rows: int, share: float = _SHARE) -> float:
        """Seconds of an ordinary step of ``rows`` images, at a quantile; needs one to have been timed."""
        return self._typical(self._ordinary[min(self._ordinary, key=lambda count: abs(count - rows))], share)

    def round(self, longest: int, rows: int, free: bool = False) -> float:
        """Seconds of a round of ``rows``, whose longest draft is ``longest >= 2``."""
        return float(self.seconds(free)[longest, self._grains(rows)])

    def seconds(self, free: bool) -> np.ndarray:
        """Seconds of rounds ``[longest + 1, S longest / grain + 1]``: by longest draft, and rows over ``grain``."""
        if self._predicted is None or self._unfitted >= _REFIT_EVERY:
            self._predict()
        return self._predicted[int(free)]

    def _predict(self) -> None:
        """Predict all rounds anew."""
        self._unfitted = 0
        step = self._step()
        base, row, draft = step * self._fit(step)
        rows = self.grain * np.arange(self._grains(self.slots * self.longest) + 1)
        drafts = np.array([1.0, 0.0])[:, None, None] * np.arange(-1, self.longest)[:, None]
        fitted = base + row * rows + draft * drafts
        # Drafts do not make a round cheaper than an ordinary step, nor than its rows' share of one where few are left.
        self._fitted = np.maximum(fitted, step * np.minimum(rows / max(self._ordinary), 1.0))
        self._predicted = self._fitted.copy()
        for kind, times in self._timings.items():
            if self._is_recent(times):
                self._predicted[kind] = self._blended(kind)

    def _blended(self, kind: tuple[int, int, int]) -> float:
        """Seconds of a kind of round that was timed lately: the more often, the less the fit counts."""
        times = self._timings[kind]
        count = sum(when > self._round - _EXPIRY for when, *_ in times)
        fitted = float(self._fitted[kind])
        return fitted + count / (count + _FIT_COUNTS) * (self._typical(times) - fitted)

    def _is_recent(self, times: Timings) -> bool:
        return times[-1][0] > self._round - _EXPIRY

    def _typical(self, times: Timings, share: float = _SHARE) -> float:
        """Seconds, of the timings that have not expired, or of all where none is left."""
        kept = [seconds for when, seconds, _ in times if when > self._round - _EXPIRY]
        return _quantile(kept or [seconds for _, seconds, _ in times], share)

    def _in_steps(self, times: Timings, step: float) -> float:
        """In ordinary steps: of now, which are known best, or of then, if that is long ago."""
        if self._is_recent(times):
            return self._typical(times) / step
        return _quantile([seconds / then for _, seconds, then in times], _SHARE)

    def _fit(self, step: float) -> np.ndarray:
        """The three coefficients in ordinary steps, which take ``step`` seconds."""
        # Before anything is known: rows beyond the first cost half of a step, a draft a fifth.
        guess = np.array([0.5, 0.5 / max(self._ordinary), 0.2])
        # A round without drafts would be an ordinary step, more or less: it tells rows from drafts.
        known = [([1.0, count, 0.0], self._typical(times) / step, 1.0) for count, times in self._ordinary.items()]
        recent = sum(map(self._is_recent, self._timings.values()))
        for (free, longest, grains), times in self._timings.items():
            expired = (self._round - times[-1][0]) // _EXPIRY
            if not expired or recent < _ENOUGH_KINDS:
                drafts = 0.0 if free else longest - 1.0
                known.append(([1.0, grains * self.grain, drafts], self._in_steps(times, step), 0.5**expired))
        features, typical, weights = map(np.array, zip(*known, strict=True))
        # In units of the guess, so that one weight fits all three.
        scaled = features * guess / np.maximum(typical, 1e-12)[:, None]
        weighted = scaled.T * weights
        left = weighted @ scaled + _GUESS_WEIGHT * np.eye(3)
        return np.maximum(np.linalg.solve(left, weighted.sum(1) + _GUESS_WEIGHT), 0.0) * guess
