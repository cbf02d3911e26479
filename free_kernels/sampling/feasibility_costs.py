"""What rounds cost: given by the caller, or measured here on one image."""

from __future__ import annotations

import numbers
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch

from free_kernels.protocols import Drafter, frozen_steps
from free_kernels.sampling.feasibility_probes import Places, put, rounds_at
from free_kernels.sampling.job import Job, Network
from free_kernels.sampling.noise import Purpose
from free_kernels.sampling.round import RoundReport
from free_kernels.validation import check_float, fail


@dataclass(frozen=True)
class RowCosts:
    """Times of the parts of a round, in any unit: only ratios count.

    Attributes:
        target: of a target call, by its rows; 1 among them. Between two of them it is linear.
        draft: of one draft (drafter call, head, transition), by drafter: ``"frozen"``, ``"learned"``; 0 if left out.
        round: of what a round does besides, by drafter; 0 if left out.
        step: of what an ordinary step does besides its call of one row.
    """

    target: Mapping[int, float]
    draft: Mapping[str, float] = field(default_factory=dict)
    round: Mapping[str, float] = field(default_factory=dict)
    step: float = 0.0

    def check(self, where: str) -> None:
        """Raise ValueError or TypeError, in the name of ``where``, unless all are finite and not negative."""
        if not isinstance(self.target, Mapping) or 1 not in self.target:
            fail(where, "row_costs.target", "times by rows with that of 1 row", self.target)
        for rows, seconds in self.target.items():
            if isinstance(rows, bool) or not isinstance(rows, numbers.Integral) or rows < 1:
                fail(where, "row_costs.target", "times by numbers of rows", rows)
            if not check_float(where, f"row_costs.target[{rows}]", seconds, 0.0) > 0:
                fail(where, f"row_costs.target[{rows}]", "above 0", seconds)
        for name in ("draft", "round"):
            for drafter, seconds in getattr(self, name).items():
                check_float(where, f"row_costs.{name}[{drafter!r}]", seconds, 0.0)
        check_float(where, "row_costs.step", self.step, 0.0)

    def speed_up(self, drafter: str, length: int, steps_per_call: float | np.ndarray) -> float | np.ndarray:
        """Time of the ordinary chain over that of rounds of ``length`` rows."""
        rows = sorted(self.target)
        call = np.interp(length, rows, [self.target[count] for count in rows])
        if length > rows[-1]:
            # As dear as the last ones that are known.
            below = rows[-2] if len(rows) > 1 else 0
            slope = (self.target[rows[-1]] - self.target.get(below, 0.0)) / (rows[-1] - below)
            call = self.target[rows[-1]] + slope * (length - rows[-1])
        spent = call + self.round.get(drafter, 0.0) + (length - 1) * self.draft.get(drafter, 0.0)
        return steps_per_call * (self.target[1] + self.step) / spent

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Timings:
    """Seconds, R repeats of each in turn.

    Attributes:
        lengths: of the target calls, ascending; the first and the last are also those of the timed rounds.
        ordinary: ``[R]``, ordinary steps.
        target: ``[R, 1 + lengths]``, target calls of 1 row and of each length.
        rounds: ``[R, 2]`` by drafter, whole rounds.
    """

    lengths: tuple[int, ...]
    ordinary: np.ndarray
    target: np.ndarray
    rounds: dict[str, np.ndarray]

    def costs(self, repeats: np.ndarray) -> RowCosts:
        """Costs from the lower quartiles of some of the repeats: other work on the machine only adds time."""
        call = np.quantile(self.target[repeats], 0.25, axis=0)
        # Nor do fewer rows take longer than more.
        call = np.minimum.accumulate(call[::-1])[::-1]
        shortest, longest = self.lengths[0], self.lengths[-1]
        draft, besides = {}, {}
        for name, seconds in self.rounds.items():
            short, long = np.quantile(seconds[repeats], 0.25, axis=0) - call[[1, -1]]
            if longest > shortest:
                draft[name] = max(0.0, float(long - short) / (longest - shortest))
                besides[name] = max(0.0, float(short) - (shortest - 1) * draft[name])
            else:
                draft[name], besides[name] = 0.0, max(0.0, float(short))
        step = max(0.0, float(np.quantile(self.ordinary[repeats], 0.25) - call[0]))
        return RowCosts(dict(zip((1, *self.lengths), call.tolist(), strict=True)), draft, besides, step)


