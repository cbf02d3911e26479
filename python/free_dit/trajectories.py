"""On-policy trajectories of a target: what a drafter learns from and is measured on. Needs labels, no images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from free_kernels.hoisting import hoisted
from free_kernels.noise import PhiloxNoise, Purpose
from free_kernels.ops.coupling import gaussian_transition
from free_kernels.types import Schedule, Target, guided_channels, null_label


@dataclass(frozen=True)
class Trajectories:
    """Chains of B images over K steps, both guidance branches.

    Attributes:
        states: ``[K, B, C, H, W]``, the state before each step.
        features: ``[K, 2, B, T, D]``, conditional and unconditional branch.
        mean: ``[K, B, C, H, W]``, the target's mean of each step.
        std: ``[K, B, C, H, W]``, its standard deviation; 0 at the last step.
        labels: int64 ``[B]``.
        guidance: float32 ``[B]``, guidance scale of each image.
    """

    states: Tensor
    features: Tensor
    mean: Tensor
    std: Tensor
    labels: Tensor
    guidance: Tensor


def guided_transition(
    state: Tensor, output: Tensor, columns: Tensor, guidance: Tensor, channels: int
) -> tuple[Tensor, Tensor]:
    """Mean and deviation ``[R, C, H, W]`` where every row has its own guidance scale ``[R]``; ``output [2R, ...]``."""
    conditional, unconditional = output.chunk(2)
    weight = torch.ones(len(guidance), output.shape[1], 1, 1, device=output.device)
    weight[:, :channels] = guidance.view(-1, 1, 1, 1)
    return gaussian_transition(state, torch.lerp(unconditional, conditional, weight), columns)


@torch.no_grad()
def collect(
    target: Target, schedule: Schedule, labels: Tensor, guidance: Tensor, seed: int, progress: bool = False
) -> Trajectories:
    """Run the ordinary sampler for ``labels [B]`` with guidance scales ``[B]`` and keep everything."""
    count, num_steps = len(labels), schedule.num_steps
    table = schedule.table(schedule.resolve_variance(target.learns_variance))
    source, images = PhiloxNoise(seed), torch.arange(count)
    y = torch.cat([labels, torch.full_like(labels, null_label(target))])
    network: Target = hoisted(target, schedule.timesteps, y.unique())  # type: ignore[assignment]
    guided = guided_channels(target)
    shape = tuple(target.latent_shape)
    x = source.normal(images, torch.zeros_like(images), Purpose.INITIAL, shape)
    states, means, stds = (torch.empty(num_steps, count, *shape) for _ in range(3))
    features = torch.empty(num_steps, 2, count, *target.feature_shape)
    for k in tqdm(range(num_steps), desc="trajectories", unit="step", disable=not progress, leave=False):
        t = schedule.timesteps[k].expand(2 * count)
        h = network.features(torch.cat([x, x]), t, y)
        mean, std = guided_transition(x, network.head(h, t, y), table[k : k + 1], guidance, guided)
        states[k], features[k], means[k], stds[k] = x, h.unflatten(0, (2, count)), mean, std
        x = torch.addcmul(mean, std, source.normal(images, torch.full_like(images, k), Purpose.STEP, shape))
    return Trajectories(states, features, means, stds, labels, guidance)
