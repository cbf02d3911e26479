"""What a policy sees and says: observations relative to the agent, and chunks of target positions in [-1, 1]."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from free_dit.policy.planner import Demonstrations
from free_dit.policy.world import MAX_SPEED, OBSTACLES, RADII, Scenes

HORIZON, HISTORY = 16, 2
# Velocity and goal; centre and radius of each obstacle.
OBSERVATION_SIZE = 4 + 3 * OBSTACLES
# Farthest target position of a chunk, as seen from where the agent is when it decides.
REACH = 0.9


def observe(scenes: Scenes, position: np.ndarray, velocity: np.ndarray) -> np.ndarray:
    """One observation of each agent, float32 ``[E, O]``: positions as seen from it, velocity over the largest."""
    around = scenes.centre - position[:, None]
    parts = (
        velocity / MAX_SPEED,
        scenes.goal - position,
        around.reshape(len(scenes), -1),
        scenes.radius / RADII[0][1],
    )
    return np.concatenate(parts, axis=1).astype(np.float32)


def chunk_of(targets: np.ndarray, position: np.ndarray) -> np.ndarray:
    """Target positions ``[E, horizon, 2]`` as actions in [-1, 1], as seen from ``position [E, 2]``."""
    return np.clip((targets - position[:, None]) / REACH, -1, 1).astype(np.float32)


def targets_of(chunk: np.ndarray, position: np.ndarray) -> np.ndarray:
    """Inverse of :func:`chunk_of`."""
    return chunk.astype(np.float64) * REACH + position[:, None]


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
            actions.append(chunk_of(padded[rows, step : step + HORIZON], position[rows, step]))
        self.observations: Tensor = torch.from_numpy(np.concatenate(observations))
        self.actions: Tensor = torch.from_numpy(np.concatenate(actions))

    def __len__(self) -> int:
        return len(self.actions)
