"""The command ``sample``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
from tyro.conf import OmitArgPrefixes

from free_dit.commands.shared import VAEChoice, console, decoder_of, labels_of, title_of
from free_dit.devices import resolve_device
from free_dit.generation import UNDRAFTED, ChainSettings, sampler_for, to_pixels
from free_dit.loading import TargetFacts, load_pair
from free_kernels.validation import check_writable


def sample(
    out: Path,
    model: str = "digits",
    drafter: str = "bundled",
    num: int = 64,
    classes: tuple[int, ...] = (),
    chain: Annotated[ChainSettings, OmitArgPrefixes] = ChainSettings(),
    max_slots: int | None = None,
    vae: Annotated[VAEChoice, OmitArgPrefixes] = VAEChoice(),
    latents: bool = False,
    facts: Annotated[TargetFacts, OmitArgPrefixes] = TargetFacts(),
    device: str = "auto",
) -> None:
    """Draw images; writes a PNG grid, or an NPZ as the ADM suite reads: arr_0 uint8 [N, H, W, C], arr_1 labels.

    Args:
        out: a .png or .npz file; an .npy with --latents.
        model: a bundled model's name, a checkpoint, or a folder of diffusers.
        drafter: "bundled", "frozen", "none" (the ordinary sampler), "ddim" (a baseline that is no speculation: DDIM
            without noise), or a drafter.safetensors.
        num: images.
        classes: labels to cycle through; all if empty.
        chain: how to sample; an image's index is its place in the list of labels.
        max_slots: images in the making at a time.
        vae: what makes images of the latents of a latent model.
        latents: write the samples as they are, float32 [N, C, H, W].
        facts: what the model's file may not say of itself.
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1" ...
    """
    from free_dit.experiments.plots import sample_grids

    endings = (".npy",) if latents else (".png", ".npz")
    if out.suffix not in endings:
        raise ValueError(f"sample: out must end in {' or '.join(endings)}{' with --latents' * latents}, got {out}")
    check_writable("sample", "out", out)
    place = resolve_device("sample", device)
    target, chosen = load_pair(model, drafter, facts, place)
    decode = decoder_of("sample", target, model, vae, place, latents)
    labels = labels_of(num, classes, target.num_classes)
    result = sampler_for(target, chosen, chain)(labels, seed=chain.seed, max_slots=max_slots, progress=True)
    images = result.samples if decode is None else decode(result.samples)
    if latents:
        np.save(out, images.cpu().numpy())
    elif out.suffix == ".png":
        named = drafter in ("bundled", "frozen", *UNDRAFTED)
        sample_grids(out, {f"{title_of(model)}, {drafter if named else title_of(drafter)}": images}, labels)
    else:
        np.savez(out, arr_0=to_pixels(images), arr_1=labels.numpy())
    stats = result.stats
    console.print(
        f"wrote {out}: {num} images, {stats.target_calls} target calls, call reduction {stats.call_reduction:.2f}, "
        f"{stats.elapsed_s:.1f} s"
    )
