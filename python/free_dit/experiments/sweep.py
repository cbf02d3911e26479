"""The trade-off table: calls, wall-clock, bias and quality of the digits pair over many settings; resumable."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from free_dit.bundled import MODELS, load_bundled
from free_dit.data import load_digits
from free_dit.evaluation.bootstrap import frechet_interval
from free_dit.evaluation.digits_classifier import class_accuracy, digit_features
from free_dit.evaluation.frechet import frechet_distance
from free_dit.experiments.model_card import EVALUATION_SEED
from free_dit.experiments.wall_clock import machine, wall_clock_ratio
from free_dit.files import keep_settings, read_json, sha256_of, write_json
from free_dit.generation import UNDRAFTED, ChainSettings, sampler_for
from free_kernels import SampleResult
from free_kernels.protocols import Drafter, Target
from free_kernels.validation import check_choice, check_int, check_writable, fail
from free_kernels.version import __version__

MODEL = "digits"
LENGTHS = (2, 3, 4, 6, 8, 10, "auto")
STRENGTHS = (1.0, 4.0, 16.0, 64.0)
# Slots for integer draft lengths; they change the time of the sweep, not its results.
_SLOTS = 64


@dataclass(frozen=True)
class Cell:
    """One configuration of the sweep.

    Attributes:
        drafter: ``"none"`` (the ordinary sampler), ``"ddim"`` (DDIM without noise), ``"frozen"`` or ``"learned"``.
        verification: ``"token"`` or ``"block"``.
        draft_length: L, or ``"auto"``.
        relaxation: strength; 0 is lossless.
        num_steps: K.
        guidance: guidance scale.
        quality: whether image quality is measured, on more images than calls need.
    """

    drafter: str
    verification: str = "token"
    draft_length: int | str = 1
    relaxation: float = 0.0
    num_steps: int = 250
    guidance: float = 1.0
    quality: bool = False

    @property
    def key(self) -> str:
        """Name of the configuration, the same in every release; a file name."""
        chain = f"K{self.num_steps}-g{self.guidance:g}"
        if self.drafter in UNDRAFTED:
            return f"{'ordinary' if self.drafter == 'none' else self.drafter}-{chain}"
        return f"{self.drafter}-{self.verification}-L{self.draft_length}-r{self.relaxation:g}-{chain}"


@dataclass(frozen=True)
class SweepSettings:
    """Settings of all cells of a folder.

    Attributes:
        num: images of a cell whose quality is measured; at least 20, two of each class.
        num_calls: images of the other cells.
        timing_pairs: interleaved pairs of runs at batch 1; 0 leaves wall-clock out.
        resamples: bootstrap resamples.
        seed: seed of all noise and of the bootstrap.
    """

    num: int = 128
    num_calls: int = 8
    timing_pairs: int = 3
    resamples: int = 400
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in (("num", 20), ("num_calls", 1), ("timing_pairs", 0), ("resamples", 2)):
            check_int("sweep", name, getattr(self, name), low)
        check_int("sweep", "seed", self.seed, 0, 2**31)


def full_cells() -> list[Cell]:
    """A full line over L at 250 steps without guidance; relaxation at L 12 and auto; steps and guidance one by one;
    relaxation at few steps.

    Quality is measured where the law may differ (ordinary samplers, relaxation) and of some lossless cells, which all
    have the ordinary sampler's law.
    """
    chains = [(250, 1.0), (50, 1.0), (100, 1.0), (1000, 1.0), (250, 2.0), (250, 4.0)]
    cells = [Cell("none", num_steps=steps, guidance=scale, quality=True) for steps, scale in chains]
    cells += [Cell("ddim", num_steps=steps, quality=True) for steps in (20, 50)]
    for drafter in ("learned", "frozen"):
        for verification in ("token", "block"):
            quality = [drafter == "learned" and length == 6 for length in LENGTHS]
            cells += [
                Cell(drafter, verification, length, quality=one) for length, one in zip(LENGTHS, quality, strict=True)
            ]
    cells.append(Cell("learned", draft_length=12, quality=True))
    # "auto" draws one image at a time, which is slow: quality is measured at every second strength.
    for length, shown in ((12, STRENGTHS), ("auto", STRENGTHS[1::2])):
        cells += [Cell("learned", "token", length, strength, quality=strength in shown) for strength in STRENGTHS]
    for steps, scale in chains[1:]:
        for verification, length in (("token", 6), ("block", 6), ("token", "auto")):
            cells.append(Cell("learned", verification, length, num_steps=steps, guidance=scale))
    # Relaxation gains most at few steps.
    for steps in (50, 100):
        cells.append(Cell("learned", draft_length=12, num_steps=steps, quality=True))
        for strength in STRENGTHS[1:]:
            cells.append(Cell("learned", "token", 12, strength, num_steps=steps, quality=True))
    return cells


def quick_cells() -> list[Cell]:
    """A few cells of each kind at 50 steps."""
    base = Cell("learned", draft_length=6, num_steps=50, quality=True)
    return [
        Cell("none", num_steps=50, quality=True),
        base,
        replace(base, verification="block"),
        replace(base, drafter="frozen"),
        replace(base, draft_length="auto", quality=False),
        *(replace(base, draft_length=12, relaxation=strength) for strength in (1.0, 4.0)),
    ]


PRESETS: dict[str, tuple[Callable[[], list[Cell]], SweepSettings]] = {
    "quick": (quick_cells, SweepSettings(num=40, timing_pairs=1)),
    "full": (full_cells, SweepSettings()),
}


def _sampler(target: Target, learned: Drafter, cell: Cell, slots: int) -> Callable[..., SampleResult]:
    """The cell's sampler, which takes labels and a seed."""
    settings = ChainSettings(cell.num_steps, cell.draft_length, cell.guidance)
    drafter = learned if cell.drafter == "learned" else cell.drafter
    speculation = {"relaxation": cell.relaxation, "verification": cell.verification}
    return partial(sampler_for(target, drafter, settings, **speculation), max_slots=slots)


