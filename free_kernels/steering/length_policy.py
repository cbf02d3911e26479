"""Draft lengths that pay: what acceptance and costs promise, checked against what the ordinary chain would have taken.

A length depends on tested rows only (never on those behind a refusal) and on times, so the images keep their law. What
runs leave for later ones hangs on the noise of their own seed: a run that repeats a seed has that law only if it starts
without, in another process or with another target or drafter object.
"""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass

import numpy as np

from free_kernels.steering.round_cost import RoundCost

# Longest drafts that are considered. Few, since each is a graph and a timing of its own.
LONGEST = (2, 3, 4, 6, 8, 12, 16)
_FEWEST_TIMINGS = 3
# Rounds after which an ordinary step is timed again: the machine may have become faster or slower.
_OLDEST_TIMING = 40
# Rounds are speculative where they promise this much more than ordinary steps.
_WANTED_SPEED = 1.02
# Time that may be lost to the ordinary chain: shares of the whole run's time and of the time already spent.
_LOSS_AT_START, _LOSS_ON_THE_WAY = 0.008, 0.006
# Share of what the runs before have saved that may be lost too, at most so many ordinary steps and that share of a run.
_RISKED, _RISKED_STEPS, _RISKED_OF_RUN = 0.75, 5.0, 0.02
_BINS = 25
_UNKNOWN_ACCEPTANCE = 0.85
# Ordinary steps to the next look at whether drafts promise to pay, which costs a little arithmetic: at least, where the
# cheapest trial is too dear, and at most.
_SHORTEST_WAIT, _LONGEST_WAIT = 32, 64
# Seconds of ordinary steps taken at once at most: what waits for them, a progress bar or an image, waits no longer.
_LONGEST_RUN_S = 0.25
# Ordinary steps between two trials of drafts that promise nothing, at first and at most.
_SHORTEST_HOLD, _LONGEST_HOLD = 2, 256
# What a round commits over what it promised, from which on trials are too rare.
_SURPRISE = 1.25
# Weight of a round's time over what was predicted, up to so much, against that of the rounds before.
_NEW_EXCESS, _SLOWEST = 0.1, 8.0


