"""A planar reaching task with two right answers: a disc goes to a goal past a round obstacle, on either side."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from free_kernels.validation import check_int

# Lengths are in units of half the width of the table, time in control steps.
AGENT_RADIUS = 0.06
MAX_SPEED = 0.05
# Share of the wanted change of velocity that a step makes.
RESPONSE = 0.6
GOAL_TOLERANCE = 0.05
MAX_STEPS = 96
# Smallest and largest radius of the obstacle.
RADII = (0.18, 0.28)
# Smallest distance of start and goal, and of both from the obstacle's edge.
APART, FREE = 1.0, AGENT_RADIUS + 0.08


@dataclass(frozen=True)
class Scenes:
    """E scenes.

    Attributes:
        start: float64 ``[E, 2]``, centre of the agent at rest.
        goal: ``[E, 2]``.
        centre: ``[E, 2]``, of the obstacle, which lies between start and goal.
        radius: ``[E]``, its own.
    """

    start: np.ndarray
    goal: np.ndarray
    centre: np.ndarray
    radius: np.ndarray

    def __len__(self) -> int:
        return len(self.start)

    def take(self, rows: np.ndarray | slice) -> Scenes:
        """Some of the scenes."""
        return Scenes(self.start[rows], self.goal[rows], self.centre[rows], self.radius[rows])


def _candidates(generator: np.random.Generator, count: int) -> Scenes:
    start, goal = generator.uniform(-1, 1, (2, count, 2))
    radius = generator.uniform(*RADII, count)
    along = goal - start
    length = np.linalg.norm(along, axis=1, keepdims=True)
    across = np.stack([-along[:, 1], along[:, 0]], axis=1) / np.maximum(length, 1e-9)
    middle = start + generator.uniform(0.35, 0.65, (count, 1)) * along
    middle = middle + generator.uniform(-0.5, 0.5, (count, 1)) * radius[:, None] * across
    return Scenes(start, goal, middle, radius)


def random_scenes(count: int, seed: int) -> Scenes:
    """``count`` scenes; scene i depends on (seed, i) only.

    Start and goal are at least :data:`APART` apart and clear of the obstacle, or drawn anew.
    """
    check_int("random_scenes", "count", count, 1)
    check_int("random_scenes", "seed", seed, 0)
    # In parts of a fixed size with a seed each, so that more scenes begin with the same ones.
    part, found = 64, []
    for number in range(-(-count // part)):
        generator, kept = np.random.default_rng([seed, number]), []
        while sum(map(len, kept)) < part:
            scenes = _candidates(generator, 4 * part)
            kept.append(scenes.take(_is_open(scenes)))
        found.append(_joined(kept).take(slice(part)))
    return _joined(found).take(slice(count))


def _joined(parts: list[Scenes]) -> Scenes:
    return Scenes(*(np.concatenate([getattr(p, name) for p in parts]) for name in Scenes.__dataclass_fields__))


def _is_open(scenes: Scenes) -> np.ndarray:
    """Whether a scene is one of the task, bool ``[E]``."""
    found = np.linalg.norm(scenes.goal - scenes.start, axis=1) >= APART
    for point in (scenes.start, scenes.goal):
        found &= clearance(scenes, point) >= FREE - AGENT_RADIUS
    return found


def clearance(scenes: Scenes, position: np.ndarray) -> np.ndarray:
    """Gap between the agent's edge at ``[E, ..., 2]`` and the obstacle's, ``[E, ...]``; negative in contact."""
    shape = (len(scenes), *(1,) * (position.ndim - 2))
    offset = position - scenes.centre.reshape(*shape, 2)
    return np.linalg.norm(offset, axis=-1) - scenes.radius.reshape(shape) - AGENT_RADIUS


class World:
    """E agents, each in a scene of its own, moved by the positions that they are told to go to.

    A step changes the velocity by :data:`RESPONSE` of what is missing to the wanted one, which is the way to the target
    position within one step, at most :data:`MAX_SPEED`; then the position by the velocity. An episode ends at the goal
    (centre within :data:`GOAL_TOLERANCE`), at contact with the obstacle, or after :data:`MAX_STEPS`.

    Args:
        scenes: one for each agent.

    Attributes:
        position: ``[E, 2]``.
        velocity: ``[E, 2]``, way of the last step.
        reached: bool ``[E]``.
        hit: bool ``[E]``.
        steps: int64 ``[E]``, steps until the end of the episode.
    """

    def __init__(self, scenes: Scenes) -> None:
        self.scenes = scenes
        self.position, self.velocity = scenes.start.copy(), np.zeros_like(scenes.start)
        self.reached, self.hit = np.zeros((2, len(scenes)), bool)
        self.steps = np.zeros(len(scenes), np.int64)

    @property
    def running(self) -> np.ndarray:
        """Episodes that have not ended, bool ``[E]``."""
        return ~(self.reached | self.hit) & (self.steps < MAX_STEPS)

    def step(self, target: np.ndarray) -> None:
        """One step towards positions ``[E, 2]`` in all running episodes."""
        live = self.running[:, None]
        wanted = target - self.position
        wanted *= np.minimum(1.0, MAX_SPEED / np.maximum(np.linalg.norm(wanted, axis=1, keepdims=True), 1e-12))
        self.velocity = np.where(live, self.velocity + RESPONSE * (wanted - self.velocity), self.velocity)
        self.position = np.where(live, self.position + self.velocity, self.position)
        live = live[:, 0]
        self.steps += live
        self.hit |= live & (clearance(self.scenes, self.position) < 0)
        near = np.linalg.norm(self.position - self.scenes.goal, axis=1) < GOAL_TOLERANCE
        self.reached |= live & ~self.hit & near
