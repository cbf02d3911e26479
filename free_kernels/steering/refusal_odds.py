"""Odds that drafts of one kind are refused, by step and look-ahead."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

# Parts of the chain that are told apart.
_BINS = 25
# Of two parts: 1 where they are the same, a half so many parts apart, next to nothing far away.
_HALF_AS_NEAR = 2.5
_NEARNESS = 1 / (1 + (np.subtract.outer(np.arange(_BINS), np.arange(_BINS)) / _HALF_AS_NEAR) ** 4)
# Weights of what was seen anywhere, nearby and in a part.
_WEIGHTS = np.stack([np.ones((_BINS, _BINS)), _NEARNESS, np.eye(_BINS)])
# The least acceptance and the least refusal.
_LEAST = 1e-3
# Acceptance of a drafter without a calibration before any draft was tested.
UNKNOWN_ACCEPTANCE = 0.85


class RefusalOdds:
    """Odds of refusal of a draft by step and look-ahead: a calibration's, corrected by what the runs see.

    They are the calibration's times factors: of the counts that earlier runs left anywhere, near a part of the chain
    and in it, and of what this run's latest rounds saw.

    Args:
        calibration: acceptance probabilities ``[K, A]``, of a draft of step k that lies a + 1 steps past the last exact
            feature.
        decay: weight of the past after each round that tests such drafts.

    Attributes:
        by_step: ``[K + 1, A]``, odds without the latest rounds' factor; entry [k, a]: the draft of step k + a, a + 1
            steps past the last exact feature.
    """

    # Refusals that the calibration counts for; tests after which earlier runs fade in full; their weight a run later.
    _PRIOR_REFUSALS, _FULL_TESTS, _DECAY_OF_RUNS = 0.5, 10.0, 0.9
    # Share of runs that are unlike those before.
    _UNLIKE = 0.1
    # Rows that are counted at once: nobody asks for the counts before the next run.
    _COUNTED_AT_ONCE = 64

    def __init__(self, calibration: np.ndarray, decay: float = 0.9) -> None:
        calibration = np.clip(calibration, _LEAST, 1 - _LEAST)
        self._decay = decay
        length, ahead = calibration.shape
        # Acceptance as calibrated; entry [k, a]: the draft of step k + a in a round that begins at step k. The chain's
        # last step is never drafted.
        self._calibrated = np.zeros((length + 1, ahead))
        for a in range(min(ahead, length - 1)):
            self._calibrated[: length - 1 - a, a] = calibration[a:-1, a]
        with np.errstate(divide="ignore"):
            self._calibrated_odds = 1 / self._calibrated - 1
        # Part of the chain that each of those drafts belongs to.
        steps = np.arange(length + 1)[:, None] + np.arange(ahead)
        self._parts = np.minimum(steps, length - 1) * _BINS // length
        # Accepted, tested and, as calibrated, expected to be accepted, by part of the chain; of all runs, and how many
        # were tested since a run last began.
        self._counts, self._new_tests = np.zeros((3, _BINS)), 0
        # Steps, rows tested and rows accepted that are not counted yet.
        self._uncounted: list[tuple[int, int, int]] = []
        self.begin()

    def begin(self) -> None:
        """Start a run: the calibration takes in the counts of those before."""
        self._count()
        # Old runs fade as new ones bring tests: a drafter may be trained on, and labels differ.
        self._counts *= self._DECAY_OF_RUNS ** min(1.0, self._new_tests / self._FULL_TESTS)
        self._new_tests = 0
        # Where little was seen of a part, what was seen nearby stands for it, and for that what was seen anywhere.
        factors = np.ones(_BINS)
        for accepted, tested, expected in self._counts @ _WEIGHTS:
            known = np.where(tested > 0, expected / np.maximum(tested, 1e-300), UNKNOWN_ACCEPTANCE)
            factors *= self._odds_factors(accepted, tested, known / (known + factors * (1 - known)))
        self.by_step = self._calibrated_odds * factors[self._parts]
        # Drafts of a round that are expected to be accepted if so many are tested.
        self._expected = np.zeros((len(self.by_step), self.by_step.shape[1] + 1))
        np.cumsum(1 / (1 + self.by_step), axis=1, out=self._expected[:, 1:])
        self._recent, self._factor = (0.0, 0.0, 0.0), 1.0

    def _count(self) -> None:
        """Bring the counts up to date."""
        if not self._uncounted:
            return
        steps, tested, accepted = np.array(self._uncounted).T
        self._uncounted.clear()
        ahead, parts = np.arange(self._calibrated.shape[1]), self._parts[steps]
        was_tested = ahead < tested[:, None]
        self._counts += (
            np.bincount(parts[ahead < accepted[:, None]], minlength=_BINS),
            np.bincount(parts[was_tested], minlength=_BINS),
            np.bincount(parts[was_tested], self._calibrated[steps][was_tested], _BINS),
        )

    @classmethod
    def _odds_factors(cls, accepted: np.ndarray, tested: np.ndarray, mean: np.ndarray) -> np.ndarray:
        """Odds of refusal of earlier runs, over those where a share ``mean`` is accepted; 1 where nothing was tested.

        What was expected is a Beta prior with the weight of so many tests as make half a refusal: one refusal never
        says much, and to say that almost none happens takes many acceptances.
        """
        # `np.clip` takes three times as long.
        mean = np.minimum(np.maximum(mean, _LEAST), 1 - _LEAST)
        prior = cls._PRIOR_REFUSALS / (1 - mean)
        seen = np.minimum(np.maximum((accepted + prior * mean) / (tested + prior), _LEAST), 1 - _LEAST)
        return _odds_over(mean, seen)

    @staticmethod
    def _share(accepted: float, tested: float) -> float:
        """Accepted drafts of those tested; ours to guess where none was."""
        return min(max(accepted / tested if tested else UNKNOWN_ACCEPTANCE, _LEAST), 1 - _LEAST)

    def _recent_factor(self) -> float:
        """Odds of refusal of this run's latest rounds, over those expected.

        Either all is as expected, or this run is unlike those before, and what was expected is a Beta prior with the
        weight of one test: a refusal among many acceptances is forgotten soon, and a few in a row leave no doubt.
        """
        accepted, tested, expected = self._recent
        refused, mean = tested - accepted, self._share(expected, tested)
        usual = accepted * math.log(mean) + refused * math.log(1 - mean)
        other = sum(
            math.lgamma(count + share) - math.lgamma(share) for count, share in ((accepted, mean), (refused, 1 - mean))
        ) - math.lgamma(tested + 1)
        trust = 1 / (1 + self._UNLIKE / (1 - self._UNLIKE) * math.exp(min(other - usual, 700.0)))
        seen = trust * mean + (1 - trust) * (accepted + mean) / (tested + 1)
        return _odds_over(mean, min(max(seen, _LEAST), 1 - _LEAST))

    @property
    def factor(self) -> float:
        """Odds of refusal of this run's latest rounds, over those expected."""
        if self._factor is None:
            self._factor = self._recent_factor()
        return self._factor

    def update(self, rounds: list[tuple[int, int, int]]) -> None:
        """Take in a round of slots: the step of the first such draft of each, how many were tested and accepted."""
        tested = sum(count for _, count, _ in rounds)
        if not tested:
            return
        self._new_tests += tested
        was_accepted, was_tested, expected = self._recent
        self._recent = (
            self._decay * was_accepted + sum(count for *_, count in rounds),
            self._decay * was_tested + tested,
            self._decay * expected + sum(float(self._expected[step, count]) for step, count, _ in rounds),
        )
        self._factor = None
        self._uncounted += rounds
        if len(self._uncounted) >= self._COUNTED_AT_ONCE:
            self._count()


def _odds_over(mean: Any, seen: Any) -> Any:
    """Odds of refusal where a share ``seen`` is accepted, over those where ``mean`` is; of numbers or of arrays."""
    return (1 - seen) / seen * mean / (1 - mean)
