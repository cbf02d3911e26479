"""What a policy sees and says: observations and chunks of target positions in [-1, 1], both in the agent's own frame.

The frame's origin is the agent, and its first axis points to the goal: what is the same but for where it lies is the
same for the policy.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from free_dit.policy.planner import Demonstrations
from free_dit.policy.world import MAX_SPEED, RADII, Scenes

HORIZON, HISTORY = 16, 2
# Velocity, distance of the goal, centre and radius of the obstacle.
OBSERVATION_SIZE = 6
# Farthest target position of a chunk, as seen from where the agent is when it decides.
REACH = 0.9


def axes_of(scenes: Scenes, position: np.ndarray) -> np.ndarray:
    """The frame's axes as rows, ``[E, 2, 2]``, of agents at ``position [E, 2]``."""
    forward = scenes.goal - position
    forward = forward / np.maximum(np.linalg.norm(forward, axis=1, keepdims=True), 1e-9)
    return np.stack([forward, np.stack([-forward[:, 1], forward[:, 0]], axis=1)], axis=1)


def observe(scenes: Scenes, position: np.ndarray, velocity: np.ndarray) -> np.ndarray:
    """One observation of each agent, float32 ``[E, O]``: velocity over the largest, and where things are."""
    axes = axes_of(scenes, position)
    parts = (
        np.einsum("eij,ej->ei", axes, velocity / MAX_SPEED),
        np.linalg.norm(scenes.goal - position, axis=1, keepdims=True),
        np.einsum("eij,ej->ei", axes, scenes.centre - position),
        scenes.radius[:, None] / RADII[1],
    )
    return np.concatenate(parts, axis=1).astype(np.float32)


def first_observations(scenes: Scenes) -> Tensor:
    """What the agents are shown before their first step, ``[E, history, O]``."""
    seen = observe(scenes, scenes.start, np.zeros_like(scenes.start))
    return torch.from_numpy(np.stack([seen] * HISTORY, axis=1))


def chunk_of(scenes: Scenes, targets: np.ndarray, position: np.ndarray) -> np.ndarray:
    """Target positions ``[E, horizon, 2]`` as actions in [-1, 1], as seen from ``position [E, 2]``."""
    seen = np.einsum("eij,ehj->ehi", axes_of(scenes, position), targets - position[:, None])
    return np.clip(seen / REACH, -1, 1).astype(np.float32)


def targets_of(scenes: Scenes, chunk: np.ndarray, position: np.ndarray) -> np.ndarray:
    """Inverse of :func:`chunk_of`."""
    return np.einsum("eij,ehi->ehj", axes_of(scenes, position), chunk.astype(np.float64) * REACH) + position[:, None]


class Windows:
    """All decisions of demonstrations: what was seen before each step, and the chunk of targets from there on.

    Args:
        demonstrations: those that did not reach the goal are left out.

    Attributes:
        observations: float32 ``[W, history, O]``.
        actions: float32 ``[W, horizon, 2]``.
    """

    def __init__(self, demonstrations: Demonstrations) -> None:
        scenes, position, target = demonstrations.scenes, demonstrations.position, demonstrations.target
        velocity = np.diff(position, axis=1, prepend=position[:, :1])
        seen = [observe(scenes, position[:, step], velocity[:, step]) for step in range(target.shape[1])]
        # After the end of an episode the agent is told to stay at the goal.
        end = np.repeat(scenes.goal[:, None], HORIZON, axis=1)
        padded = np.concatenate([target, end], axis=1)
        observations, actions = [], []
        for step in range(int(demonstrations.steps.max())):
            rows = np.nonzero(demonstrations.reached & (step < demonstrations.steps))[0]
            past = [seen[max(0, step - back)][rows] for back in reversed(range(HISTORY))]
            observations.append(np.stack(past, axis=1))
            actions.append(chunk_of(scenes.take(rows), padded[rows, step : step + HORIZON], position[rows, step]))
        self.observations: Tensor = torch.from_numpy(np.concatenate(observations))
        self.actions: Tensor = torch.from_numpy(np.concatenate(actions))

    def __len__(self) -> int:
        return len(self.actions)
