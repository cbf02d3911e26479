"""Draft lengths that pay: what acceptance and costs promise, checked against what the ordinary chain would have taken.

A length depends on tested rows only (never on those behind a refusal) and on times, so the images keep their law.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import numpy as np

from free_kernels.cost import RoundCost

# Longest drafts that are considered. Few, since each is a graph and a timing of its own.
LONGEST = (2, 3, 4, 6, 8, 12, 16)
_FEWEST_TIMINGS = 3
# Rounds after which an ordinary step is timed again: the machine may have become faster or slower.
_OLDEST_TIMING = 40
# Rounds are speculative where they promise this much more than ordinary steps.
_WANTED_SPEED = 1.02
# Time that may be lost to the ordinary chain: shares of the whole run's time and of the time already spent.
_LOSS_AT_START, _LOSS_ON_THE_WAY = 0.008, 0.006
_BINS = 25
_UNKNOWN_ACCEPTANCE = 0.85
# Ordinary steps between two looks at whether drafts promise to pay, which costs a little arithmetic.
_LOOK_EVERY = 32
# Seconds of ordinary steps taken at once at most: what waits for them, a progress bar or an image, waits no longer.
_LONGEST_RUN_S = 0.25
# Ordinary steps between two trials of drafts that promise nothing, at first and at most.
_SHORTEST_HOLD, _LONGEST_HOLD = 2, 256
# What a round commits over what it promised, from which on trials are too rare.
_SURPRISE = 1.25
# A round counts with its own time where it is the first of its length, which is slow, up to so many typical ones.
_SLOWEST = 2.0


class AcceptanceModel:
    """Acceptance probability of a draft by step and look-ahead: a calibration, corrected by what the run sees.

    The odds of refusal are the calibration's times one factor, which makes the calibration agree with the running
    share of accepted drafts; the counts by step that a run leaves correct the calibration of later runs.

    Args:
        calibration: acceptance probabilities ``[K, A]``, of a draft of step k that lies a + 1 steps past the last exact
            feature.
        decay: weight of the past after each round.
    """

    _PRIOR_TESTS, _PRIOR_OF_RUNS, _DECAY_OF_RUNS = 4.0, 10.0, 0.9

    def __init__(self, calibration: np.ndarray, decay: float = 0.9) -> None:
        calibration = np.clip(calibration, 1e-3, 1 - 1e-3)
        self._decay = decay
        length, ahead = calibration.shape
        self._bin = np.arange(length) * _BINS // length
        # Odds of refusal as calibrated; entry [k, a]: the draft of step k + a in a round that begins at step k.
        self._calibrated = np.full((length + 1, ahead), np.inf)
        for a in range(min(ahead, length)):
            self._calibrated[: length - a, a] = 1 / calibration[a:, a] - 1
        # Accepted, tested and, as calibrated, expected to be accepted, by part of the chain; of all runs, and how many
        # were tested since a run last began.
        self._counts, self._new_tests = np.zeros((3, _BINS)), 0
        self.begin()

    def begin(self) -> None:
        """Start a run: the calibration takes in the counts of those before."""
        # Old runs fade as new ones bring tests: a drafter may be trained on, and labels differ.
        self._counts *= self._DECAY_OF_RUNS ** min(1.0, self._new_tests / self._PRIOR_OF_RUNS)
        self._new_tests = 0
        accepted, tested, expected = self._counts
        # What the runs saw anywhere stands for the parts of the chain where they saw little.
        whole = self._counts.sum(1)
        general = self._odds_factor(*whole[:2], self._share(whole[2], whole[1]), self._PRIOR_OF_RUNS)
        mean = 1 / (1 + general * (1 / self._share(expected, tested) - 1))
        local = self._odds_factor(accepted, tested, mean, self._PRIOR_OF_RUNS)
        self._odds = self._calibrated * (general * local)[self._parts(np.arange(len(self._calibrated)))]
        self._recent = np.zeros(3)

    def _parts(self, steps: np.ndarray) -> np.ndarray:
        """``[S, A]``: part of the chain of each draft of a round that begins at each step."""
        return self._bin[np.minimum(steps[:, None] + np.arange(self._calibrated.shape[1]), len(self._bin) - 1)]

    @staticmethod
    def _share(accepted: np.ndarray, tested: np.ndarray) -> np.ndarray:
        """Accepted drafts of those tested; ours to guess where none was."""
        share = np.divide(accepted, tested, out=np.full_like(accepted, _UNKNOWN_ACCEPTANCE), where=tested > 0)
        return np.clip(share, 1e-3, 1 - 1e-3)

    @staticmethod
    def _odds_factor(accepted: np.ndarray, tested: np.ndarray, mean: np.ndarray, prior: float) -> np.ndarray:
        """Odds of refusal seen, over those where a share ``mean`` is accepted; that share where nothing was tested."""
        mean = np.clip(mean, 1e-3, 1 - 1e-3)
        seen = np.clip((accepted + prior * mean) / (tested + prior), 1e-3, 1 - 1e-3)
        return (1 / seen - 1) / (1 / mean - 1)

    def survival(self, steps: np.ndarray) -> np.ndarray:
        """``[S, A]``: probability that the first a + 1 drafts of a round beginning at each step are all accepted."""
        accepted, tested, expected = self._recent
        factor = self._odds_factor(accepted, tested, self._share(expected, tested), self._PRIOR_TESTS)
        return np.cumprod(1 / (1 + factor * self._odds[steps]), axis=1)

    def update(self, steps: np.ndarray, lengths: np.ndarray, committed: np.ndarray) -> None:
        """Take in a round of slots that drafted: rows tested are those up to and including the first refused one."""
        ahead = np.arange(self._odds.shape[1])
        tested = ahead < np.minimum(committed, lengths - 1)[:, None]
        accepted = tested & (ahead < (committed - 1)[:, None])
        expected, calibrated = (np.where(tested, 1 / (1 + odds[steps]), 0.0) for odds in (self._odds, self._calibrated))
        self._new_tests += int(tested.sum())
        self._recent = self._decay * self._recent + np.array([accepted.sum(), tested.sum(), expected.sum()])
        for row, part in zip(self._counts, (accepted, tested, calibrated), strict=True):
            np.add.at(row, self._parts(steps), part)


@dataclass
class Knowledge:
    """What runs of the same target, drafter, schedule and number of slots leave for the next one."""

    cost: RoundCost
    acceptance: AcceptanceModel
    drafter: object = None  # kept alive, so that no other drafter gets its identity
    round: int = 0  # rounds of all runs
    hold: int = _SHORTEST_HOLD  # rounds between two trials of drafts that promise nothing
    next_trial: int = 0  # round of the next one


_KNOWN: weakref.WeakKeyDictionary[object, dict[object, Knowledge]] = weakref.WeakKeyDictionary()


def knowledge_of(owner: object, drafter: object, settings: tuple[object, ...], num_steps: int, slots: int) -> Knowledge:
    """The knowledge kept for ``owner`` (as long as it lives), a drafter and plain settings, or a new one.

    A drafter may bring ``calibration``, acceptance probabilities ``[bins, A]`` by part of the chain and look-ahead.
    """
    try:
        kept = _KNOWN.setdefault(owner, {})
    except TypeError:
        kept = {}
    free = getattr(drafter, "is_free", False)
    key = (type(drafter), None if free else id(drafter), num_steps, slots, *settings)
    if key not in kept:
        table = getattr(drafter, "calibration", None)
        table = np.full((1, 1), _UNKNOWN_ACCEPTANCE) if table is None else np.asarray(table, np.float64)
        table = table[np.arange(num_steps) * len(table) // num_steps]
        ahead = np.minimum(np.arange(LONGEST[-1] - 1), table.shape[1] - 1)
        kept[key] = Knowledge(RoundCost(max(1, slots // 8)), AcceptanceModel(table[:, ahead]), drafter)
    return kept[key]


class DraftLengthPolicy:
    """Chooses the rows of every slot, round by round, for most committed steps per second.

    Of all drafted rows those most likely to be reached are taken, as many as pay. Speculation has to promise more than
    ordinary steps, and never goes on past a small loss against them, measured: a useless drafter or a device where rows
    cost full price ends up with the ordinary chain.

    Args:
        num_steps: K.
        longest: largest draft length.
        knowledge: costs and acceptance so far; brought up to date.
        first: first step that the drafter drafts.
    """

    def __init__(self, num_steps: int, longest: int, knowledge: Knowledge, first: int = 1) -> None:
        self.num_steps, self._first = num_steps, first
        self.knowledge = knowledge
        self.cost, self.acceptance = knowledge.cost, knowledge.acceptance
        self.acceptance.begin()
        self._longest = [length for length in LONGEST if length <= longest]
        self._loss = self._elapsed = self._promised = 0.0
        self._next_look = 0

    def choose(self, live: np.ndarray, steps: np.ndarray) -> np.ndarray:
        """Rows ``[S]`` of the next round, given which slots hold an image, and their steps; all 1: an ordinary step."""
        lengths = live.astype(np.int64)
        known = self.knowledge
        known.round += 1
        if known.round < self._next_look or not self._longest:
            return lengths
        drafting = live & (steps >= self._first) & (steps < self.num_steps - 1)
        if not drafting.any():
            return lengths
        if self.cost.ordinary_timings < _FEWEST_TIMINGS or self.cost.ordinary_age >= _OLDEST_TIMING:
            return lengths
        count = int(live.sum())
        step_s = self.cost.ordinary(count)
        gains = self.acceptance.survival(steps[drafting])
        gains[np.arange(gains.shape[1]) >= (self.num_steps - 1 - steps[drafting])[:, None]] = 0.0
        plans = self._plans(gains, count, step_s)
        speed, longest, threshold = max(plans)
        allowed = _LOSS_AT_START * self.num_steps * step_s + _LOSS_ON_THE_WAY * self._elapsed
        if speed >= _WANTED_SPEED and self._loss <= allowed:
            known.hold = _SHORTEST_HOLD
        else:
            self._next_look = known.round + min(_LOOK_EVERY, known.hold)
            # Try all the same now and then, if cheap: neither costs nor acceptance may be known yet.
            speed, longest, threshold = plans[0]
            if known.round < known.next_trial or self._loss + step_s * (1 / max(speed, 1e-3) - 1) > allowed:
                return lengths
            known.next_trial = known.round + known.hold
            known.hold = min(2 * known.hold, _LONGEST_HOLD)
        taken = gains[:, : longest - 1] >= max(threshold, 1e-12)
        self._promised = count + float(gains[:, : longest - 1][taken].sum())
        lengths[drafting] += taken.sum(1)
        return lengths

    @property
    def ordinary_ahead(self) -> int:
        """Rounds to take at once, the one just chosen included, that are ordinary steps whatever happens."""
        left = self._next_look - self.knowledge.round
        if left <= 1 or not self.cost.ordinary_timings:
            return 1
        return max(1, min(left, int(_LONGEST_RUN_S / self.cost.latest_ordinary)))

    def _begun_lengths(self) -> list[int]:
        """Lengths that were tried and the next one: what is learned on short drafts pays for the first long ones."""
        begun = sum(self.cost.has_begun(length) for length in self._longest)
        return self._longest[: begun + 1]

    def _plans(self, gains: np.ndarray, count: int, step_s: float) -> list[tuple[float, int, float]]:
        """For each longest draft the best speed over ordinary steps, that length, and the least gain of a row taken."""
        order = np.argsort(-gains, axis=None, kind="stable")
        ordered, ahead = gains.ravel()[order], order % gains.shape[1]
        longest = np.array(self._begun_lengths())[:, None]
        taken = ahead < longest - 1
        committed = count + np.cumsum(np.where(taken, ordered, 0.0), axis=1)
        seconds = self.cost.round(longest, count + np.cumsum(taken, axis=1))
        speeds = np.where(taken, committed / count * step_s / seconds, 0.0)
        best = speeds.argmax(1)
        return [(float(speeds[i, at]), int(longest[i, 0]), float(ordered[at])) for i, at in enumerate(best)]

    def observe_ordinary(self, count: int, rounds: int, seconds: float) -> None:
        """Learn from ordinary steps of ``count`` images, ``rounds`` of them in ``seconds``, chosen at once."""
        self._elapsed += seconds
        self.knowledge.round += rounds - 1
        self.cost.observe(1, count, seconds / rounds, rounds)

    def observe(
        self, live: np.ndarray, steps: np.ndarray, lengths: np.ndarray, committed: np.ndarray, seconds: float
    ) -> None:
        """Learn from a round: its time and what it committed."""
        count, longest = int(live.sum()), int(lengths.max())
        self._elapsed += seconds
        rows = int(lengths.sum())
        first = not self.cost.has_begun(longest)
        self.cost.observe(longest, rows, seconds)
        if longest == 1:
            return
        # Typical times, not this round's: one hiccup would forbid speculation for long.
        taken = float(self.cost.round(longest, np.array([rows]))[0])
        if first:
            taken = min(max(seconds, taken), _SLOWEST * taken)
        self._loss += taken - float(committed.sum()) / count * self.cost.ordinary(count)
        drafted = lengths > 1
        if float(committed.sum()) > _SURPRISE * self._promised:
            # The next trial comes sooner.
            known = self.knowledge
            known.hold = max(_SHORTEST_HOLD, known.hold // 4)
            known.next_trial = min(known.next_trial, known.round + known.hold)
            self._next_look = min(self._next_look, known.next_trial)
        self.acceptance.update(steps[drafted], lengths[drafted], committed[drafted])
