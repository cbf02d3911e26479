"""A diffusion policy: a DiT over the actions of a chunk, conditioned on a history of observations."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from free_dit.configuration import build
from free_dit.networks.dit import DiTBlock, FinalLayer, TimestepEmbedder
from free_kernels.checkpoint import check_depth, load_checkpoint, load_module, save_checkpoint
from free_kernels.schedules import DDPMSchedule
from free_kernels.validation import fail

# Steps of the diffusion that policies are trained and sampled with.
NUM_STEPS = 100


def policy_schedule(num_steps: int = NUM_STEPS) -> DDPMSchedule:
    """DDPM as diffusion policies use it: 100 squared-cosine betas, clean actions clipped to [-1, 1].

    Source: Chi et al., "Diffusion Policy" (2023).
    """
    return DDPMSchedule(num_steps, NUM_STEPS, beta_schedule="squaredcos_cap_v2", clip_denoised=True)


@dataclass(frozen=True)
class PolicyConfig:
    """Shape of a policy.

    Attributes:
        horizon: actions of a chunk.
        token_actions: actions of a token; divides ``horizon``.
        action_size: numbers of an action, A.
        history: observations that a decision sees.
        observation_size: numbers of an observation.
        hidden_size: token width D.
        condition_size: width of the conditioning vector, from which every modulation is made.
        depth: number of blocks.
        num_heads: attention heads; divides ``hidden_size``.
        mlp_ratio: width of the MLP over ``hidden_size``.
    """

    horizon: int = 16
    token_actions: int = 4
    action_size: int = 2
    history: int = 2
    observation_size: int = 6
    hidden_size: int = 96
    condition_size: int = 96
    depth: int = 12
    num_heads: int = 3
    mlp_ratio: float = 2.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not value > 0:
                fail("PolicyConfig", field.name, "above 0", value)
        if self.horizon % self.token_actions:
            fail("PolicyConfig", "token_actions", f"a divisor of horizon {self.horizon}", self.token_actions)
        if self.hidden_size % self.num_heads:
            fail("PolicyConfig", "hidden_size", f"a multiple of num_heads {self.num_heads}", self.hidden_size)

    @property
    def tokens(self) -> int:
        """T, tokens of a chunk."""
        return self.horizon // self.token_actions

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a JSON config."""
        return asdict(self)


class ChunkEmbedder(nn.Linear):
    """Chunks ``[R, horizon, A]`` to tokens ``[R, T, D]``, each of several actions in a row."""

    def __init__(self, tokens: int, inputs: int, width: int) -> None:
        super().__init__(inputs, width)
        self.tokens = tokens

    def forward(self, x: Tensor) -> Tensor:
        """Tokens."""
        return super().forward(x.reshape(len(x), self.tokens, -1))


class PolicyDiT(nn.Module):
    """Predicts the noise in a chunk: ``(x [R, horizon, A], t [R], observations [R, history, O]) -> [R, horizon, A]``.

    The conditioning vector is the embedded timestep plus the embedded observations; blocks and head are a DiT's.

    Args:
        config: the shape.
    """

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        self.config = config
        width, condition = config.hidden_size, config.condition_size
        self.x_embedder = ChunkEmbedder(config.tokens, config.token_actions * config.action_size, width)
        self.t_embedder = TimestepEmbedder(condition)
        self.o_embedder = nn.Sequential(
            nn.Flatten(),
            nn.Linear(config.history * config.observation_size, 2 * condition),
            nn.SiLU(),
            nn.Linear(2 * condition, 2 * condition),
            nn.SiLU(),
            nn.Linear(2 * condition, condition),
        )
        self.pos_embed = nn.Parameter(nn.init.normal_(torch.empty(1, config.tokens, width), std=0.02))
        self.blocks = nn.ModuleList(
            [DiTBlock(width, config.num_heads, config.mlp_ratio, condition) for _ in range(config.depth)]
        )
        self.final_layer = FinalLayer(width, config.token_actions * config.action_size, condition)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for part in (*self.blocks, self.final_layer):
            nn.init.zeros_(part.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def hidden_layers(self) -> tuple[nn.Module, ...]:
        """The layers between those that meet actions, observations and frequencies, and the head."""
        return *self.blocks, self.t_embedder.mlp[2], self.o_embedder[3], self.o_embedder[5]

    def forward(self, x: Tensor, t: Tensor, observations: Tensor) -> Tensor:
        """The predicted noise."""
        c = self.t_embedder(t) + self.o_embedder(observations)
        h = self.x_embedder(x) + self.pos_embed
        for block in self.blocks:
            h = block(h, c)
        return self.final_layer(h, c).reshape(x.shape)


def save_policy(
    path: Path, policy: PolicyDiT, weights: dict[str, Tensor] | None = None, dtype: torch.dtype | None = None
) -> None:
    """Write a policy with its config; ``weights`` replace its own, such as averaged ones; ``dtype`` narrows them."""
    kept = policy.state_dict() if weights is None else weights
    kept = {name: value.to(dtype or value.dtype) for name, value in kept.items()}
    save_checkpoint(path, kept, {"kind": "policy", "config": policy.config.to_dict()})


def load_policy(path: str | Path) -> PolicyDiT:
    """Read a policy written by :func:`save_policy`, in evaluation mode and float32.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: broken, truncated, or not a policy.
    """
    tensors, metadata = load_checkpoint(path, "policy")

    def build_policy() -> PolicyDiT:
        config = build(PolicyConfig, metadata["config"], str(path))
        check_depth(config.depth, tensors)
        return PolicyDiT(config)

    return load_module(build_policy, tensors, path).eval().requires_grad_(False)
