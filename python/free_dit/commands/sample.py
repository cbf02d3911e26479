"""The command ``sample``."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from free_dit.commands.shared import console, labels_of, title_of
from free_dit.experiments.plots import sample_grids
from free_dit.generation import to_pixels
from free_dit.loading import load_drafter, load_target
from free_dit.networks.families import schedule_for
from free_kernels import DDIMSchedule, ancestral_sample
from free_kernels import sample as speculative_sample
from free_kernels.validation import check_writable


def sample(
    out: Path,
    model: str = "digits",
    drafter: str = "bundled",
    num: int = 64,
    classes: tuple[int, ...] = (),
    steps: int = 250,
    draft_length: int = 6,
    guidance: float = 1.0,
    seed: int = 0,
    max_slots: int | None = None,
) -> None:
    """Draw images; writes a PNG grid, or an NPZ as the ADM suite reads: arr_0 uint8 [N, H, W, C], arr_1 labels.

    Args:
        out: a .png or .npz file.
        model: a bundled model's name, a checkpoint, or a folder of diffusers.
        drafter: "bundled", "frozen", "none" (the ordinary sampler), "ddim" (a baseline that is no speculation: DDIM
            without noise), or a drafter.safetensors.
        num: images.
        classes: labels to cycle through; all if empty.
        steps: sampling steps K.
        draft_length: rows of a round for one image.
        guidance: classifier-free guidance scale; 1 is none.
        seed: an image depends on the seed and its place in the list of labels.
        max_slots: images in the making at a time.
    """
    if out.suffix not in (".png", ".npz"):
        raise ValueError(f"sample: out must end in .png or .npz, got {out}")
    check_writable("sample", "out", out)
    target, bundled = load_target(model)
    labels = labels_of(num, classes, target.num_classes)
    settings = {
        "schedule": DDIMSchedule(steps) if drafter == "ddim" else schedule_for(target, steps),
        "guidance_scale": guidance,
        "seed": seed,
        "max_slots": max_slots,
        "progress": True,
    }
    if drafter in ("none", "ddim"):
        result = ancestral_sample(target, labels, **settings)
    else:
        chosen = load_drafter(drafter, target, bundled)
        result = speculative_sample(target, labels, drafter=chosen, draft_length=draft_length, **settings)
    if out.suffix == ".png":
        named = drafter in ("bundled", "frozen", "none", "ddim")
        sample_grids(out, {f"{title_of(model)}, {drafter if named else title_of(drafter)}": result.samples}, labels)
    else:
        np.savez(out, arr_0=to_pixels(result.samples), arr_1=labels.numpy())
    stats = result.stats
    console.print(
        f"wrote {out}: {num} images, {stats.target_calls} target calls, call reduction {stats.call_reduction:.2f}, "
        f"{stats.elapsed_s:.1f} s"
    )
