"""A small latent DiT and a VAE for its latents, of random weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from free_dit.networks.dit import DiT, DiTConfig
from free_dit.networks.families import save_model

CHANNELS = 4


def random_dit(channels: int = CHANNELS, classes: int = 3) -> DiT:
    """A DiT whose modulations are random too, so that its output depends on everything."""
    generator = torch.Generator().manual_seed(0)
    module = DiT(DiTConfig(8, 4, channels, 32, 2, 2, classes)).eval().requires_grad_(False)
    for name, parameter in module.named_parameters():
        if name != "pos_embed":
            parameter.normal_(std=0.1, generator=generator)
    return module


def save_dit(folder: Path, channels: int = CHANNELS, draws: str | None = None) -> Path:
    """``folder/model.safetensors`` of :func:`random_dit`."""
    module = random_dit(channels)
    module.draws = draws
    save_model(folder / "model.safetensors", module)
    return folder / "model.safetensors"


def make_vae(channels: int = CHANNELS, **config: object):
    """An AutoencoderKL of random weights that doubles the side; skips the test where diffusers is not installed."""
    diffusers = pytest.importorskip("diffusers")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        vae = diffusers.AutoencoderKL(
            block_out_channels=(8, 8),
            latent_channels=channels,
            norm_num_groups=4,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            **config,
        )
    return vae.eval().requires_grad_(False)


def save_vae(folder: Path, channels: int = CHANNELS, **config: object) -> Path:
    """A folder of :func:`make_vae`."""
    make_vae(channels, **config).save_pretrained(folder / "vae")
    return folder / "vae"
