"""Draft lengths that pay: what acceptance and costs promise, checked against what the ordinary chain would have taken.

A length depends on tested rows only (never on those behind a refusal) and on times, so the images keep their law. What
runs leave for later ones hangs on the noise of their own seed: a run that repeats a seed has that law only if it starts
without, in another process or with another target or drafter object.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from free_kernels.protocols import DrafterDefaults, frozen_steps
from free_kernels.steering.acceptance_model import AcceptanceModel
from free_kernels.steering.plan import PlanArguments, plan_round
from free_kernels.steering.refusal_odds import UNKNOWN_ACCEPTANCE
from free_kernels.steering.round_cost import RoundCost
from free_kernels.validation import fail

# Longest drafts that are considered. Few, since each is a graph and a timing of its own.
LONGEST = (2, 3, 4, 6, 8, 12, 16, 24, 32)
_FEWEST_TIMINGS = 3
# Rounds after which an ordinary step is timed again: the machine may have become faster or slower. Sooner where drafts
# promise less than this speed over ordinary steps.
_OLDEST_TIMING, _OLDEST_IN_DOUBT, _CLEAR_SPEED = 100, 20, 1.2
# Rounds that weigh as much as all before them in how far costs are trusted, and the least that they can say.
_TRUST_ROUNDS, _LEAST_TRUST = 8, 0.5
# Share of a round that a saved refusal saves: rounds also end where a window does.
_ROUNDS_SAVED = 0.7
# Weight of a round against those before in what rounds commit.
_NEW_COMMITTED = 0.1
# Rounds are speculative where they promise this much more than ordinary steps.
_WANTED_SPEED = 1.05
# Time that may be lost to the ordinary chain: shares of the whole run's time and of the time already spent.
_LOSS_AT_START, _LOSS_ON_THE_WAY = 0.008, 0.006
# Share of what the runs before have saved that may be lost too, at most so many ordinary steps and that share of a run.
_RISKED, _RISKED_STEPS, _RISKED_OF_RUN = 0.75, 5.0, 0.02
# Ordinary steps to the next look at whether drafts promise to pay, which costs a little arithmetic: at least, where the
# cheapest trial is too dear, and at most.
_SHORTEST_WAIT, _LONGEST_WAIT = 32, 64
# With this share of the images of the last look it is time for another one: rows cost less of a step.
_FEWER = 0.75
# Seconds of ordinary steps taken at once at most: what waits for them, a progress bar or an image, waits no longer.
_LONGEST_RUN_S = 0.25
# Ordinary steps between two trials of drafts that promise nothing, at first and at most.
_SHORTEST_HOLD, _LONGEST_HOLD = 2, 256
# What a round commits over what it promised, from which on trials are too rare.
_SURPRISE = 1.25
# Weight of a round's time over what was predicted, up to so much, against that of the rounds before.
_NEW_EXCESS, _SLOWEST = 0.1, 8.0


@dataclass
class Knowledge:
    """What runs of the same target, drafter, number of steps and slots, and settings leave for the next one."""

    cost: RoundCost
    acceptance: AcceptanceModel
    drafter: object = None  # kept alive, so that no other drafter gets its identity
    round: int = 0  # rounds of all runs
    excess: float = 1.0  # what rounds lately took over what was predicted
    speed: float = 1.0  # what the best plan promised last, over ordinary steps, as far as promises are trusted
    trust: float = 1.0  # what rounds with drafts were thought to take over what they took, at most 1
    saved: float = 0.0  # ordinary steps, against the ordinary chain; of runs before what may be risked
    committed: float = 2.0  # steps of an image that rounds with drafts lately committed
    hold: int = _SHORTEST_HOLD  # rounds between two trials of drafts that promise nothing
    next_trial: int = 0  # round of the next one


@dataclass
class _Pending:
    """Rounds with drafts since an ordinary step was timed, of as many images."""

    count: int
    rounds: int = 0
    seconds: float = 0.0
    thought: float = 0.0  # what they were thought to take, in ordinary steps

    def take(self, seconds: float, thought: float) -> None:
        """Add a round."""
        self.rounds += 1
        self.seconds, self.thought = self.seconds + seconds, self.thought + thought


# Runs of different kinds that an owner keeps knowledge of; the one that was asked for longest ago makes room.
_MOST_KEPT = 64
_KNOWN: weakref.WeakKeyDictionary[object, dict[object, Knowledge]] = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()


def knowledge_of(
    owner: object, drafter: object, settings: tuple[object, ...], num_steps: int, slots: int, given: object = None
) -> Knowledge:
    """The knowledge kept for ``owner`` (as long as it lives), a drafter and plain settings, or a new one.

    A drafter may bring ``calibration``, acceptance probabilities ``[bins, A]`` by part of the chain and look-ahead;
    nothing is known of the steps that clean samples draft. ``given`` is the caller's drafter, where ``drafter`` is a
    copy of it for one run.
    """
    try:
        kept = _KNOWN.setdefault(owner, {})
    except TypeError:
        kept = {}
    free = DrafterDefaults.read(drafter, "is_free")
    # The drafter's share of the chain may be changed between runs.
    frozen = frozen_steps("sample", drafter, num_steps, has_memory=False)
    given = drafter if given is None else given
    key = (type(drafter), None if free else id(given), frozen, num_steps, slots, *settings)
    with _LOCK:
        known = kept.pop(key, None) or Knowledge(
            RoundCost(slots, LONGEST[-1]), _acceptance(drafter, num_steps, frozen), given
        )
        # The latest comes last.
        kept[key] = known
        if len(kept) > _MOST_KEPT:
            del kept[next(iter(kept))]
    return known


def _acceptance(drafter: object, num_steps: int, frozen: int) -> AcceptanceModel:
    """What a drafter's calibration says of the steps from ``frozen`` on."""
    given = DrafterDefaults.read(drafter, "calibration")
    table = np.full((1, 1), UNKNOWN_ACCEPTANCE) if given is None else _checked_table(given)
    table = table[np.arange(num_steps) * len(table) // num_steps]
    if frozen < num_steps:
        table[:frozen] = UNKNOWN_ACCEPTANCE
    ahead = np.minimum(np.arange(LONGEST[-1] - 1), table.shape[1] - 1)
    return AcceptanceModel(table[:, ahead])


def _checked_table(given: object) -> np.ndarray:
    """A drafter's calibration as an array; TypeError or ValueError where it is none."""
    expectation = "probabilities [bins, A], None or a table of them"
    try:
        table = np.asarray(given, np.float64)
    except (TypeError, ValueError):
        fail("sample", "drafter.calibration", expectation, given, TypeError)
    if table.ndim != 2 or not table.size or not ((table >= 0.0) & (table <= 1.0)).all():
        fail("sample", "drafter.calibration", expectation, given)
    return table


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
        reuses: whether rows behind a refusal draft their steps again, however far they reach.
        room: ``[K]``, the most rows of a round from each step on; None: up to the end of the chain.
        free: drafts of rounds that begin before this step cost no call of a drafter.
    """

    def __init__(
        self,
        num_steps: int,
        longest: int,
        knowledge: Knowledge,
        first: int = 1,
        *,
        reuses: bool = False,
        room: Sequence[int] | None = None,
        free: int = 0,
    ) -> None:
        self.num_steps, self._first, self._reuses, self._free = num_steps, first, reuses, free
        self._room = range(num_steps, 0, -1) if room is None else room
        self.knowledge = knowledge
        self.cost, self.acceptance = knowledge.cost, knowledge.acceptance
        self.acceptance.begin()
        self._longest = [length for length in LONGEST if length <= longest]
        # Those of them that are considered, as of so many kinds of rounds.
        self._considered: list[int] = []
        self._kinds_begun = -1
        self._elapsed = self._promised = 0.0
        # Round of the next look at drafts, and the images of the last one.
        self._next_look, self._looked_with = 0, 0
        self._pending: _Pending | None = None
        self._seen: Sequence[int] = []
        # What runs just before have saved may be risked, so that no single refusal turns a run into ordinary steps.
        risked = min(_RISKED * knowledge.saved, _RISKED_STEPS + _RISKED_OF_RUN * num_steps)
        knowledge.saved = max(0.0, risked)
        # Where rounds have become too dear to be taken, nothing else would find out that they no longer are.
        knowledge.excess = 1.0 + 0.5 * (knowledge.excess - 1.0)

    def choose(self, live: Sequence[bool], steps: Sequence[int], seen: Sequence[int] | None = None) -> list[int]:
        """Rows ``[S]`` of the next round; all 1: an ordinary step.

        Args:
            live: ``[S]``, which slots hold an image.
            steps: ``[S]``.
            seen: ``[S]``, how many of the steps ahead an earlier round asked about; none if None.
        """
        lengths = [int(holds) for holds in live]
        known, self._seen = self.knowledge, [0] * len(lengths) if seen is None else seen
        known.round += 1
        count = sum(lengths)
        if (known.round < self._next_look and count > _FEWER * self._looked_with) or not self._longest:
            return lengths
        oldest = _OLDEST_TIMING if known.speed >= _CLEAR_SPEED else _OLDEST_IN_DOUBT
        if self.cost.ordinary_timings < _FEWEST_TIMINGS or self.cost.ordinary_age >= oldest:
            return lengths
        room = [
            self._room[step] - 1 if holds and step >= self._first else 0
            for holds, step in zip(live, steps, strict=True)
        ]
        drafting = [slot for slot, drafts in enumerate(room) if drafts > 0]
        if not drafting:
            return lengths
        self._looked_with = count
        # Whatever rounds lately took over what is predicted counts; so do an ordinary step's usual delays.
        step_s = self.cost.ordinary(count, 0.5) / known.excess
        at = [steps[slot] for slot in drafting]
        best, shortest = plan_round(
            PlanArguments(
                at,
                [self._seen[slot] for slot in drafting],
                [room[slot] for slot in drafting],
                self.acceptance,
                _ROUNDS_SAVED * known.committed if self._reuses else None,
                self._begun_lengths(),
                self.cost.seconds(max(at) < self._free),
                self.cost.grain,
                count,
            )
        )
        # Speeds are told over that of ordinary steps.
        ordinary, plan = step_s / count, best
        known.speed = best.speed * ordinary * known.trust
        allowed = known.saved + _LOSS_AT_START * self.num_steps + _LOSS_ON_THE_WAY * self._elapsed / step_s
        if known.speed >= _WANTED_SPEED and allowed >= 0:
            known.hold, self._next_look = _SHORTEST_HOLD, 0
        else:
            # Try all the same now and then, if cheap: neither costs nor acceptance may be known yet.
            plan = shortest
            affordable = 1 / max(plan.speed * ordinary, 1e-3) - 1 <= max(0.0, allowed)
            wait = known.hold if affordable else max(known.hold, _SHORTEST_WAIT)
            self._next_look = known.round + min(wait, _LONGEST_WAIT)
            if known.round < known.next_trial or not affordable:
                return lengths
            known.next_trial = known.round + known.hold
            known.hold = min(2 * known.hold, _LONGEST_HOLD)
        self._promised = plan.promised
        for slot, drafts in zip(drafting, plan.drafts, strict=True):
            lengths[slot] += drafts
        return lengths

    @property
    def ordinary_ahead(self) -> int:
        """Rounds to take at once, the one just chosen included, that are ordinary steps whatever happens."""
        left = self._next_look - self.knowledge.round
        if left <= 1 or not self.cost.ordinary_timings:
            return 1
        return max(1, min(left, int(_LONGEST_RUN_S / self.cost.latest_ordinary)))

    def _begun_lengths(self) -> list[int]:
        """Lengths that were tried and the next one: what short drafts teach pays for the first long ones."""
        kinds = self.cost.kinds_begun
        if kinds != self._kinds_begun:
            begun = sum(any(self.cost.has_begun(length, free) for free in (True, False)) for length in self._longest)
            self._considered, self._kinds_begun = self._longest[: begun + 1], kinds
        return self._considered

    def _settle(self, count: int, step_s: float) -> None:
        """Replace what rounds since the last ordinary step were thought to take by what they took, now one was timed.

        Its time had no part in choosing them. Those of the steps before did: where they were timed too slow, drafts
        seem to pay.
        """
        pending, known = self._pending, self.knowledge
        self._pending = None
        if pending is None or pending.count != count:
            return
        taken = pending.seconds / step_s
        known.saved += pending.thought - taken
        share = pending.rounds / (pending.rounds + _TRUST_ROUNDS)
        known.trust = min(1.0, known.trust + share * (max(pending.thought / taken, _LEAST_TRUST) - known.trust))

    def observe_ordinary(self, count: int, rounds: int, seconds: float) -> None:
        """Learn from ordinary steps of ``count`` images, ``rounds`` of them in ``seconds``, chosen at once."""
        self._elapsed += seconds
        self.knowledge.round += rounds - 1
        self._settle(count, seconds / rounds)
        self.cost.observe(1, count, seconds / rounds, rounds)

    def observe(
        self,
        live: Sequence[bool],
        steps: Sequence[int],
        lengths: Sequence[int],
        committed: Sequence[int],
        seconds: float,
    ) -> None:
        """Learn from the round that was just chosen: its time and what it committed."""
        rows, longest, count = sum(lengths), max(lengths), sum(live)
        self._elapsed += seconds
        if longest == 1:
            self._settle(count, seconds)
            self.cost.observe(longest, rows, seconds)
            return
        drafted = [slot for slot, length in enumerate(lengths) if length > 1]
        free = max(steps[slot] for slot in drafted) < self._free
        known, predicted = self.knowledge, self.cost.round(longest, rows, free)
        if self.cost.has_begun(longest, free):
            # What rounds really take, so that wrong predictions hide no loss; but one hiccup must not forbid
            # speculation for long, and the first round of a length is slow only once.
            known.excess += _NEW_EXCESS * (min(seconds / predicted, _SLOWEST) - known.excess)
        self.cost.observe(longest, rows, seconds, free=free)
        taken = known.excess * predicted
        total = sum(committed)
        thought = taken / self.cost.ordinary(count, 0.5)
        known.saved += total / count - thought
        if self._pending is None or self._pending.count != count:
            self._pending = _Pending(count)
        self._pending.take(seconds, thought)
        known.committed += _NEW_COMMITTED * (total / count - known.committed)
        if total > _SURPRISE * self._promised:
            # The next trial comes sooner.
            known.hold = max(_SHORTEST_HOLD, known.hold // 4)
            known.next_trial = min(known.next_trial, known.round + known.hold)
            self._next_look = min(self._next_look, known.next_trial)
        self.acceptance.update((steps[slot], lengths[slot], committed[slot], self._seen[slot]) for slot in drafted)
