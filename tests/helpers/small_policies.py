"""A small random policy, for tests that need no training."""

from __future__ import annotations

import torch

from free_dit.networks.policy import PolicyConfig, PolicyDiT
from free_dit.policy.target import PolicyTarget

SMALL = PolicyConfig(hidden_size=16, condition_size=24, depth=2, num_heads=2, token_actions=2)


def small_policy(config: PolicyConfig = SMALL, seed: int = 0) -> PolicyDiT:
    """All weights random, because zero modulations hide errors; its output is near the noise, as a trained one's."""
    torch.manual_seed(seed)
    policy = PolicyDiT(config)
    for parameter in policy.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return policy.eval().requires_grad_(False)


def small_target(seed: int = 0) -> PolicyTarget:
    return PolicyTarget(small_policy(seed=seed))


def some_observations(count: int, seed: int = 0) -> torch.Tensor:
    shape = count, SMALL.history, SMALL.observation_size
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
