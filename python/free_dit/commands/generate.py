"""The command ``python -m free_dit generate``."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from rich.console import Console
from tyro.conf import arg

from free_dit.generation.job import generate as run_generate
from free_dit.generation.store import SUMS, WHERE, GenerateSettings, SampleFolder


def device_of(where: str, name: str) -> torch.device:
    """A device by name; "auto" is this rank's GPU where there is one."""
    if name != "auto":
        try:
            return torch.device(name)
        except RuntimeError as error:
            raise ValueError(f"{where}: device must be 'auto' or a torch device, got {name!r}") from error
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def _move(part: object, device: torch.device) -> None:
    """Weights of a target or drafter to a device, in place."""
    module = getattr(part, "module", part)
    if isinstance(module, torch.nn.Module):
        module.to(device)


def settings_for(num: int, drafter: str, steps: int, draft_length: int, *rest: Any) -> GenerateSettings:
    """Settings with a drafter by name; ``"none"`` is the ordinary sampler, whose rounds have one row."""
    ordinary = drafter == "none"
    return GenerateSettings(num, None if ordinary else drafter, steps, 1 if ordinary else draft_length, *rest)


def draw_set(
    folder: Path, model: str, settings: GenerateSettings, device: torch.device, *, progress: bool, wait: bool = False
) -> tuple[list[int], list[int]]:
    """:func:`free_dit.generation.generate` with a model and a drafter by name."""
    # Not at the top: the command line imports this module.
    from free_dit.cli import _drafter, _target

    target, bundled = _target(model)
    chosen = None if settings.drafter is None else _drafter(settings.drafter, bundled, target)
    _move(target, device)
    _move(chosen, device)
    return run_generate(folder, target, chosen, settings, model=model, device=device, progress=progress, wait=wait)


def generate(
    out: Path,
    num: Annotated[int, arg(aliases=["-n"])] = GenerateSettings.num,
    model: str = "digits",
    drafter: str = "bundled",
    steps: int = GenerateSettings.steps,
    draft_length: int = GenerateSettings.draft_length,
    relaxation: float = GenerateSettings.relaxation,
    verification: Literal["token", "block"] = "token",
    guidance: float = GenerateSettings.guidance,
    seed: int = GenerateSettings.seed,
    format_: Annotated[Literal["npz", "png"], arg(name="format")] = "npz",
    shard: int = GenerateSettings.shard,
    max_slots: int | None = GenerateSettings.max_slots,
    device: str = "auto",
) -> None:
    """Draw a large sample set in shards: torchrun -m free_dit generate -n 50000 --out DIR.

    Stop it, kill it or fill the disk at will: the same command goes on, on any number of ranks, and the set is the one
    of an undisturbed run. When it is complete, OUT/SHA256SUMS holds the hash of every file.

    Args:
        out: folder of the set: manifest.json, shards/, and images/ for PNG.
        num: images; image i has label i modulo the number of classes. Behind torchrun it is -n, as torchrun takes
            --num for an option of its own.
        model: a bundled model's name, or a model.safetensors.
        drafter: "bundled", "frozen", "none" (the ordinary sampler), or a drafter.safetensors.
        steps: sampling steps K.
        draft_length: rows of a round for one image.
        relaxation: strength; 0 is lossless.
        verification: "token" or "block".
        guidance: classifier-free guidance scale; 1 is none.
        seed: an image depends on the seed and its index.
        format_: "npz": a file of the ADM suite's form for each shard; "png": a file for each image.
        shard: images of a shard: what is drawn together and kept, or drawn again, as a whole.
        max_slots: images of a shard in the making at a time; all of them if None.
        device: "auto", "cpu", "cuda", "cuda:1" ...
    """
    console = Console(soft_wrap=True)
    rank = int(os.environ.get("RANK", "0"))
    place = device_of(WHERE, device)
    manner = relaxation, verification, guidance, seed, shard, max_slots, format_
    settings = settings_for(num, drafter, steps, draft_length, *manner)
    # torchrun ends every rank as soon as one dies, so rank 0 may stay to show how the others get on.
    watched = rank == 0 and "TORCHELASTIC_RUN_ID" in os.environ
    drawn, missing = draw_set(out, model, settings, place, progress=rank == 0, wait=watched)
    if missing:
        console.print(f"rank {rank} is done; others lack {len(missing)} of {settings.shards} shards", markup=False)
    elif rank == 0 or (drawn and "TORCHELASTIC_RUN_ID" not in os.environ):
        samples = SampleFolder.open(out)
        figures = samples.sampling_figures()
        images = hashlib.sha256("".join(samples.image_hashes()).encode()).hexdigest()
        console.print(
            f"wrote {num} images, {len(drawn)} of {settings.shards} shards now and here, to {out}; call reduction "
            f"{figures['call_reduction']:.2f}; hashes in {out / SUMS}, of all images {images}",
            markup=False,
        )