class AcceptanceModel:
    """Acceptance probability of a draft by step and look-ahead: a calibration, corrected by what the run sees.

    The odds of refusal are the calibration's times factors: of the counts by part of the chain that earlier runs left,
    and of what this run's latest rounds saw.

    Args:
        calibration: acceptance probabilities ``[K, A]``, of a draft of step k that lies a + 1 steps past the last exact
            feature.
        decay: weight of the past after each round.
    """

    # Refusals that the calibration counts for; tests after which earlier runs fade in full; their weight a run later.
    _PRIOR_REFUSALS, _FULL_TESTS, _DECAY_OF_RUNS = 0.5, 10.0, 0.9
    # Share of runs that are unlike those before.
    _UNLIKE = 0.1
    # Rounds that are counted at once: nobody asks for the counts before the next run.
    _COUNTED_AT_ONCE = 64

    def __init__(self, calibration: np.ndarray, decay: float = 0.9) -> None:
        calibration = np.clip(calibration, 1e-3, 1 - 1e-3)
        self._decay = decay
        length, ahead = calibration.shape
        # Acceptance as calibrated; entry [k, a]: the draft of step k + a in a round that begins at step k. The chain's
        # last step is never drafted.
        self._calibrated = np.zeros((length + 1, ahead))
        for a in range(min(ahead, length - 1)):
            self._calibrated[: length - 1 - a, a] = calibration[a:-1, a]
        # Part of the chain that each of those drafts belongs to.
        steps = np.arange(length + 1)[:, None] + np.arange(ahead)
        self._parts = np.minimum(steps, length - 1) * _BINS // length
        # Accepted, tested and, as calibrated, expected to be accepted, by part of the chain; of all runs, and how many
        # were tested since a run last began.
        self._counts, self._new_tests = np.zeros((3, _BINS)), 0
        # Steps, rows tested and rows accepted of the rounds that are not counted yet.
        self._uncounted: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self.begin()

    def begin(self) -> None:
        """Start a run: the calibration takes in the counts of those before."""
        self._count()
        # Old runs fade as new ones bring tests: a drafter may be trained on, and labels differ.
        self._counts *= self._DECAY_OF_RUNS ** min(1.0, self._new_tests / self._FULL_TESTS)
        self._new_tests = 0
        accepted, tested, expected = self._counts
        # What the runs saw anywhere stands for the parts of the chain where they saw little.
        whole = self._counts.sum(1).tolist()
        general = self._odds_factor(*whole)
        known = np.divide(expected, tested, out=np.full_like(tested, _UNKNOWN_ACCEPTANCE), where=tested > 0)
        corrected = known / (known + general * (1 - known))
        local = [self._odds_factor(a, n, n * mean) for a, n, mean in zip(accepted, tested, corrected, strict=True)]
        with np.errstate(divide="ignore"):
            self._odds = (1 / self._calibrated - 1) * (general * np.array(local))[self._parts]
        # Drafts of a round that are expected to be accepted if so many are tested.
        self._expected = np.zeros((len(self._odds), self._odds.shape[1] + 1))
        np.cumsum(1 / (1 + self._odds), axis=1, out=self._expected[:, 1:])
        self._recent = 0.0, 0.0, 0.0

    def _count(self) -> None:
        """Bring the counts up to date."""
        if not self._uncounted:
            return
        steps, tested, accepted = map(np.concatenate, zip(*self._uncounted, strict=True))
        self._uncounted.clear()
        ahead = np.arange(self._calibrated.shape[1])
        for row, until, weight in zip(
            self._counts, (accepted, tested, tested), (1.0, 1.0, self._calibrated[steps]), strict=True
        ):
            part = np.where(ahead < until[:, None], weight, 0.0)
            row += np.bincount(self._parts[steps].ravel(), part.ravel(), _BINS)

    @classmethod
    def _odds_factor(cls, accepted: float, tested: float, expected: float) -> float:
        """Odds of refusal of earlier runs, over those where ``expected`` are accepted; 1 where nothing was tested.

        What was expected is a Beta prior with the weight of so many tests as make half a refusal: one refusal never
        says much, and to say that almost none happens takes many acceptances.
        """
        mean = cls._share(expected, tested)
        prior = cls._PRIOR_REFUSALS / (1 - mean)
        return cls._odds_over(mean, (accepted + prior * mean) / (tested + prior))

    @staticmethod
    def _share(accepted: float, tested: float) -> float:
        """Accepted drafts of those tested; ours to guess where none was."""
        return min(max(accepted / tested if tested else _UNKNOWN_ACCEPTANCE, 1e-3), 1 - 1e-3)

    @staticmethod
    def _odds_over(mean: float, seen: float) -> float:
        """Odds of refusal where a share ``seen`` is accepted, over those where ``mean`` is."""
        seen = min(max(seen, 1e-3), 1 - 1e-3)
        return (1 - seen) / seen * mean / (1 - mean)

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
        return self._odds_over(mean, trust * mean + (1 - trust) * (accepted + mean) / (tested + 1))

    def survival(self, steps: np.ndarray) -> np.ndarray:
        """``[S, A]``: probability that the first a + 1 drafts of a round beginning at each step are all accepted."""
        return np.cumprod(1 / (1 + self._recent_factor() * self._odds[steps]), axis=1)

    def update(self, steps: np.ndarray, lengths: np.ndarray, committed: np.ndarray) -> None:
        """Take in a round of slots that drafted: rows tested are those up to and including the first refused one."""
        tested, accepted = np.minimum(committed, lengths - 1), committed - 1
        count = int(tested.sum())
        self._new_tests += count
        seen = float(accepted.sum()), float(count), float(self._expected[steps, tested].sum())
        self._recent = tuple(self._decay * past + now for past, now in zip(self._recent, seen, strict=True))
        self._uncounted.append((steps, tested, accepted))
        if len(self._uncounted) == self._COUNTED_AT_ONCE:
            self._count()


