"""Latents and their decoder: which targets draw latents, and diffusers' AutoencoderKL as a map to images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from free_dit.files import sha256_of_state
from free_kernels.checkpoint import CheckpointError
from free_kernels.protocols import Target
from free_kernels.validation import check_int, fail

_CLASS = "AutoencoderKL"


def draws_latents(target: Target) -> bool:
    """Whether samples of a target are latents, not images: ``target.draws`` says it, "pixels" or "latents".

    Where that is None or missing, samples of 1 or 3 channels are taken for images and all others for latents. A model
    of three latent channels has to be told apart by the fact, or by the VAE that it is given.
    """
    draws = getattr(target, "draws", None)
    return target.latent_shape[0] not in (1, 3) if draws is None else draws == "latents"


class LatentDecoder:
    """Latents ``[N, C, H, W]`` to images float32 ``[N, 1 or 3, H', W']`` through a VAE; about in ``[-1, 1]``.

    What the decoder reads is ``latents / scaling_factor + shift_factor`` or, where the configuration names the moments
    of each channel, ``latents * latents_std / scaling_factor + latents_mean``.

    Args:
        vae: an AutoencoderKL of diffusers, in evaluation mode, on the device and in the dtype that it runs in.
        batch: latents decoded at a time.

    Raises:
        ValueError: ``batch`` is below 1.
    """

    def __init__(self, vae: Any, batch: int = 8) -> None:
        self.vae, self.batch = vae, check_int("LatentDecoder", "batch", batch, 1)
        config = vae.config
        weight = next(vae.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        self.latent_channels = int(config.latent_channels)
        mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        self._scale: Tensor | float = 1.0 / float(getattr(config, "scaling_factor", None) or 1.0)
        self._shift: Tensor | float = float(getattr(config, "shift_factor", None) or 0.0)
        if mean is not None and std is not None:
            self._scale = self._scale * self._by_channel(std)
            self._shift = self._by_channel(mean)

    def _by_channel(self, values: Any) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self.device).view(1, -1, 1, 1)

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Tensor:
        """Images of latents; on the latents' device."""
        images = []
        for part in latents.split(self.batch):
            scaled = part.to(self.device, torch.float32) * self._scale + self._shift
            images.append(self.vae.decode(scaled.to(self.dtype)).sample.to(latents.device, torch.float32))
        return torch.cat(images)

    def facts(self) -> dict[str, Any]:
        """What decides the images: hash of weights and configuration, dtype, and how many are decoded at a time."""
        config = {name: value for name, value in sorted(self.vae.config.items()) if not name.startswith("_")}
        digest = sha256_of_state(self.vae.state_dict(), json.dumps(config, sort_keys=True, default=str).encode())
        return {"vae_sha256": digest, "vae_dtype": str(self.dtype), "vae_batch": self.batch}


def pipeline_vae(model: str | Path) -> Path | None:
    """The folder of the VAE of a pipeline that diffusers saved; None where the model is something else."""
    folder = Path(model)
    held = (folder / "model_index.json").is_file() and (folder / "vae" / "config.json").is_file()
    return folder / "vae" if held else None


def load_vae(
    where: str,
    folder: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    batch: int = 8,
) -> LatentDecoder:
    """The decoder in a folder that diffusers saved, of an AutoencoderKL or of a pipeline with one under ``vae/``.

    Args:
        where: the caller, for errors.
        folder: of the VAE or the pipeline.
        device: where it runs.
        dtype: of its weights and arithmetic.
        batch: latents decoded at a time.

    Raises:
        FileNotFoundError: no such folder.
        CheckpointError: the folder holds another class, or is not complete.
        ImportError: diffusers is not installed.
    """
    folder = pipeline_vae(folder) or Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{where}: vae must be an existing folder, got {folder}")
    try:
        found = json.loads((folder / "config.json").read_text()).get("_class_name")
    except (OSError, ValueError, AttributeError):
        found = None
    if found != _CLASS:
        raise CheckpointError(f"{where}: vae must be a folder of diffusers' {_CLASS}, got {folder} of {found!r}")
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise ImportError(f"{where}: diffusers must be installed to read {folder}, got {error}") from error
    try:
        vae, info = AutoencoderKL.from_pretrained(
            folder, torch_dtype=dtype, local_files_only=True, low_cpu_mem_usage=False, output_loading_info=True
        )
    except Exception as error:  # diffusers raises errors of many kinds for what it cannot read
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{where}: vae must be a complete {_CLASS}, got {folder}: {reason}") from error
    # diffusers only warns of these and leaves them random.
    missing = sorted(info["missing_keys"])
    if missing:
        fail(where, "vae", f"a complete {_CLASS}", f"{folder} without {missing[0]}", CheckpointError)
    return LatentDecoder(vae.to(device).eval().requires_grad_(False), batch)


def check_decoder(where: str, target: Target, decoder: LatentDecoder | None, advice: str = "") -> None:
    """Raise ValueError where a target draws latents that nothing decodes, or the decoder is not one of its latents.

    ``advice`` says what else may be done without a decoder.
    """
    channels = target.latent_shape[0]
    if decoder is None:
        if draws_latents(target):
            wanted = f"the folder of the VAE that decodes the model's {channels} latent channels (--vae FOLDER)"
            fail(where, "vae", wanted + advice, "None")
        return
    if not draws_latents(target) and getattr(target, "draws", None) is not None:
        fail(where, "vae", "None for a model that draws pixels", "a VAE")
    if decoder.latent_channels != channels:
        fail(where, "vae", f"of {channels} latent channels, as the model", f"one of {decoder.latent_channels}")
