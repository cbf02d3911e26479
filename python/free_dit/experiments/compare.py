"""Speculative against ordinary sampling, side by side: pictures, acceptance, calls and wall-clock ratios."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from free_dit.experiments.wall_clock import machine, wall_clock_ratio
from free_dit.files import write_json
from free_dit.generation import ChainSettings, sampler_for
from free_dit.networks.families import device_of
from free_kernels import SampleResult
from free_kernels.protocols import Drafter, Target

# Files of the samples: pictures, or what was drawn as it is.
PICTURES = ("samples.png",)
LATENTS = ("ordinary.npy", "speculative.npy")


def compare(
    target: Target,
    drafters: dict[str, Drafter | str],
    labels: torch.Tensor,
    out: Path,
    settings: ChainSettings = ChainSettings(),
    timing_pairs: int = 5,
    decode: Callable[[torch.Tensor], torch.Tensor] | None = None,
    latents: bool = False,
) -> dict[str, Any]:
    """Sample ``labels`` ordinarily and with each drafter; write ``samples.png``, ``acceptance.png``, ``compare.json``.

    Every drafter is timed with one image at a time, in ``timing_pairs`` interleaved pairs of runs; the last one, which
    the picture shows, also with all images at once, in two pairs. ``decode`` makes images of samples, after the runs;
    with ``latents`` the samples themselves are written as ``.npy`` in the place of ``samples.png``.

    Returns:
        What ``compare.json`` holds.
    """
    from free_dit.experiments.plots import acceptance_plot, sample_grids

    samplers = {name: sampler_for(target, one, settings) for name, one in {"ordinary": None, **drafters}.items()}
    runs = {name: draw(labels, seed=settings.seed, progress=True) for name, draw in samplers.items()}
    best = list(drafters)[-1]

    def seeded(name: str, chosen: torch.Tensor) -> Callable[[int], SampleResult]:
        return lambda run: samplers[name](chosen, seed=settings.seed + run)

    timed = [(name, labels[:1], timing_pairs) for name in drafters]
    if len(labels) > 1:
        timed.append((best, labels, 2))
    ratios = [
        {"sampler": name} | asdict(wall_clock_ratio(seeded("ordinary", part), seeded(name, part), len(part), pairs))
        for name, part, pairs in (timed if timing_pairs else [])
    ]
    report = {
        "machine": machine(device_of(target)),
        "settings": {
            "num_steps": settings.steps,
            "draft_length": settings.length,
            "guidance_scale": settings.guidance,
            "images": len(labels),
            "seed": settings.seed,
        },
        "runs": {
            name: {
                "target_calls": run.stats.target_calls,
                "target_rows": run.stats.target_rows,
                "drafter_calls": run.stats.drafter_calls,
                "acceptance": None if name == "ordinary" else run.stats.acceptance,
                "call_reduction": run.stats.call_reduction,
                "elapsed_s": run.stats.elapsed_s,
            }
            for name, run in runs.items()
        },
        "wall_clock_ratios": ratios,
    }
    title = f"{settings.steps} steps, guidance {settings.guidance:g}"
    drawn = {"ordinary sampler": runs["ordinary"].samples, f"speculative, lossless ({best})": runs[best].samples}
    if latents:
        for name, samples in zip(LATENTS, drawn.values(), strict=True):
            np.save(out / name, samples.cpu().numpy())
    else:
        grids = {name: one if decode is None else decode(one) for name, one in drawn.items()}
        sample_grids(out / PICTURES[0], grids, labels)
    curves = {name: runs[name].stats.acceptance_by_step for name in drafters}
    acceptance_plot(out / "acceptance.png", curves, f"Accepted drafts, draft length {settings.length}, {title}")
    write_json(out / "compare.json", report)
    return report


def print_report(report: dict[str, Any], console: Console) -> None:
    """The report as a table."""
    settings = report["settings"]
    table = Table(
        title=f"{settings['images']} images, {settings['num_steps']} steps, draft length "
        f"{settings['draft_length']}, guidance {settings['guidance_scale']:g}",
        box=SIMPLE_HEAD,
        collapse_padding=True,
    )
    columns = ("sampler", "target\ncalls", "target\nrows", "\naccepted", "call\nreduction")
    ratios = report["wall_clock_ratios"]
    batches = list(dict.fromkeys(ratio["batch"] for ratio in ratios))
    speeds = {(ratio["sampler"], ratio["batch"]): f"{ratio['median']:.2f}x" for ratio in ratios}
    speeds |= {("ordinary", batch): "1.00x" for batch in batches}
    for column in (*columns, *(f"speed,\nbatch {batch}" for batch in batches)):
        table.add_column(column, justify="left" if column == "sampler" else "right", no_wrap=column == "sampler")
    for name, run in report["runs"].items():
        acceptance = "-" if run["acceptance"] is None else f"{run['acceptance']:.3f}"
        table.add_row(
            name,
            str(run["target_calls"]),
            str(run["target_rows"]),
            acceptance,
            f"{run['call_reduction']:.2f}",
            *(speeds.get((name, batch), "-") for batch in batches),
        )
    console.print(table)
    for ratio in ratios:
        console.print(
            f"{ratio['sampler']}, batch {ratio['batch']}: {ratio['median']:.2f}x the ordinary sampler's speed "
            f"(range {ratio['low']:.2f} to {ratio['high']:.2f} over {ratio['pairs']} interleaved pairs; "
            f"{ratio['ordinary_s']:.2f} s against {ratio['speculative_s']:.2f} s)"
        )
    facts = report["machine"]
    where = facts.get("gpu", f"{facts['cpu']}, {facts['threads']} threads")
    console.print(f"measured on {where}, torch {facts['torch']}")