@dataclass
class Knowledge:
    """What runs of the same target, drafter, number of steps and slots, and settings leave for the next one."""

    cost: RoundCost
    acceptance: AcceptanceModel
    drafter: object = None  # kept alive, so that no other drafter gets its identity
    round: int = 0  # rounds of all runs
    excess: float = 1.0  # what rounds lately took over what was predicted
    saved: float = 0.0  # ordinary steps, against the ordinary chain; of runs before what may be risked
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
        kept[key] = Knowledge(RoundCost(slots, LONGEST[-1]), AcceptanceModel(table[:, ahead]), drafter)
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
        self._lengths = np.array(self._longest, np.int64)[:, None]
        self._elapsed = self._promised = 0.0
        self._next_look = 0
        # What runs just before have saved may be risked, so that no single refusal turns a run into ordinary steps.
        risked = min(_RISKED * knowledge.saved, _RISKED_STEPS + _RISKED_OF_RUN * num_steps)
        knowledge.saved = max(0.0, risked)
        # Where rounds have become too dear to be taken, nothing else would find out that they no longer are.
        knowledge.excess = 1.0 + 0.5 * (knowledge.excess - 1.0)

    def choose(self, live: np.ndarray, steps: np.ndarray) -> np.ndarray:
        """Rows ``[S]`` of the next round, given which slots hold an image, and their steps; all 1: an ordinary step."""
        lengths = live.astype(np.int64)
        known = self.knowledge
        known.round += 1
        if known.round < self._next_look or not self._longest:
            return lengths
        if self.cost.ordinary_timings < _FEWEST_TIMINGS or self.cost.ordinary_age >= _OLDEST_TIMING:
            return lengths
        drafting = np.flatnonzero(live & (steps >= self._first) & (steps < self.num_steps - 1))
        if not len(drafting):
            return lengths
        count = int(lengths.sum())
        # Whatever rounds lately took over what is predicted counts; so do an ordinary step's usual delays.
        step_s = self.cost.ordinary(count, 0.5) / known.excess
        gains = self.acceptance.survival(steps[drafting])
        ahead = gains.shape[1]
        gains = gains.ravel()
        order = (-gains).argsort(kind="stable")
        plans = self._plans(gains[order], order % ahead, count, step_s)
        speed, longest, last = max(plans)
        allowed = known.saved + _LOSS_AT_START * self.num_steps + _LOSS_ON_THE_WAY * self._elapsed / step_s
        if speed >= _WANTED_SPEED and allowed >= 0:
            known.hold = _SHORTEST_HOLD
        else:
            # Try all the same now and then, if cheap: neither costs nor acceptance may be known yet.
            speed, longest, last = plans[0]
            affordable = 1 / max(speed, 1e-3) - 1 <= max(0.0, allowed)
            wait = known.hold if affordable else max(known.hold, _SHORTEST_WAIT)
            self._next_look = known.round + min(wait, _LONGEST_WAIT)
            if known.round < known.next_trial or not affordable:
                return lengths
            known.next_trial = known.round + known.hold
            known.hold = min(2 * known.hold, _LONGEST_HOLD)
        taken = order[: last + 1]
        taken = taken[taken % ahead < longest - 1]
        self._promised = count + float(gains[taken].sum())
        lengths[drafting] += np.bincount(taken // ahead, minlength=len(drafting))
        return lengths

    @property
    def ordinary_ahead(self) -> int:
        """Rounds to take at once, the one just chosen included, that are ordinary steps whatever happens."""
        left = self._next_look - self.knowledge.round
        if left <= 1 or not self.cost.ordinary_timings:
            return 1
        return max(1, min(left, int(_LONGEST_RUN_S / self.cost.latest_ordinary)))

    def _begun_lengths(self) -> np.ndarray:
        """Lengths ``[P, 1]`` that were tried and the next one: what short drafts teach pays for the first long ones."""
        begun = sum(map(self.cost.has_begun, self._longest))
        return self._lengths[: begun + 1]

    def _plans(self, gains: np.ndarray, ahead: np.ndarray, count: int, step_s: float) -> list[tuple[float, int, int]]:
        """For each longest draft the best speed over ordinary steps, that length, and the last of the rows to take.

        Of rows in descending order of their gains, the probabilities of being reached and accepted.
        """
        longest = self._begun_lengths()
        taken = (ahead < longest - 1) & (gains > 0)
        committed = count + np.cumsum(taken * gains, axis=1)
        seconds = self.cost.round(longest, count + np.cumsum(taken, axis=1))
        speeds = taken * committed / seconds * (step_s / count)
        best = speeds.argmax(1)
        columns = speeds[np.arange(len(best)), best], longest[:, 0], best
        return list(zip(*(column.tolist() for column in columns), strict=True))

    def observe_ordinary(self, count: int, rounds: int, seconds: float) -> None:
        """Learn from ordinary steps of ``count`` images, ``rounds`` of them in ``seconds``, chosen at once."""
        self._elapsed += seconds
        self.knowledge.round += rounds - 1
        self.cost.observe(1, count, seconds / rounds, rounds)

    def observe(
        self, live: np.ndarray, steps: np.ndarray, lengths: np.ndarray, committed: np.ndarray, seconds: float
    ) -> None:
        """Learn from a round: its time and what it committed."""
        rows, longest, count = int(lengths.sum()), int(lengths.max()), int(live.sum())
        self._elapsed += seconds
        if longest == 1:
            self.cost.observe(longest, rows, seconds)
            return
        known, predicted = self.knowledge, float(self.cost.round(longest, rows))
        if self.cost.has_begun(longest):
            # What rounds really take, so that wrong predictions hide no loss; but one hiccup must not forbid
            # speculation for long, and the first round of a length is slow only once.
            known.excess += _NEW_EXCESS * (min(seconds / predicted, _SLOWEST) - known.excess)
        self.cost.observe(longest, rows, seconds)
        taken = known.excess * predicted
        total = int(committed.sum())
        known.saved += total / count - taken / self.cost.ordinary(count, 0.5)
        drafted = lengths > 1
        if total > _SURPRISE * self._promised:
            # The next trial comes sooner.
            known.hold = max(_SHORTEST_HOLD, known.hold // 4)
            known.next_trial = min(known.next_trial, known.round + known.hold)
            self._next_look = min(self._next_look, known.next_trial)
        self.acceptance.update(steps[drafted], lengths[drafted], committed[drafted])
