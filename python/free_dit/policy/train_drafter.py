"""Training of a policy's drafter on the policy's own chains."""

from __future__ import annotations

from pathlib import Path

import torch

from free_dit.configuration import CONFIGS, load_config
from free_dit.policy.planner import demonstrate
from free_dit.policy.target import PolicyTarget
from free_dit.policy.task import Windows
from free_dit.policy.world import random_scenes
from free_dit.training.drafter_config import DrafterTrainConfig
from free_dit.training.train_drafter import train_drafter

# Scenes whose decisions the policy is asked about: others than it was trained on, and than it is evaluated on.
SCENE_SEED, EPISODES = 1 << 19, 500
CONFIG = CONFIGS / "policy_drafter.toml"


def train_policy_drafter(
    target: PolicyTarget, out: Path, target_name: str, config: DrafterTrainConfig | None = None
) -> Path:
    """Train a drafter for a policy into the folder ``out``; exports ``out/drafter.safetensors``. Resumable.

    It sees decisions of the planner in scenes of its own, and no actions but the policy's.

    Raises:
        As :func:`free_dit.training.train_drafter.train_drafter`.
    """
    config = load_config(DrafterTrainConfig, CONFIG) if config is None else config
    windows = Windows(demonstrate(random_scenes(EPISODES, SCENE_SEED), SCENE_SEED))
    # Calibration takes the first ones, which are to be of all parts of an episode.
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        known = target.conditioned(windows.observations[order])
    return train_drafter(known, config, out, target_name)