def measure(
    job: Job, places: Places, drafters: Mapping[str, Drafter], network: Network, lengths: Sequence[int], repeats: int
) -> Timings:
    """Time an ordinary step, target calls and rounds of one image, interleaved.

    Args:
        job: the job, hoisted.
        places: the first of them is where the timed image is.
        drafters: by name.
        network: the target's packed call.
        lengths: draft lengths, ascending, each at most K - 1.
        repeats: R.
    """
    one = replace(job, labels=job.labels[:1])
    state, step = places.states[:1, 0], int(places.steps[0])
    labels, columns = one.branched(one.labels), one.table[step : step + 1]
    noise = one.draw(Purpose.STEP, places.steps[:1].view(1, 1), places.steps[:1].view(1, 1)).squeeze(1)
    t = one.timesteps[step : step + 1]

    def ordinary() -> None:
        one.ordinary_step(network, state, t.expand(len(labels)), labels, columns, noise)

    def call(rows: int) -> Callable[[], None]:
        x, y = one.doubled(state.expand(rows, -1, -1, -1)), labels.repeat_interleave(rows)

        def run() -> None:
            network(x, t.expand(len(y)), y).wait()

        return run

    work: dict[str, Callable[[], None]] = {"step": ordinary, **{f"{rows}": call(rows) for rows in (1, *lengths)}}
    for name, drafter in drafters.items():
        early = frozen_steps(job.where, drafter, len(job.timesteps), has_memory=False)
        for end in (0, -1):
            if not 0 < early < len(job.timesteps):
                work[f"{name} {end}"] = _rounds_of(one, places, drafter, network, lengths[end])
                continue
            # Rounds at both sides of the step from which on the drafter is called.
            before, behind = places.until(early), places.behind(early)
            work[f"{name} {end}"] = _rounds_of(one, before, drafter, network, lengths[end], early)
            work[f"{name} {end} behind"] = _rounds_of(one, behind, drafter, network, lengths[end])
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for repeat in range(-1, repeats):
        for name, run in work.items():
            _settle(state)
            began = time.perf_counter()
            run()
            _settle(state)
            if repeat >= 0:
                seconds[name].append(time.perf_counter() - began)
    return Timings(
        tuple(lengths),
        np.array(seconds["step"]),
        np.array([seconds[f"{rows}"] for rows in (1, *lengths)]).T,
        {
            name: np.array([_of_chain(job, name, end, drafters[name], seconds) for end in (0, -1)]).T
            for name in drafters
        },
    )


def _of_chain(job: Job, name: str, end: int, drafter: Drafter, seconds: Mapping[str, list[float]]) -> np.ndarray:
    """Seconds of a drafter's rounds ``[R]``, those at both sides of its share weighted by their parts of the chain."""
    here, behind = np.array(seconds[f"{name} {end}"]), seconds.get(f"{name} {end} behind")
    if behind is None:
        return here
    share = frozen_steps(job.where, drafter, len(job.timesteps), has_memory=False) / len(job.timesteps)
    return share * here + (1 - share) * np.array(behind)


def _rounds_of(
    job: Job, places: Places, drafter: Drafter, network: Network, length: int, until: int | None = None
) -> Callable[[], None]:
    """A function that plays the image's next round, from its first place again where too few steps are left.

    Or from step ``until`` on, if given.
    """
    rounds = rounds_at(job, places, 1, drafter, network, length)
    slots = rounds.slots
    now = [RoundReport([1], [0], slots.steps.tolist(), [0])]

    def run() -> None:
        step = now[0].steps[0]
        if now[0].images[0] < 0 or step + length > len(job.timesteps) or (until is not None and step >= until):
            put(rounds, places)
            now[0] = now[0]._replace(images=[0], steps=slots.steps.tolist())
        left = len(job.timesteps) - now[0].steps[0]
        now[0] = rounds.play([min(length, left)], now[0])

    return run


def _settle(tensor: torch.Tensor) -> None:
    """Wait for the device."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