def measure_quality(images: Tensor, labels: Tensor, settings: SweepSettings) -> dict[str, Any]:
    """Class accuracy and Frechet distance in digits-classifier features from the held-out real digits.

    Args:
        images: ``[N, 1, 8, 8]``.
        labels: int64 ``[N]``, two or more of each that occurs.
        settings: resamples and seed.
    """
    real = load_digits("test")
    features, real_features = digit_features(images), digit_features(real.images)
    distance = frechet_interval(
        features,
        real_features,
        strata_a=labels.numpy(),
        strata_b=real.labels.numpy(),
        resamples=settings.resamples,
        seed=settings.seed,
    )
    return {
        "images": len(labels),
        "accuracy": asdict(class_accuracy(images, labels)),
        "frechet": asdict(distance),
        "frechet_sampled": frechet_distance(features, real_features),
    }


def measure_cell(target: Target, drafter: Drafter, cell: Cell, settings: SweepSettings) -> dict[str, Any]:
    """Run one configuration.

    ``"auto"`` weighs calls against time, which depends on how many images share a call: it draws one at a time, as it
    does where it is timed. With any other draft length calls and images do not depend on that.
    """
    labels = torch.arange(settings.num if cell.quality else settings.num_calls) % target.num_classes
    seed = EVALUATION_SEED + settings.seed
    slots = 1 if cell.draft_length == "auto" else _SLOTS
    result = _sampler(target, drafter, cell, slots)(labels, seed=seed)
    rounds = result.stats.rounds_per_image
    # The delta method, for a ratio of means with a constant numerator.
    relative_error = float(rounds.std(ddof=1) / rounds.mean() / np.sqrt(len(rounds))) if len(rounds) > 1 else None
    record: dict[str, Any] = {
        "key": cell.key,
        "cell": asdict(cell),
        "images": len(labels),
        "calls_per_image": float(rounds.mean()),
        "call_reduction": result.stats.call_reduction,
        "call_reduction_se": None if relative_error is None else relative_error * result.stats.call_reduction,
        "acceptance": None if np.isnan(result.stats.acceptance) else result.stats.acceptance,
        "bias_bound": float(result.stats.bias_bound),
        "wall_clock": None,
        "quality": measure_quality(result.samples.cpu(), labels, settings) if cell.quality else None,
    }
    if settings.timing_pairs and cell.drafter not in UNDRAFTED:

        def run(which: Cell) -> Callable[[int], SampleResult]:
            draw = _sampler(target, drafter, which, 1)
            return lambda pair: draw(torch.tensor([pair % target.num_classes]), seed=seed + pair)

        ratio = wall_clock_ratio(run(replace(cell, drafter="none")), run(cell), 1, settings.timing_pairs)
        record["wall_clock"] = asdict(ratio)
    return record


