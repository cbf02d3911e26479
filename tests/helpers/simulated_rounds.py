"""Runs of simulated images: what rounds cost and which drafts are accepted is given, lengths are chosen by a policy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from free_kernels.steering.length_policy import LONGEST, AcceptanceModel, DraftLengthPolicy, Knowledge
from free_kernels.steering.round_cost import RoundCost
from free_kernels.steering.seen_steps import SeenSteps

STEPS = 250


def seconds_by_rows(of_rows: Callable[[np.ndarray], np.ndarray]) -> Callable[..., np.ndarray]:
    """In the place of :meth:`RoundCost.seconds`: rounds that take as long as their rows say, however long."""

    def seconds(self: RoundCost, free: bool) -> np.ndarray:
        grains = self.slots * self.longest // self.grain + 2
        return np.tile(of_rows(self.grain * np.arange(grains, dtype=np.float64)), (self.longest + 1, 1))

    return seconds


class World:
    """A machine and a drafter: seconds of a round, and whether the drafts of a step are accepted.

    Args:
        slots: images.
        acceptance: of drafts.
        row: seconds of all slots' further rows.
        draft: seconds of a draft.
        late: acceptance in the chain's last fifth.
        seen: acceptance of steps that an earlier round has asked about; None where refused rows are thrown away.
    """

    def __init__(
        self,
        slots: int,
        acceptance: float,
        row: float,
        draft: float,
        late: float | None = None,
        seen: float | None = None,
    ) -> None:
        self.slots, self.row, self.draft, self.seen = slots, row, draft, seen
        self.acceptance = np.full(STEPS, acceptance)
        if late is not None:
            self.acceptance[STEPS * 4 // 5 :] = late
        self.random, self.begun = np.random.default_rng(0), set()

    def seconds(self, longest: int, rows: int) -> float:
        """An ordinary step takes 1; every further packed row and every draft adds to it; timings scatter.

        The first round of a length takes half as much again.
        """
        noise = (1 + 0.05 * self.random.exponential()) * (1.5 if longest not in self.begun else 1.0)
        self.begun.add(longest)
        if longest == 1:
            return noise * (1 + self.row * (rows - self.slots) / self.slots)
        return noise * (1.05 + self.row * (rows - self.slots) / self.slots + self.draft * (longest - 1))

    def run(self, choose, observe) -> float:
        """Seconds until all images are finished; committed steps follow the acceptance."""
        steps, total = np.zeros(self.slots, np.int64), 0.0
        asked = SeenSteps(self.slots, 0 if self.seen is None else LONGEST[-1] - 1)
        self.rounds = self.rows = 0
        while (steps < STEPS).any():
            live = steps < STEPS
            told = [] if self.seen is None else [asked.counts]
            lengths = np.minimum(choose(live.tolist(), steps.tolist(), *told), np.where(live, STEPS - steps, 0))
            committed = live.astype(np.int64)
            for slot in np.flatnonzero(lengths > 1):
                while committed[slot] < lengths[slot]:
                    is_seen = committed[slot] <= asked.counts[slot]
                    usual = self.acceptance[steps[slot] + committed[slot] - 1]
                    if self.random.random() > (self.seen if is_seen else usual):
                        break
                    committed[slot] += 1
            seconds = self.seconds(int(lengths.max()), int(lengths.sum()))
            observe(live.tolist(), steps.tolist(), lengths.tolist(), committed.tolist(), seconds)
            steps, total = steps + committed, total + seconds
            if lengths.max() > 1:
                asked.played(lengths.tolist(), committed.tolist(), steps.tolist())
                self.rounds, self.rows = self.rounds + 1, self.rows + int(lengths.sum())
            else:
                asked.forget()
        return total

    def fixed(self, length: int) -> float:
        return self.run(
            lambda live, steps, *asked: [
                (1 if step == 0 else length) if holds else 0 for holds, step in zip(live, steps, strict=True)
            ],
            lambda *figures: None,
        )

    def auto(self, calls: int = 1) -> float:
        """Seconds of the last of so many calls that share their knowledge."""
        self.begun.clear()
        runs = Runs(self)
        return [runs.run() for _ in range(calls)][-1]


class Runs:
    """Runs in one world that share their knowledge."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.knowledge = Knowledge(RoundCost(world.slots), AcceptanceModel(np.full((STEPS, LONGEST[-1] - 1), 0.85)))

    def run(self) -> float:
        policy = DraftLengthPolicy(STEPS, LONGEST[-1], self.knowledge, reuses=self.world.seen is not None)
        return self.world.run(policy.choose, policy.observe)
