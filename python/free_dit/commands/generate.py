"""The command ``generate``."""

from __future__ import annotations

import hashlib
import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import OmitArgPrefixes, arg

from free_dit.commands.shared import VAEChoice, console, draw_set
from free_dit.devices import resolve_device
from free_dit.generation import DrawSettings, GenerateSettings, SampleFolder
from free_dit.generation.sample_folder import SUMS, WHERE
from free_dit.loading import TargetFacts
from free_kernels.validation import fail


def generate(
    out: Path,
    num: Annotated[int, arg(aliases=["-n"])] = GenerateSettings.num,
    model: str = "digits",
    drawing: Annotated[DrawSettings, OmitArgPrefixes] = DrawSettings(),
    format_: Annotated[Literal["npz", "png"], arg(name="format")] = "npz",
    vae: Annotated[VAEChoice, OmitArgPrefixes] = VAEChoice(),
    latents: bool = False,
    facts: Annotated[TargetFacts, OmitArgPrefixes] = TargetFacts(),
    device: str = "auto",
) -> None:
    """Draw a large sample set in shards: torchrun -m free_dit generate -n 50000 --out DIR.

    Stop it, kill it or fill the disk at will: the same command goes on, on any number of ranks, and the set is the one
    of an undisturbed run. With a larger --num it goes on to that, and the images that are there stay. When it is
    complete, OUT/SHA256SUMS holds the hash of every file.

    Args:
        out: folder of the set: manifest.json, shards/, and images/ for PNG.
        num: images; image i has label i modulo the number of classes. Behind torchrun it is -n, as torchrun takes
            --num for an option of its own.
        model: a bundled model's name, a checkpoint, or a folder of diffusers.
        drawing: how to draw.
        format_: "npz": a file of the ADM suite's form for each shard; "png": a file for each image.
        vae: what makes images of the latents of a latent model.
        latents: write the samples as they are, float32 [N, C, H, W], an .npy for each shard.
        facts: what the model's file may not say of itself.
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1" ...
    """
    rank, under_torchrun = int(os.environ.get("RANK", "0")), "TORCHELASTIC_RUN_ID" in os.environ
    # The device first, so that an error appears before files are read.
    place = resolve_device(WHERE, device)
    if latents and format_ == "png":
        fail(WHERE, "format", "npz with --latents, whose shards are .npy", format_)
    settings = GenerateSettings(**asdict(drawing), num=num, format="npy" if latents else format_)
    # torchrun ends every rank as soon as one dies, so rank 0 may wait and show the progress of the others.
    waits = rank == 0 and under_torchrun
    drawn, missing = draw_set(WHERE, out, model, settings, place, vae, facts, progress=rank == 0, wait=waits)
    samples = SampleFolder.open(out)
    if missing:
        console.print(f"rank {rank} is done; others lack {len(missing)} of {samples.shards} shards")
    elif rank == 0 or (drawn and not under_torchrun):
        statistics = samples.sampling_statistics()
        images = hashlib.sha256("".join(samples.image_hashes()).encode()).hexdigest()
        console.print(
            f"wrote {settings.num} images, {len(drawn)} of {samples.shards} shards now and here, to {out}; call "
            f"reduction {statistics['call_reduction']:.2f}; hashes in {out / SUMS}, of all images {images}"
        )
