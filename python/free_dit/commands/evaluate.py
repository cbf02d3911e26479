"""The command ``python -m free_dit evaluate``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from rich.console import Console
from tyro.conf import OmitArgPrefixes, arg

from free_dit.evaluation.extractors import load_extractor
from free_dit.evaluation.report import EvaluationSettings, render
from free_dit.evaluation.report import evaluate as run_evaluate
from free_dit.evaluation.sets import WHERE, open_images, open_reference
from free_dit.files import write_json
from free_dit.generation import GenerateSettings
from free_dit.generation.command import device_of, draw_set, settings_for
from free_kernels.validation import check_writable, fail


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
    extractor: Literal["digits_classifier", "inception_v3"] = "digits_classifier",
    weights: Path | None = None,
    weights_sha256: str | None = None,
    model: str = "digits",
    drafter: str = "bundled",
    steps: int = GenerateSettings.steps,
    draft_length: int = GenerateSettings.draft_length,
    relaxation: float = GenerateSettings.relaxation,
    verification: Literal["token", "block"] = "token",
    guidance: float = GenerateSettings.guidance,
    seed: int = GenerateSettings.seed,
    shard: int = GenerateSettings.shard,
    max_slots: int | None = GenerateSettings.max_slots,
    device: str = "auto",
    figures: Annotated[EvaluationSettings, OmitArgPrefixes] = EvaluationSettings(),
) -> None:
    """Quality of sample sets against real images, with intervals; differences between sets; large sets in shards.

    With --generate N it first draws N images into OUT/samples. Interrupt it at will: whole shards and finished features
    are kept, and the same command goes on. Under torchrun the ranks share the shards, and the last to end evaluates.

    Args:
        out: folder of evaluation.json, evaluation.md, features and drawn samples.
        reference: real images: an .npz (arr_0, or mu and sigma), a folder of PNG, "digits-train" or "digits-test".
        sets: NAME=PATH of .npz files, folders of PNG or drawn sets; the first is what the others are compared with.
        generate_: images to draw; 0 draws none.
        extractor: the network whose features and classes are used.
        weights: torch-fidelity's Inception weights, a local file.
        weights_sha256: their hash, where the file's name does not end in it.
        model: what draws: a bundled model's name, or a model.safetensors.
        drafter: "bundled", "frozen", "none" (the ordinary sampler), or a drafter.safetensors.
        steps: sampling steps K.
        draft_length: rows of a round for one image.
        relaxation: strength; 0 is lossless.
        verification: "token" or "block".
        guidance: classifier-free guidance scale; 1 is none.
        seed: seed of all noise; another seed for every set makes them independent, as two-sample tests need them.
        shard: images of a shard, the unit that is kept or drawn again after an interrupt.
        max_slots: images of a shard in the making at a time; all of them if None.
        device: "auto", "cpu", "cuda", "cuda:1" ...
        figures: how to evaluate.
    """
    console = Console(soft_wrap=True)
    rank, place = int(os.environ.get("RANK", "0")), device_of(WHERE, device)
    check_writable(WHERE, "out", out / "evaluation.json")
    named = _named(sets)
    if not named and not generate_:
        fail(WHERE, "sets", "given (NAME=PATH ...), or --generate N", "none")
    # Whatever is wrong with these should show before hours of drawing.
    network = load_extractor(extractor, weights, weights_sha256, place)
    real = open_reference(reference)
    if generate_:
        manner = relaxation, verification, guidance, seed, shard, max_slots
        drawing = settings_for(generate_, drafter, steps, draft_length, *manner)
        drawn, missing = draw_set(out / "samples", model, drawing, place, progress=rank == 0)
        if missing:
            console.print(f"rank {rank} is done; others lack {len(missing)} of {drawing.shards} shards")
            return
        # The rank that ends last finds the set whole; a set that was whole already is rank 0's.
        if rank and not drawn:
            return
        named = {"samples": str(out / "samples"), **named}
    elif rank:
        return
    report = run_evaluate(
        {name: open_images(path) for name, path in named.items()},
        real,
        network,
        figures,
        cache=out / "features",
        device=place,
        progress=True,
    )
    write_json(out / "evaluation.json", report)
    (out / "evaluation.md").write_text(render(report))
    console.print(render(report), markup=False)
    console.print(f"wrote {out / 'evaluation.json'} and {out / 'evaluation.md'}", markup=False)
