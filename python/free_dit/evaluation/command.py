"""The command ``python -m free_dit evaluate``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import torch
from rich.console import Console
from tyro.conf import OmitArgPrefixes, arg

from free_dit.evaluation.extractors import load_extractor
from free_dit.evaluation.files import write_json
from free_dit.evaluation.generate import WHERE, GenerateSettings, generate
from free_dit.evaluation.report import EvaluationSettings, render
from free_dit.evaluation.report import evaluate as run_evaluate
from free_dit.evaluation.sets import open_images, open_reference
from free_kernels.validation import check_writable, fail


def _device(name: str) -> torch.device:
    """A device by name; "auto" is this rank's GPU where there is one."""
    if name != "auto":
        try:
            return torch.device(name)
        except RuntimeError as error:
            raise ValueError(f"{WHERE}: device must be 'auto' or a torch device, got {name!r}") from error
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


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


def _move(part: object, device: torch.device) -> None:
    """Weights of a target or drafter to a device, in place."""
    module = getattr(part, "module", part)
    if isinstance(module, torch.nn.Module):
        module.to(device)


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
    max_slots: int | None = 128,
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
        max_slots: images in the making at a time.
        device: "auto", "cpu", "cuda", "cuda:1" ...
        figures: how to evaluate.
    """
    console = Console(soft_wrap=True)
    rank, place = int(os.environ.get("RANK", "0")), _device(device)
    check_writable(WHERE, "out", out / "evaluation.json")
    named = _named(sets)
    if not named and not generate_:
        fail(WHERE, "sets", "given (NAME=PATH ...), or --generate N", "none")
    # Whatever is wrong with these should show before hours of drawing.
    network = load_extractor(extractor, weights, weights_sha256, place)
    real = open_reference(reference)
    if generate_:
        drawing = GenerateSettings(
            generate_,
            None if drafter == "none" else drafter,
            steps,
            1 if drafter == "none" else draft_length,
            relaxation,
            verification,
            guidance,
            seed,
            shard,
        )
        drawn, missing = _generate(out / "samples", model, drawing, max_slots, place, rank)
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


def _generate(
    folder: Path, model: str, settings: GenerateSettings, max_slots: int | None, device: torch.device, rank: int
) -> tuple[list[int], list[int]]:
    """Draw this rank's shards; returns them and those that are missing then."""
    # Not at the top: the command line imports this module.
    from free_dit.cli import _drafter, _target

    target, bundled = _target(model)
    chosen = None if settings.drafter is None else _drafter(settings.drafter, bundled, target)
    _move(target, device)
    _move(chosen, device)
    return generate(
        folder, target, chosen, settings, model=model, max_slots=max_slots, device=device, progress=rank == 0
    )
