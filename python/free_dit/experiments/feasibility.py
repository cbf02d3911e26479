"""Forecasts of speculation as a table, a plot and JSON, and real runs beside them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from tqdm import tqdm

from free_dit.networks.denoiser import DenoiserTarget, photograph_crops
from free_kernels import Feasibility, sample
from free_kernels.protocols import Drafter, Schedule, Target

_DENOISER = re.compile(r"denoiser-([1-9]\d?)")


def denoiser(model: str) -> Target | None:
    """The closed-form target ``denoiser-SIZE`` of photograph crops, up to 64 pixels; None for any other name."""
    found = _DENOISER.fullmatch(model)
    if found is None:
        return None
    size = int(found[1])
    if size > 64:
        raise ValueError(f"feasibility: model must be denoiser-SIZE with SIZE in [1, 64], got {model}")
    return DenoiserTarget(photograph_crops(size))


def real_runs(
    target: Target,
    drafters: dict[str, Drafter | str],
    schedule: Schedule,
    lengths: tuple[int, ...],
    images: int,
    seed: int,
    guidance_scale: float,
) -> list[dict[str, Any]]:
    """Steps per call of ``sample`` for each drafter and length, with its standard error over images."""
    runs = []
    labels = torch.arange(images) % target.num_classes
    for name, length in tqdm([(name, length) for name in drafters for length in lengths], desc="check", unit="run"):
        stats = sample(
            target,
            labels,
            schedule=schedule,
            drafter=drafters[name],
            draft_length=length,
            guidance_scale=guidance_scale,
            seed=seed,
        ).stats
        rounds = stats.rounds_per_image
        error = stats.call_reduction * rounds.std(ddof=1) / rounds.mean() / images**0.5 if images > 1 else None
        runs.append(
            {
                "drafter": name,
                "draft_length": length,
                "images": images,
                "steps_per_call": stats.call_reduction,
                "standard_error": error,
            }
        )
    return runs


def forecast_table(found: Feasibility, title: str, runs: list[dict[str, Any]]) -> Table:
    """All forecasts, with real runs in the last column."""
    table = Table(title=title, box=SIMPLE_HEAD, collapse_padding=True)
    real = {(run["drafter"], run["draft_length"]): run["steps_per_call"] for run in runs}
    headings = ["drafter", "L", "steps\na call", "95 %", "no\nreuse", "speed", "95 %", *(["\nreal"] if runs else [])]
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "drafter" else "right", no_wrap=True)
    for name, forecast in found.drafters.items():
        for one in forecast.lengths:
            cells = [name, str(one.draft_length), f"{one.steps_per_call:.2f}", _range(one.steps_interval)]
            cells += [f"{one.steps_without_reuse:.2f}", f"{one.speed_up:.2f}x", _range(one.speed_interval)]
            if runs:
                measured = real.get((name, one.draft_length))
                cells.append("-" if measured is None else f"{measured:.2f}")
            table.add_row(*cells)
    return table


def gap_table(found: Feasibility) -> Table:
    """Median gap and acceptance by step, and how often the target was asked about the draft's step before."""
    kinds = ("new", "seen once", "seen again")
    table = Table(title="gap delta, and acceptance", box=SIMPLE_HEAD, collapse_padding=True)
    for heading in ("drafter", "step", *kinds):
        table.add_column(heading, justify="left" if heading == "drafter" else "right", no_wrap=True)
    for name, forecast in found.drafters.items():
        readings = {(one.step, one.kind): one for one in forecast.gaps}
        for step in sorted({one.step for one in forecast.gaps}):
            row = [readings.get((step, kind)) for kind in kinds]
            table.add_row(name, str(step), *("-" if x is None else f"{x.gap:.2f}  {x.acceptance:.2f}" for x in row))
    return table


def forecast_plot(found: Feasibility, path: Path, title: str, runs: list[dict[str, Any]]) -> None:
    """Steps per call and speed-up against draft length, and acceptance against the step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (steps, speed, accepted) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for number, (name, forecast) in enumerate(found.drafters.items()):
        color, lengths = f"C{number}", [one.draft_length for one in forecast.lengths]
        for axes, value, interval in (
            (steps, "steps_per_call", "steps_interval"),
            (speed, "speed_up", "speed_interval"),
        ):
            axes.plot(lengths, [getattr(one, value) for one in forecast.lengths], "o-", color=color, label=name)
            low, high = np.array([getattr(one, interval) for one in forecast.lengths]).T
            axes.fill_between(lengths, low, high, color=color, alpha=0.2)
        without = [one.steps_without_reuse for one in forecast.lengths]
        steps.plot(lengths, without, ":", color=color, label=f"{name}, no refused rows")
        real = [run for run in runs if run["drafter"] == name]
        if real:
            points = [[run[key] for run in real] for key in ("draft_length", "steps_per_call")]
            steps.plot(*points, "x", color="black", ms=9, label=None if number else "real runs")
        for kind, style in (("new", ":"), ("seen once", "--"), ("seen again", "-")):
            points = [(one.step, one.acceptance) for one in forecast.gaps if one.kind == kind]
            if points:
                accepted.plot(*zip(*points, strict=True), style, marker=".", color=color, label=f"{name}, {kind}")
    speed.axhline(1.0, color="black", lw=0.8)
    steps.set(xlabel="draft length L", ylabel="steps per target call")
    speed.set(xlabel="draft length L", ylabel="speed over the ordinary chain, batch 1")
    accepted.set(xlabel="step at which rounds began", ylabel="acceptance", ylim=(0, 1.02))
    for axes in (steps, speed, accepted):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _range(interval: tuple[float, float]) -> str:
    return f"{interval[0]:.2f}-{interval[1]:.2f}"
