"""Small networks with random weights."""

from __future__ import annotations

import torch

from free_dit import DiT, DiTConfig
from free_kernels import DiTTarget, DrafterConfig, FeatureDrafter

CONFIG = DiTConfig(input_size=8, patch_size=2, in_channels=4, hidden_size=48, depth=3, num_heads=4, num_classes=5)


def randomised(module: DiT, seed: int = 0) -> DiT:
    """A module in evaluation mode with random weights, but for its table of positions."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.eval().requires_grad_(False).named_parameters():
        if name != "pos_embed":
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return module


def random_dit(config: DiTConfig = CONFIG, seed: int = 0) -> DiT:
    """A DiT whose every weight is random: adaLN-Zero's zeros would hide mistakes."""
    torch.manual_seed(seed)
    module = DiT(config).eval().requires_grad_(False)
    for parameter in module.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.2)
    return module


def small_target() -> DiTTarget:
    """A DiT of two blocks of width 32 on 8 x 8 images in ten classes."""
    torch.manual_seed(3)
    model = DiT(DiTConfig(8, 4, 1, 32, 2, 2, 10)).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)
    return DiTTarget(model)


def learner(target: DiTTarget, config: DrafterConfig) -> FeatureDrafter:
    """A drafter for ``target`` with random weights, none of them zero."""
    torch.manual_seed(1)
    drafter = FeatureDrafter(target.latent_shape, target.feature_shape, target.num_classes, config)
    for parameter in drafter.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return drafter
