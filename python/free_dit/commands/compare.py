"""The command ``compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from rich.console import Console
from tyro.conf import OmitArgPrefixes

from free_dit.commands.shared import VAEChoice, console, decoder_of, labels_of
from free_dit.devices import resolve_device
from free_dit.experiments.compare import LATENTS, PICTURES, print_report
from free_dit.experiments.compare import compare as run_compare
from free_dit.generation import ChainSettings
from free_dit.loading import TargetFacts, load_pair
from free_kernels.protocols import Drafter
from free_kernels.validation import check_writable


def compare(
    out: Path,
    model: str = "digits",
    drafter: str = "bundled",
    num: int = 64,
    chain: Annotated[ChainSettings, OmitArgPrefixes] = ChainSettings(),
    timing_pairs: int = 5,
    vae: Annotated[VAEChoice, OmitArgPrefixes] = VAEChoice(),
    latents: bool = False,
    facts: Annotated[TargetFacts, OmitArgPrefixes] = TargetFacts(),
    device: str = "auto",
) -> None:
    """Ordinary, frozen-drafter and learned-drafter sampling side by side: a picture, a plot, a table, a JSON file.

    Args:
        out: folder of samples.png, acceptance.png and compare.json.
        model: a bundled model's name, a checkpoint, or a folder of diffusers.
        drafter: "bundled", "frozen", or a drafter.safetensors.
        num: images.
        chain: how to sample.
        timing_pairs: interleaved pairs that each drafter's wall-clock ratio at batch 1 is measured on; 0 leaves out all
            times.
        vae: what makes images of the latents of a latent model; it is not part of the times.
        latents: write ordinary.npy and speculative.npy, float32 [N, C, H, W], in the place of samples.png.
        facts: what the model's file may not say of itself.
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1" ...
    """
    check_writable("compare", "out", out / "compare.json")
    place = resolve_device("compare", device)
    target, chosen = load_pair(model, drafter, facts, place)
    decode = decoder_of("compare", target, model, vae, place, latents)
    drafters: dict[str, Drafter | str] = {"frozen drafter": "frozen"}
    if chosen != "frozen":
        drafters["learned drafter"] = chosen
    labels = labels_of(num, (), target.num_classes)
    report = run_compare(target, drafters, labels, out, chain, timing_pairs, decode, latents)
    print_report(report, Console())
    shown = " and ".join(str(out / name) for name in (LATENTS if latents else PICTURES))
    console.print(f"wrote {shown}, {out / 'acceptance.png'} and {out / 'compare.json'}")
