"""Tables and a picture of predictions."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure

from free_dit.experiments.scale.prediction import BATCHES, GPUS, LENGTHS, Choice, Inputs, choices, crossover, sweep
from free_dit.files import plain
from free_dit.markdown import table

GOALS = {"latency_s": "latency of a batch", "images_per_s": "throughput"}
KINDS = ("single", "data", "verify", "mixed")
# Batches of the printed table; the JSON has all.
_SHOWN = (1, 8, 64, 512)


def build_report(
    inputs: Inputs,
    details: dict[str, Any],
    gpus: Iterable[int] = GPUS,
    batches: Iterable[int] = BATCHES,
    lengths: Iterable[int] = LENGTHS,
) -> dict[str, Any]:
    """Predictions for every number of GPUs, batch and goal, and where speculation stops to pay; plain values."""
    predictions = sweep(inputs, gpus, batches, lengths)
    report: dict[str, Any] = {"inputs": asdict(inputs), "details": details, "lengths": list(lengths)}
    report["choices"] = {goal: [asdict(choice) for choice in choices(predictions, goal)] for goal in GOALS}
    report["crossover"] = {goal: _crossovers(choices(predictions, goal)) for goal in GOALS}
    return report


def _crossovers(found: list[Choice]) -> dict[str, dict[str, int | None]]:
    """By number of GPUs, then for the best layout and each kind: the smallest batch from which on drafts do not pay."""
    table: dict[str, dict[str, int | None]] = {}
    for gpus in dict.fromkeys(choice.speculative.gpus for choice in found):
        own = [choice for choice in found if choice.speculative.gpus == gpus]
        batches = [choice.speculative.batch for choice in own]
        row = {"best": crossover(batches, [choice.speed_up for choice in own])}
        for kind in KINDS:
            if all(kind in choice.by_kind for choice in own):
                row[kind] = crossover(batches, [choice.by_kind[kind] for choice in own])
        table[str(gpus)] = row
    return table


def _layout(prediction: dict[str, Any]) -> str:
    return f"{prediction['data']} x {prediction['verify']}"


def _figure(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def render(report: dict[str, Any]) -> str:
    """Predictions as Markdown; layouts read groups x GPUs of a group."""
    inputs, found = report["inputs"], report["choices"]
    largest = max(choice["speculative"]["batch"] for choice in found["latency_s"])
    kind = "Model from measured inputs" if inputs["measured"] else "**Not measured: a model from stated inputs**"
    lines = [f"{kind} ({inputs['origin']}).", ""]
    rows = []
    both = zip(found["latency_s"], found["images_per_s"], strict=True)
    for fast, much in both:
        drafts, other = fast["speculative"], much["speculative"]
        if drafts["batch"] in _SHOWN:
            cells = [str(drafts["gpus"]), str(drafts["batch"]), f"{_layout(drafts)}, L {drafts['length']}"]
            cells += [_figure(drafts["latency_s"]), _figure(fast["ordinary"]["latency_s"]), f"{fast['speed_up']:.2f}"]
            cells += [f"{_layout(other)}, L {other['length']}", _figure(other["images_per_s"])]
            rows.append([*cells, _figure(much["ordinary"]["images_per_s"]), f"{much['speed_up']:.2f}"])
    headers = ["GPUs", "batch", "best for latency", "seconds", "ordinary", "ratio"]
    lines += table([*headers, "best for throughput", "images/s", "ordinary", "ratio"], rows)
    lines += ["The first batch from which on speculation does not pay any more, by layout:", ""]
    rows = []
    for goal, name in GOALS.items():
        for gpus, row in report["crossover"][goal].items():
            shown = ["" if kind not in row else str(row[kind] or f"> {largest}") for kind in ("best", *KINDS)]
            rows.append([name, gpus, *shown])
    lines += table(["goal", "GPUs", "best", *KINDS], rows)
    return "\n".join(lines)


def draw(report: dict[str, Any], path: Path) -> None:
    """Speed-up over the ordinary chain by batch, a curve for each number of GPUs, for both goals."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    inputs = report["inputs"]
    figure.suptitle(("" if inputs["measured"] else "NOT MEASURED, ") + inputs["origin"], fontsize=8, wrap=True)
    for axes, (goal, name) in zip(figure.subplots(1, 2), GOALS.items(), strict=True):
        found = report["choices"][goal]
        counts = list(dict.fromkeys(choice["speculative"]["gpus"] for choice in found))
        for number, gpus in enumerate(counts):
            own = [choice for choice in found if choice["speculative"]["gpus"] == gpus]
            shade = colormaps["viridis"](number / max(1, len(counts) - 1))
            batches = [choice["speculative"]["batch"] for choice in own]
            axes.plot(batches, [x["speed_up"] for x in own], "o-", ms=3, color=shade, label=f"{gpus} GPU")
        axes.axhline(1.0, color="gray", lw=1, ls="--")
        axes.set_xscale("log", base=2)
        axes.set(xlabel="images in the making", ylabel="best speculative over best ordinary", title=name)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def write_report(report: dict[str, Any], out: Path, name: str) -> tuple[Path, Path, Path]:
    """``OUT/NAME.md``, ``OUT/NAME-figures.json`` and ``OUT/NAME.png``."""
    out.mkdir(parents=True, exist_ok=True)
    page = out / f"{name}.md"
    page.write_text(render(report))
    return page, *write_data(report, out, name)


def write_data(report: dict[str, Any], out: Path, name: str) -> tuple[Path, Path]:
    """``OUT/NAME-figures.json`` and ``OUT/NAME.png``."""
    data, picture = out / f"{name}-figures.json", out / f"{name}.png"
    data.write_text(json.dumps(plain(report, 4)) + "\n")
    draw(report, picture)
    return data, picture
