"""A policy in closed loop: it decides on a chunk of actions, the agent follows half of it, and it decides again."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from free_dit.policy.methods import Decide, chunks
from free_dit.policy.planner import side_of
from free_dit.policy.task import HISTORY, HORIZON, observe, targets_of
from free_dit.policy.world import MAX_STEPS, Scenes, World
from free_kernels.validation import check_int

# Actions of a chunk that are carried out before the next decision.
EXECUTED = HORIZON // 2


@dataclass(frozen=True)
class Episodes:
    """E episodes of a policy.

    Attributes:
        reached: bool ``[E]``.
        hit: bool ``[E]``.
        steps: int64 ``[E]``.
        decisions: int64 ``[E]``.
        rounds: int64 ``[E]``, network calls of all decisions of an episode.
        side: int64 ``[E]``, on which side the obstacle was passed: 1 left, -1 right.
        position: float32 ``[E, MAX_STEPS + 1, 2]``, the last one repeated.
        observations: float32 ``[E, D, history, O]``, what was seen at each decision; zeros after the end.
        plans: float32 ``[E, D, horizon, 2]``, target positions of the chunks that were drawn; zeros after the end.
    """

    reached: np.ndarray
    hit: np.ndarray
    steps: np.ndarray
    decisions: np.ndarray
    rounds: np.ndarray
    side: np.ndarray
    position: np.ndarray
    observations: np.ndarray
    plans: np.ndarray


def roll_out(scenes: Scenes, decide: Decide, seed: int, numbers: np.ndarray | None = None) -> Episodes:
    """Run one episode in every scene, all at once.

    The noise of a decision depends on ``seed``, the episode's number and the number of the decision, so that methods
    with the same seed share it and an episode is the same in every batch, up to rounding.

    Args:
        scenes: E scenes.
        decide: draws the chunks.
        seed: of the noise.
        numbers: int64 ``[E]``, of the episodes; 0, 1 ... if None.
    """
    check_int("roll_out", "seed", seed, 0)
    count = len(scenes)
    numbers = np.arange(count) if numbers is None else numbers
    world = World(scenes)
    seen = [observe(scenes, world.position, world.velocity)] * HISTORY
    position, observations, plans = [world.position], [], []
    decisions, rounds = np.zeros((2, count), np.int64)
    for decision in range(-(-MAX_STEPS // EXECUTED)):
        rows = np.nonzero(world.running)[0]
        if not len(rows):
            break
        given, drawn = np.stack(seen[-HISTORY:], axis=1), np.zeros((count, HORIZON, 2))
        keys = torch.from_numpy(numbers[rows])
        chunk, result = chunks(decide, torch.from_numpy(given[rows]), decision_seed(seed, decision), keys)
        drawn[rows] = targets_of(scenes.take(rows), chunk.numpy(), world.position[rows])
        decisions[rows] += 1
        rounds[rows] += result.stats.rounds_per_image
        observations.append(np.where(world.running[:, None, None], given, 0).astype(np.float32))
        plans.append(drawn.astype(np.float32))
        for step in range(EXECUTED):
            world.step(drawn[:, step])
            seen.append(observe(scenes, world.position, world.velocity))
            position.append(world.position)
    position += [world.position] * (MAX_STEPS + 1 - len(position))
    # As many decisions as an episode can have, so that parts of an evaluation have one shape.
    missing = -(-MAX_STEPS // EXECUTED) - len(plans)
    observations += [np.zeros_like(observations[0])] * missing
    plans += [np.zeros_like(plans[0])] * missing
    path = np.stack(position, axis=1)
    return Episodes(
        world.reached,
        world.hit,
        world.steps,
        decisions,
        rounds,
        side_of(scenes, path),
        path.astype(np.float32),
        np.stack(observations, axis=1),
        np.stack(plans, axis=1),
    )


def decision_seed(seed: int, decision: int) -> int:
    """Seed of the noise of an episode's ``decision``-th decision."""
    return (seed << 16) + decision
