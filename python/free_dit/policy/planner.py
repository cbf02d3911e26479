"""Demonstrations of the reaching task: a planner takes either side of the obstacle, at random where both are good."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from free_dit.policy.world import AGENT_RADIUS, MAX_STEPS, Scenes, World, clearance
from free_kernels.validation import check_int

# Points of a path, and rounds of pulling it tight.
POINTS, ROUNDS = 40, 160
# A path is as good as the shortest one up to this factor.
GOOD = 1.25
# Distance from the obstacle that demonstrations keep, and how far ahead on the path they aim, both drawn for each.
MARGIN, LOOKAHEAD = (0.07, 0.13), (0.09, 0.13)
# The side on which the obstacle is passed: 1 to the left of it as seen from the start, -1 to the right.
SIDES = (1, -1)


@dataclass(frozen=True)
class Demonstrations:
    """E episodes of the planner, padded after their end with the last position and the goal.

    Attributes:
        scenes: of the episodes.
        position: float64 ``[E, S + 1, 2]``, before each step and after the last.
        target: ``[E, S, 2]``, where the agent was told to go.
        side: int64 ``[E]``, 1 or -1: on which side the obstacle was passed.
        choices: int64 ``[E]``, how many ways were good.
        steps: int64 ``[E]``, length of the episode.
        reached: bool ``[E]``.
    """

    scenes: Scenes
    position: np.ndarray
    target: np.ndarray
    side: np.ndarray
    choices: np.ndarray
    steps: np.ndarray
    reached: np.ndarray


def side_of(scenes: Scenes, path: np.ndarray) -> np.ndarray:
    """On which side of the obstacle a path ``[E, P, 2]`` passes, int64 ``[E]``: 1 left, -1 right of it.

    The angle by which the path turns around the obstacle's centre is negative (clockwise) where it passes on the left.
    """
    offset = path - scenes.centre[:, None]
    before, after = offset[:, :-1], offset[:, 1:]
    cross = before[..., 0] * after[..., 1] - before[..., 1] * after[..., 0]
    turned = np.arctan2(cross, (before * after).sum(-1)).sum(axis=1)
    return np.where(turned < 0, 1, -1)


def tight_paths(scenes: Scenes, side: int, margin: np.ndarray) -> np.ndarray:
    """Short paths ``[E, P, 2]`` from start to goal that pass the obstacle on one side, ``margin [E]`` away from it.

    A polyline is pulled tight: every round moves each point to the middle of its neighbours and then out of the
    obstacle, at first to the wanted side.
    """
    along = scenes.goal - scenes.start
    length = np.linalg.norm(along, axis=1, keepdims=True)
    along = along / length
    left = np.stack([-along[:, 1], along[:, 0]], axis=1)
    keep = (scenes.radius + AGENT_RADIUS + margin)[:, None, None]
    share = np.linspace(0, 1, POINTS)
    path = scenes.start[:, None] + share[:, None] * (scenes.goal - scenes.start)[:, None]
    for round_ in range(ROUNDS):
        path[:, 1:-1] = (path[:, :-2] + path[:, 2:]) / 2
        offset = path[:, 1:-1] - scenes.centre[:, None]
        # In the first rounds points leave across the way, which decides the side; then by the shortest way.
        if round_ < ROUNDS // 4:
            level, across = ((offset * axis[:, None]).sum(-1, keepdims=True) for axis in (along, left))
            half = np.sqrt(np.maximum(keep**2 - level**2, 0))
            missing = np.maximum(half - side * across, 0) * (np.abs(level) < keep)
            path[:, 1:-1] += side * missing * left[:, None]
        else:
            distance = np.linalg.norm(offset, axis=-1, keepdims=True)
            path[:, 1:-1] += np.maximum(keep - distance, 0) * offset / np.maximum(distance, 1e-9)
    return path


def _lengths(path: np.ndarray) -> np.ndarray:
    return np.linalg.norm(np.diff(path, axis=1), axis=-1).sum(axis=1)


def plan(scenes: Scenes, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A path ``[E, P, 2]`` for every scene, drawn evenly from its good ones, and how many those were, ``[E]``.

    Good is a path that stays clear of the obstacle and is at most :data:`GOOD` times as long as the shortest such one.
    """
    margin = generator.uniform(*MARGIN, len(scenes))
    paths = np.stack([tight_paths(scenes, side, margin) for side in SIDES])
    length = np.stack([_lengths(path) for path in paths])
    for number, (side, path) in enumerate(zip(SIDES, paths, strict=True)):
        dense = np.concatenate([path, (path[:, :-1] + path[:, 1:]) / 2], axis=1)
        clear = (clearance(scenes, dense) > margin[:, None] / 2).all(axis=1)
        length[number] = np.where(clear & (side_of(scenes, path) == side), length[number], np.inf)
    good = length <= GOOD * length.min(axis=0)
    good &= np.isfinite(length)
    weight = generator.uniform(size=good.shape)
    chosen = np.where(good, weight, -1.0).argmax(axis=0)
    return paths[chosen, np.arange(len(scenes))], good.sum(axis=0)


def demonstrate(scenes: Scenes, seed: int) -> Demonstrations:
    """The planner's episodes: it follows its path by aiming at the point a little ahead of where it is on it."""
    check_int("demonstrate", "seed", seed, 0)
    generator = np.random.default_rng([seed, 1])
    path, choices = plan(scenes, generator)
    ahead = generator.uniform(*LOOKAHEAD, len(scenes))
    fine = _resampled(path, 400)
    spacing = _lengths(path) / (fine.shape[1] - 1)
    world, episodes = World(scenes), np.arange(len(scenes))
    place = np.zeros(len(scenes), np.int64)
    position, target = [world.position], []
    for _ in range(MAX_STEPS):
        # The nearest point of the path that is not behind.
        window = np.minimum(place[:, None] + np.arange(60), fine.shape[1] - 1)
        near = np.linalg.norm(fine[episodes[:, None], window] - world.position[:, None], axis=-1).argmin(axis=1)
        place = window[episodes, near]
        aim = np.minimum(place + np.round(ahead / spacing).astype(np.int64), fine.shape[1] - 1)
        target.append(np.where(world.running[:, None], fine[episodes, aim], scenes.goal))
        world.step(target[-1])
        position.append(world.position)
    positions = np.stack(position, axis=1)
    return Demonstrations(
        scenes, positions, np.stack(target, axis=1), side_of(scenes, path), choices, world.steps, world.reached
    )


def _resampled(path: np.ndarray, count: int) -> np.ndarray:
    """Points ``[E, count, 2]`` evenly spaced along paths ``[E, P, 2]``."""
    pieces = np.linalg.norm(np.diff(path, axis=1), axis=-1)
    along = np.concatenate([np.zeros((len(path), 1)), pieces.cumsum(axis=1)], axis=1)
    wanted = along[:, -1:] * np.linspace(0, 1, count)
    result = np.empty((len(path), count, 2))
    for row in range(len(path)):
        for axis in range(2):
            result[row, :, axis] = np.interp(wanted[row], along[row], path[row, :, axis])
    return result