def measure_real(settings: SweepSettings) -> dict[str, Any]:
    """Quality of as many real training digits, which a perfect sampler would reach, and of the held-out digits."""
    train, test = load_digits("train"), load_digits("test")
    each = settings.num // train.num_classes
    rows = torch.cat([(train.labels == label).nonzero()[:each, 0] for label in range(train.num_classes)])
    return {
        "held_out_accuracy": asdict(class_accuracy(test.images, test.labels)),
        "held_out_images": len(test.labels),
        "training_digits": measure_quality(train.images[rows], train.labels[rows], settings),
    }


def _identity(settings: SweepSettings, device: torch.device | str) -> dict[str, Any]:
    """Everything that must be equal for all cells of a folder, which stand in one table."""
    hashes = {f"{part}_sha256": sha256_of(MODELS / MODEL / f"{part}.safetensors") for part in ("model", "drafter")}
    return {"model": MODEL, **hashes, **asdict(settings), "version": __version__, **machine(device)}


def _finished(path: Path, cell: Cell) -> dict[str, Any] | None:
    """The record of a cell that an earlier run wrote, unless it lacks the quality that is wanted now."""
    if not path.exists():
        return None
    record = read_json("sweep", path)
    return record if record.get("cell") in (asdict(cell), asdict(replace(cell, quality=True))) else None


def run_sweep(
    out: Path, cells: list[Cell], settings: SweepSettings, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """Measure the cells that ``out/cells`` lacks; each is written as it is done, and so is ``out/sweep.json``.

    Sampling runs on ``device``, and what is read from the images on the CPU.

    Returns:
        What ``sweep.json`` holds: ``settings``, ``real`` and ``cells``, in the order given.

    Raises:
        ValueError: the folder holds cells of other settings, or a file that is not JSON; two cells have the same key.
        OSError: ``out`` cannot be written.
    """
    out = Path(out)
    if len({cell.key for cell in cells}) < len(cells) or not cells:
        fail("sweep", "cells", "one or more, of different keys", f"{len(cells)}")
    check_writable("sweep", "out", out / "cells" / "cell.json")
    identity = _identity(settings, device)
    keep_settings("sweep", out / "settings.json", identity, "cells")
    paths = {cell.key: out / "cells" / f"{cell.key}.json" for cell in cells}
    records = {cell.key: _finished(paths[cell.key], cell) for cell in cells}
    missing = [cell for cell in cells if records[cell.key] is None]
    real = measure_real(settings)

    def write() -> None:
        done = [record for record in records.values() if record is not None]
        write_json(out / "sweep.json", {"settings": identity, "real": real, "cells": done})

    if missing:
        target, drafter = load_bundled(MODEL, device)
        bar = tqdm(missing, initial=len(cells) - len(missing), total=len(cells), desc="sweep", unit="cell")
        for cell in bar:
            bar.set_postfix_str(cell.key)
            records[cell.key] = measure_cell(target, drafter, cell, settings)
            write_json(paths[cell.key], records[cell.key])
            # After every cell, so that --render-only can show an unfinished sweep.
            write()
    else:
        write()
    return read_sweep(out)


def read_sweep(out: Path) -> dict[str, Any]:
    """What an earlier run left in ``out/sweep.json``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file does not hold a sweep.
    """
    path = Path(out) / "sweep.json"
    if not path.is_file():
        raise FileNotFoundError(f"sweep: {path} must be an existing file; run the sweep without --render-only first")
    report = read_json("sweep", path)
    if not {"settings", "real", "cells"} <= report.keys():
        fail("sweep", str(path), "a sweep", f"keys {sorted(report)}")
    return report


def preset(name: str, num: int | None = None, seed: int = 0) -> tuple[list[Cell], SweepSettings]:
    """Cells and settings of a preset, ``"quick"`` or ``"full"``; ``num`` None is the preset's own."""
    cells, settings = PRESETS[check_choice("sweep", "preset", name, tuple(PRESETS))]
    return cells(), replace(settings, num=settings.num if num is None else num, seed=seed)
