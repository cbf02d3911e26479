"""What several commands share: types of options, labels, titles, devices, drawing by name, output."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
from rich.console import Console
from tyro.conf import arg

from free_dit.bundled import bundled_names
from free_dit.generation import GenerateSettings
from free_dit.generation import generate as run_generate
from free_dit.latents import LatentDecoder, check_decoder, load_vae, pipeline_vae
from free_dit.loading import TargetFacts, facts_of, is_original, load_pair
from free_kernels.protocols import Target
from free_kernels.validation import check_int, fail

Overrides = Annotated[tuple[str, ...], arg(name="set", metavar="KEY=VALUE ...")]
console = Console(soft_wrap=True, markup=False)


@dataclass(frozen=True)
class VAEChoice:
    """What makes images of a latent model's samples.

    Attributes:
        vae: folder of diffusers' AutoencoderKL, or of a pipeline that holds one; a pipeline given as the model brings
            its own.
        vae_dtype: of its weights and arithmetic.
        vae_batch: latents decoded at a time.
    """

    vae: Path | None = None
    vae_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    vae_batch: int = 8


def decoder_of(
    where: str, target: Target, model: str, choice: VAEChoice, device: torch.device, latents: bool | None
) -> LatentDecoder | None:
    """What decodes the samples of a model; None where they are images, or are wanted as ``latents``.

    ``latents`` is None for a command that has no such option.

    Raises:
        ValueError: the model draws latents and there is no VAE, or one of other latents.
    """
    if latents:
        if choice.vae is not None:
            fail(where, "vae", "None with --latents, which are not decoded", str(choice.vae))
        return None
    check_int(where, "vae_batch", choice.vae_batch, 1)
    folder = choice.vae or pipeline_vae(model)
    decoder = None
    if folder is not None:
        decoder = load_vae(where, folder, device, getattr(torch, choice.vae_dtype), choice.vae_batch)
    check_decoder(where, target, decoder, "" if latents is None else ", or --latents to write latents as .npy")
    return decoder


def title_of(model: str) -> str:
    """A short name of a model or drafter; for a file that of its folder, because training always names files alike."""
    return model if model in bundled_names() else Path(model).parent.name or Path(model).stem


def labels_of(count: int, classes: tuple[int, ...], num_classes: int) -> torch.Tensor:
    """int64 ``[count]`` that repeats ``classes`` in order; all classes if empty."""
    check_int("free_dit", "num", count, 1)
    chosen = torch.tensor(classes or tuple(range(num_classes)))
    return chosen[torch.arange(count) % len(chosen)]


def draw_set(
    where: str,
    folder: Path,
    model: str,
    settings: GenerateSettings,
    device: torch.device,
    vae: VAEChoice,
    facts: TargetFacts,
    *,
    progress: bool,
    wait: bool = False,
) -> tuple[list[int], list[int]]:
    """:func:`free_dit.generation.generate` with a model and a drafter by name; ``"none"`` is the ordinary sampler."""
    target, drafter = load_pair(model, settings.drafter, facts, device)
    decode = decoder_of(where, target, model, vae, device, settings.format == "npy" if where == "generate" else None)
    if drafter == "none":
        settings, drafter = replace(settings, drafter=None, draft_length=1), None
    # Of the facts that decide images these are not in the weights, whose hash the manifest has.
    known = facts_of(target) if is_original(model) else {}
    told = {name: known[name] for name in ("num_heads", "family") if name in known}
    return run_generate(
        folder, target, drafter, settings, model=model, facts=told, decode=decode, progress=progress, wait=wait
    )
