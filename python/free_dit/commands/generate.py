"""The command ``generate``."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
from tyro.conf import OmitArgPrefixes

from free_dit.commands.shared import console, device_of
from free_dit.generation import GenerateSettings, SampleFolder
from free_dit.generation import generate as run_generate
from free_dit.generation.sample_folder import SUMS, WHERE
from free_dit.loading import load_drafter, load_target


def draw_set(
    folder: Path, model: str, settings: GenerateSettings, device: torch.device, *, progress: bool, wait: bool = False
) -> tuple[list[int], list[int]]:
    """:func:`free_dit.generation.generate` with a model and a drafter by name; ``"none"`` is the ordinary sampler."""
    target, bundled = load_target(model, device)
    if settings.drafter in ("none", None):
        settings, drafter = replace(settings, drafter=None, draft_length=1), None
    else:
        drafter = load_drafter(settings.drafter, target, bundled)
    return run_generate(folder, target, drafter, settings, model=model, device=device, progress=progress, wait=wait)


def generate(
    out: Path,
    model: str = "digits",
    settings: Annotated[GenerateSettings, OmitArgPrefixes] = GenerateSettings(),
    device: str = "auto",
) -> None:
    """Draw a large sample set in shards: torchrun -m free_dit generate -n 50000 --out DIR.

    Stop it, kill it or fill the disk at will: the same command goes on, on any number of ranks, and the set is the one
    of an undisturbed run. When it is complete, OUT/SHA256SUMS holds the hash of every file.

    Args:
        out: folder of the set: manifest.json, shards/, and images/ for PNG.
        model: a bundled model's name, or a model.safetensors.
        settings: what to draw. Behind torchrun the number of images is -n, as torchrun takes --num for an option of
            its own.
        device: "auto", "cpu", "cuda", "cuda:1" ...
    """
    rank, under_torchrun = int(os.environ.get("RANK", "0")), "TORCHELASTIC_RUN_ID" in os.environ
    # torchrun ends every rank as soon as one dies, so rank 0 may stay to show how the others get on.
    waits = rank == 0 and under_torchrun
    drawn, missing = draw_set(out, model, settings, device_of(WHERE, device), progress=rank == 0, wait=waits)
    if missing:
        console.print(f"rank {rank} is done; others lack {len(missing)} of {settings.shards} shards")
    elif rank == 0 or (drawn and not under_torchrun):
        samples = SampleFolder.open(out)
        figures = samples.sampling_figures()
        images = hashlib.sha256("".join(samples.image_hashes()).encode()).hexdigest()
        console.print(
            f"wrote {settings.num} images, {len(drawn)} of {settings.shards} shards now and here, to {out}; call "
            f"reduction {figures['call_reduction']:.2f}; hashes in {out / SUMS}, of all images {images}"
        )
