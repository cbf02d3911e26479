"""A few rounds at places all along the chain, and what they say of drafts anywhere on it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from free_kernels.conditioning import hoisted
from free_kernels.constants import TransitionColumn
from free_kernels.protocols import Drafter
from free_kernels.sampling.job import Job, Network
from free_kernels.sampling.noise import Purpose
from free_kernels.sampling.round import RoundReport, Rounds
from free_kernels.sampling.run_stats import RunStats
from free_kernels.sampling.slots import Slots
from free_kernels.steering.round_chain import classify


class Places(NamedTuple):
    """Where rounds are tried: P positions of each of I images.

    Attributes:
        steps: int64 ``[P]``, ascending, in ``[1, K - 2]``.
        states: ``[I, P, C, H, W]``, before those steps.
        previous: ``[I, P, C, H, W]``, one step earlier.
        parents: ``[B, I, P, T, D]``, the target's features there.
        outputs: ``[B, I, P, C or 2C, H, W]``, its outputs there.
        calls: network calls of each image's coarse chain.
    """

    steps: Tensor
    states: Tensor
    previous: Tensor
    parents: Tensor
    outputs: Tensor
    calls: int

    def until(self, step: int) -> Places:
        """Positions before ``step``; the first one at least."""
        return self._some(slice(0, max(1, int((self.steps < step).sum()))))

    def behind(self, step: int) -> Places:
        """Positions from ``step`` on; the last one at least."""
        return self._some(slice(min(int((self.steps < step).sum()), len(self.steps) - 1), None))

    def _some(self, chosen: slice) -> Places:
        rows = self.states[:, chosen], self.previous[:, chosen], self.parents[:, :, chosen], self.outputs[:, :, chosen]
        return Places(self.steps[chosen], *rows, self.calls)


class Observations(NamedTuple):
    """Drafts of the probing rounds, n of them, whether their test was reached or not.

    Attributes:
        image, position: int64 ``[n]``, where the round began.
        step: int64 ``[n]``.
        kind: int64 ``[n]``, an index of :data:`free_kernels.steering.round_chain.CLASSES`.
        place: int64 ``[n]``, number of the draft among those of its kind in its round.
        gap: ``[n]``, delta; infinite where a draft cannot be tested.
        reached: ``[n]``, probability that all drafts before it in its round are accepted.
    """

    image: np.ndarray
    position: np.ndarray
    step: np.ndarray
    kind: np.ndarray
    place: np.ndarray
    gap: np.ndarray
    reached: np.ndarray

    @property
    def acceptance(self) -> np.ndarray:
        """``2 Phi(-delta / 2)``, ``[n]``."""
        return torch.erfc(torch.from_numpy(self.gap) / math.sqrt(8)).numpy()


def reach_places(
    job: Job, network: Network, images: int, positions: int, calls: int, tick: Callable[[int], None]
) -> Places:
    """States of the first images of a job at evenly spaced steps, by a chain of few calls.

    From one call to the next the clean sample that the target predicts is held, and steps are those of the schedule
    given that sample: a coarser sampler of the same family. With at least K calls it is the ordinary chain.

    Args:
        job: the job, hoisted.
        network: the target's packed call.
        images: I.
        positions: P, at most K - 2.
        calls: network calls of each image at least; one just before each position is made in any case.
        tick: told the rows of each call.
    """
    num_steps, keys = len(job.timesteps), torch.arange(images, device=job.labels.device)
    middle = (np.arange(positions) + 0.5) / positions * (num_steps - 2)
    steps = torch.from_numpy(1 + middle.astype(np.int64))
    last = int(steps[-1]) - 1
    even = np.linspace(0, last, min(calls, last + 1)).round().astype(np.int64)
    nodes = sorted({*even.tolist(), *(steps - 1).tolist()})
    state, labels = job.initial_states(keys), job.branched(job.labels[:images])
    kept: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for node, until in zip(nodes, [*nodes[1:], last + 1], strict=True):
        columns, previous = job.table[node : node + 1], state
        t = job.timesteps[node : node + 1].expand(len(labels))
        output, wait = network(job.doubled(state), t, labels)
        job.check_finite(node, keys, output)
        mean, std = job.transition(state, output, columns)
        given, from_clean = (
            job.table[:, column]
            for column in (TransitionColumn.MEAN_FROM_STATE_GIVEN_X0, TransitionColumn.MEAN_FROM_X0)
        )
        clean = (mean - given[node] * state) / from_clean[node]
        for k in range(node, until):
            if k > node:
                _, std = job.transition(state, output, job.table[k : k + 1])
                mean = given[k] * state + from_clean[k] * clean
            noise = job.draw(Purpose.STEP, keys.unsqueeze(1), torch.full_like(keys, k).unsqueeze(1)).squeeze(1)
            state = torch.addcmul(mean, std, noise)
            if k == node and node + 1 in steps:
                kept.append((state, previous, wait(), output))
        tick(images)
    states, before, *said = (torch.stack(parts, dim=1) for parts in zip(*kept, strict=True))
    parents, outputs = (rows.unflatten(0, (job.branches, images)) for rows in said)
    return Places(steps.to(keys.device), states, before, parents, outputs, len(nodes))


def rounds_at(job: Job, places: Places, count: int, drafter: Drafter, network: Network, length: int) -> Rounds:
    """Rounds of a drafter with a slot for each of the first ``count`` places, image by image."""
    slots = Slots(job, count, None, length, job.options.packing_backend)
    stats = RunStats(len(job.labels), len(job.timesteps), job.labels.device)
    drafter = hoisted(drafter, job.timesteps, job.used_labels)
    rounds = Rounds(job, slots, drafter, network, stats, length=length, relaxation=None, dense=False)
    put(rounds, places)
    return rounds


def put(rounds: Rounds, places: Places) -> None:
    """Set the slots of rounds back to their places."""
    images, slots = len(places.states), rounds.slots
    count = len(slots)
    slots.state.copy_(places.states.flatten(0, 1)[:count])
    slots.previous.copy_(places.previous.flatten(0, 1)[:count])
    slots.steps.copy_(places.steps.repeat(images)[:count])
    slots.images.copy_(torch.arange(count, device=slots.images.device))
    slots.parent = places.parents.flatten(1, 2)[:, :count].clone()
    outputs = places.outputs.flatten(1, 2)[:, :count].flatten(0, 1).contiguous()
    rounds.begin_behind(outputs, slots.parent.flatten(0, 1))


def probe(
    job: Job, places: Places, drafter: Drafter, network: Network, length: int, count: int, tick: Callable[[int], None]
) -> tuple[Observations, bool]:
    """Play rounds from all places, and note the gap of every draft, tested or not.

    Args:
        job: with a label for each place, image by image.
        places: where rounds begin.
        drafter: drafts.
        network: the target's packed call.
        length: rows of a round for one image.
        count: rounds.
        tick: told the rows of each call.

    Returns:
        What was seen, and whether refused rows drafted.
    """
    rounds, num_steps = rounds_at(job, places, len(job.labels), drafter, network, length), len(job.timesteps)
    slots = rounds.slots
    asked = np.zeros((len(slots), num_steps + 1), np.int64)
    now = RoundReport([], slots.images.tolist(), slots.steps.tolist(), [0] * len(slots))
    columns: list[tuple[np.ndarray, ...]] = []
    for _ in range(count):
        lengths = [
            0 if image < 0 else min(length, num_steps - step) for image, step in zip(now.images, now.steps, strict=True)
        ]
        if not any(lengths):
            break
        played = rounds.start(lengths, now.steps)
        after = rounds.read(played, lengths, now)
        gaps = played.coupling.gap_sq.double().sqrt().nan_to_num(torch.inf, torch.inf).cpu().numpy()
        for slot, (step, rows) in enumerate(zip(now.steps, lengths, strict=True)):
            if rows > 1:
                columns.append(_of_round(slot, step, now.ahead[slot], asked[slot], gaps[slot, : rows - 1]))
            asked[slot, step : step + rows] += 1
        tick(sum(lengths))
        now = after
    slot, *rest = (np.concatenate(column) for column in zip(*columns, strict=True))
    seen = Observations(slot // len(places.steps), slot % len(places.steps), *rest)
    return seen, rounds.refused is not None


def _of_round(slot: int, step: int, ahead: int, asked: np.ndarray, gap: np.ndarray) -> tuple[np.ndarray, ...]:
    """The round's drafts as columns: slot, step, kind, place, gap, reached."""
    j = np.arange(len(gap))
    again = int((asked[step : step + min(ahead, len(gap))] > 1).cumprod().sum())
    kind, place = classify(len(gap), min(ahead, len(gap)), again)
    accepted = torch.erfc(torch.from_numpy(gap) / math.sqrt(8)).numpy()
    reached = np.append(1.0, accepted[:-1]).cumprod()
    return np.full_like(j, slot), step + j, kind, place, gap, reached
