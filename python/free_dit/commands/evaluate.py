"""The command ``evaluate``."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import OmitArgPrefixes, arg

from free_dit.commands.shared import VAEChoice, console, draw_set
from free_dit.devices import resolve_device
from free_dit.evaluation.extractors import load_extractor
from free_dit.evaluation.rendering import render
from free_dit.evaluation.report import EvaluationSettings
from free_dit.evaluation.report import evaluate as run_evaluate
from free_dit.evaluation.sets import WHERE, open_images, open_reference
from free_dit.files import write_json
from free_dit.generation import DrawSettings, GenerateSettings, SampleFolder
from free_dit.loading import TargetFacts
from free_kernels.validation import check_writable, fail


@dataclass(frozen=True)
class NetworkChoice:
    """The network whose features and classes are used.

    Attributes:
        extractor: its name.
        weights: torch-fidelity's Inception weights, a local file.
        weights_sha256: their hash, where the file's name does not end in it.
    """

    extractor: Literal["digits_classifier", "inception_v3"] = "digits_classifier"
    weights: Path | None = None
    weights_sha256: str | None = None


def _named(sets: tuple[str, ...]) -> dict[str, str]:
    """``NAME=PATH``, or a path alone, named by its last part."""
    named: dict[str, str] = {}
    for text in sets:
        name, separator, path = text.partition("=")
        if not separator or Path(text).exists():
            name, path = Path(text).stem, text
        if not name or name in named:
            fail(WHERE, "sets", "of different names (NAME=PATH)", repr(text))
        named[name] = path
    return named


def evaluate(
    out: Path,
    reference: str = "digits-test",
    sets: tuple[str, ...] = (),
    generate_: Annotated[int, arg(name="generate", metavar="N")] = 0,
    network: Annotated[NetworkChoice, OmitArgPrefixes] = NetworkChoice(),
    model: str = "digits",
    drawing: Annotated[DrawSettings, OmitArgPrefixes] = DrawSettings(),
    vae: Annotated[VAEChoice, OmitArgPrefixes] = VAEChoice(),
    facts: Annotated[TargetFacts, OmitArgPrefixes] = TargetFacts(),
    device: str = "auto",
    metrics: Annotated[EvaluationSettings, OmitArgPrefixes] = EvaluationSettings(),
) -> None:
    """Quality of sample sets against real images, with intervals; differences between sets; large sets in shards.

    With --generate N it first draws N images into OUT/samples. Interrupt it at will: whole shards and finished features
    are kept, and the same command goes on. Under torchrun the ranks share the shards, and the last to end evaluates.

    Args:
        out: folder of evaluation.json, evaluation.md, features and drawn samples.
        reference: real images: an .npz (arr_0, or mu and sigma), a folder of PNG or JPEG, "digits-train" or
            "digits-test".
        sets: NAME=PATH of .npz files, folders of images or drawn sets; the first is what the others are compared with.
        generate_: images to draw; 0 draws none.
        network: what images are compared by.
        model: what draws: a bundled model's name, a checkpoint, or a folder of diffusers.
        drawing: how to draw; another seed for every set makes them independent, as two-sample tests need them.
        vae: what makes images of the latents of a latent model that draws.
        facts: what the model's file may not say of itself.
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1" ...
        metrics: how to evaluate.
    """
    rank, place = int(os.environ.get("RANK", "0")), resolve_device(WHERE, device)
    check_writable(WHERE, "out", out / "evaluation.json")
    named = _named(sets)
    if not named and not generate_:
        fail(WHERE, "sets", "given (NAME=PATH ...), or --generate N", "none")
    # Loaded first, so that errors appear before hours of drawing.
    extractor = load_extractor(network.extractor, network.weights, network.weights_sha256, place)
    real = open_reference(reference)
    if generate_:
        settings = GenerateSettings(**asdict(drawing), num=generate_)
        drawn, missing = draw_set(WHERE, out / "samples", model, settings, place, vae, facts, progress=rank == 0)
        if missing:
            shards = SampleFolder.open(out / "samples").shards
            console.print(f"rank {rank} is done; others lack {len(missing)} of {shards} shards")
            return
        # The rank that ends last evaluates; rank 0 does if the set was complete before.
        if rank and not drawn:
            return
        named = {"samples": str(out / "samples"), **named}
    elif rank:
        return
    report = run_evaluate(
        {name: open_images(path) for name, path in named.items()},
        real,
        extractor,
        metrics,
        cache=out / "features",
        device=place,
        progress=True,
    )
    write_json(out / "evaluation.json", report)
    (out / "evaluation.md").write_text(render(report))
    console.print(render(report))
    console.print(f"wrote {out / 'evaluation.json'} and {out / 'evaluation.md'}")
