"""Training of a policy on the planner's demonstrations."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from free_dit.networks.policy import NUM_STEPS, PolicyConfig, PolicyDiT, policy_schedule, save_policy
from free_dit.policy.planner import demonstrate
from free_dit.policy.task import HISTORY, HORIZON, OBSERVATION_SIZE, Windows
from free_dit.policy.world import random_scenes
from free_dit.training.loop import LoopConfig, TrainingLoop, iteration_seed
from free_kernels.validation import check_int, check_writable, fail


@dataclass(frozen=True)
class PolicyTrainConfig:
    """Everything that defines a trained policy.

    Attributes:
        model: shape of the policy.
        loop: length and speed of training.
        episodes: demonstrations to learn from.
        demonstration_seed: of their scenes and of the planner.
        batch_size: decisions per iteration.
        compile: train through torch.compile (faster, needs a C++ compiler on a CPU).
    """

    model: PolicyConfig = field(default_factory=PolicyConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    episodes: int = 6000
    demonstration_seed: int = 0
    batch_size: int = 256
    compile: bool = False


def train_policy(config: PolicyTrainConfig, out: Path) -> Path:
    """Train a policy into the folder ``out`` and export its averaged weights to ``out/model.safetensors``.

    Running it again in the same folder continues from the last checkpoint.

    Raises:
        ValueError, TypeError: the configuration is wrong, or the folder belongs to another one.
        OSError: the folder cannot be written.
        FloatingPointError: the loss or a gradient is not finite; the last good checkpoint stays.
    """
    where = "policy train"
    check_int(where, "batch_size", config.batch_size, 1)
    check_int(where, "episodes", config.episodes, 1)
    config.loop.check(where)
    shape = {"horizon": HORIZON, "action_size": 2, "history": HISTORY, "observation_size": OBSERVATION_SIZE}
    for name, wanted in shape.items():
        if getattr(config.model, name) != wanted:
            fail(where, name, f"{wanted}, the task's", getattr(config.model, name))
    path = check_writable(where, "out", Path(out) / "model.safetensors")
    scenes = random_scenes(config.episodes, config.demonstration_seed)
    windows = Windows(demonstrate(scenes, config.demonstration_seed))
    with iteration_seed(config.loop.seed, -1):
        policy = PolicyDiT(config.model).train()
    network = torch.compile(policy) if config.compile else policy
    alphas = torch.from_numpy(policy_schedule().train_alphas_cumprod).float()

    def step(_: int) -> tuple[Tensor, dict[str, float]]:
        index = torch.randint(len(windows), (config.batch_size,))
        clean, t = windows.actions[index], torch.randint(NUM_STEPS, (config.batch_size,))
        noise, alpha = torch.randn_like(clean), alphas[t].view(-1, 1, 1)
        state = torch.addcmul(alpha.sqrt() * clean, (1 - alpha).sqrt(), noise)
        return F.mse_loss(network(state, t, windows.observations[index]), noise), {}

    identity = {k: v for k, v in asdict(config).items() if k != "compile"}
    loop = TrainingLoop(policy, step, config.loop, Path(out), identity, defaults=asdict(PolicyTrainConfig()))
    loop.run()
    save_policy(path, policy, loop.averaged_weights(), torch.float16)
    return path
