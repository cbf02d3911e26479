"""Tables and a picture of what :mod:`free_dit.experiments.sweep` measured."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from free_dit.generation import UNDRAFTED
from free_dit.markdown import table

METRIC = "Frechet distance in digits-classifier features"
_MARKERS = {"ordinary": "s", "ddim": "D", "lossless": "o", "relaxed": "^"}


def _kind(cell: dict[str, Any]) -> str:
    if cell["drafter"] in UNDRAFTED:
        return "ordinary" if cell["drafter"] == "none" else "ddim"
    return "relaxed" if cell["relaxation"] else "lossless"


def _chain(cell: dict[str, Any]) -> tuple[str, str]:
    return str(cell["num_steps"]), f"{cell['guidance']:g}"


def _name(cell: dict[str, Any]) -> str:
    if cell["drafter"] in UNDRAFTED:
        return {"none": "ordinary", "ddim": "DDIM, eta 0"}[cell["drafter"]]
    relaxed = f", relaxed {cell['relaxation']:g}" if cell["relaxation"] else ""
    return f"{cell['drafter']}, {cell['verification']}, L {cell['draft_length']}{relaxed}"


def _interval(estimate: dict[str, float], digits: int) -> str:
    return f"{estimate['value']:.{digits}f} ({estimate['low']:.{digits}f} to {estimate['high']:.{digits}f})"


def _reduction(record: dict[str, Any]) -> str:
    error = record["call_reduction_se"]
    return f"{record['call_reduction']:.2f}" + ("" if error is None else f" ± {error:.2f}")


def _speed(record: dict[str, Any]) -> str:
    ratio = record["wall_clock"]
    return "" if ratio is None else f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"


def _by_length(records: list[dict[str, Any]], figure: Any) -> list[str]:
    """Lossless cells: a row for each chain, drafter and verification, a column for each draft length."""
    lengths = {record["cell"]["draft_length"] for record in records}
    columns = sorted(length for length in lengths if length != "auto") + ["auto"] * ("auto" in lengths)
    rows: dict[tuple[str, ...], dict[Any, str]] = {}
    for record in records:
        cell = record["cell"]
        row = rows.setdefault((*_chain(cell), cell["drafter"], cell["verification"]), {})
        row[cell["draft_length"]] = figure(record)
    headers = ["steps", "guidance", "drafter", "verification", *(f"L {length}" for length in columns)]
    return table(headers, ([*names, *(row.get(length, "") for length in columns)] for names, row in rows.items()))


def _quality_rows(report: dict[str, Any], records: list[dict[str, Any]]) -> Iterable[list[str]]:
    def quality_cells(quality: dict[str, Any]) -> list[str]:
        distances = [f"{quality['frechet_sampled']:.2f}", _interval(quality["frechet"], 2)]
        return [str(quality["images"]), _interval(quality["accuracy"], 3), *distances]

    yield ["", "", "real training digits", "", *quality_cells(report["real"]["training_digits"])]
    for record in records:
        if record["quality"] is not None:
            calls = f"{record['calls_per_image']:.1f}"
            yield [*_chain(record["cell"]), _name(record["cell"]), calls, *quality_cells(record["quality"])]


def render(report: dict[str, Any]) -> str:
    """The sweep's tables as Markdown."""
    settings, real, records = report["settings"], report["real"], report["cells"]
    lossless = [record for record in records if _kind(record["cell"]) == "lossless"]
    relaxed = [record for record in records if _kind(record["cell"]) == "relaxed"]
    lines = [
        "# Calls, wall-clock, bias and quality of the digits pair",
        "",
        f"Measured with `python -m free_dit sweep` on {settings['cpu']} ({settings['threads']} threads, torch "
        f"{settings['torch']}), free_kernels {settings['version']}, seed {settings['seed']}, "
        f"{len(records)} configurations of model `{settings['model_sha256'][:12]}` and drafter "
        f"`{settings['drafter_sha256'][:12]}`.",
        "",
        f"Quality is measured on {settings['num']} images of a configuration, calls on as many where quality is, else "
        f"on {settings['num_calls']}. Lossless configurations have the ordinary sampler's law, so that the quality of "
        'some stands for all. "auto" draws one image at a time, as where it is timed.',
        "",
    ]
    if lossless:
        lines += ["## Lossless: call reduction", "", "Steps committed per round, ± its standard error.", ""]
        lines += _by_length(lossless, _reduction)
        if any(record["wall_clock"] for record in lossless):
            lines += [
                "## Lossless: speed against the ordinary sampler",
                "",
                f"Wall-clock of the ordinary sampler over the speculative one at batch 1, median (range) over "
                f"interleaved pairs ({settings['timing_pairs']}, after one to warm up); above 1 speculation is faster.",
                "",
                *_by_length(lossless, _speed),
            ]
    if relaxed:
        # Each relaxed run beside the lossless run of the same settings.
        strict = [record["cell"] | {"relaxation": 0.0, "quality": None} for record in relaxed]
        beside = [r for r in records if r in relaxed or r["cell"] | {"quality": None} in strict]
        beside.sort(key=lambda r: (-r["cell"]["num_steps"], str(r["cell"]["draft_length"]), r["cell"]["relaxation"]))
        headers = ["steps", "guidance", "configuration", "call reduction", "speed, batch 1", "bias bound"]
        lines += [
            "## Relaxed",
            "",
            "Each beside the lossless run of the same draft length. The bias bound is the mean over images of a bound "
            "on the total variation from the exact sampler: 1 or "
            "more says nothing. Speed as above.",
            "",
            *table(
                headers,
                (
                    [*_chain(r["cell"]), _name(r["cell"]), _reduction(r), _speed(r), f"{r['bias_bound']:.3f}"]
                    for r in beside
                ),
            ),
        ]
    headers = ["steps", "guidance", "sampler", "target calls", "images", "class accuracy (95 %)", "sampled"]
    lines += [
        "## Quality",
        "",
        f"{METRIC} (a small classifier's 16 features; not an Inception network's) against "
        f"{real['held_out_images']} held-out real digits: as sampled, which is biased upwards, and without the bias, "
        f"with a basic bootstrap interval of {settings['resamples']} resamples of both sets within classes. An "
        "estimate without bias may be negative. The held-out digits are the same for all rows, so intervals of rows "
        "overlap more than their difference warrants. Class accuracy is the classifier's, with Wilson's interval; on "
        f"the held-out digits it is {_interval(real['held_out_accuracy'], 3)}. It was trained on the training digits.",
        "",
        *table([*headers, "without bias (95 %)"], _quality_rows(report, records)),
    ]
    return "\n".join(lines).rstrip() + "\n"


def plot(report: dict[str, Any], path: Path) -> None:
    """Scatter of calls and of speed against Frechet distance, at the guidance of the first cell with quality.

    Calls are counted against that chain's number of steps, which puts ordinary samplers of fewer steps on the same
    axis; speed is shown for that number of steps only.
    """
    records = [record for record in report["cells"] if record["quality"] is not None]
    figure = Figure(figsize=(12.5, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    if records:
        steps, guidance = records[0]["cell"]["num_steps"], records[0]["cell"]["guidance"]
        shown = [record for record in records if record["cell"]["guidance"] == guidance]
        for index, record in enumerate(shown):
            cell, colour = record["cell"], colormaps["tab20"](index % 20)
            _point(left, steps / record["calls_per_image"], record, colour)
            if cell["num_steps"] == steps and (record["wall_clock"] or cell["drafter"] == "none"):
                _point(right, record["wall_clock"]["median"] if record["wall_clock"] else 1.0, record, colour)
        left.set_xscale("log", base=2)
        left.xaxis.set_major_formatter(ScalarFormatter())
        left.set(xlabel=f"{steps} over target calls per image", ylabel=f"{METRIC},\nbias removed, 95 % interval")
        right.set(xlabel=f"speed against the ordinary sampler of {steps} steps, batch 1")
        figure.suptitle(f"Digits, guidance {guidance:g}, {report['settings']['num']} images a point")
        figure.legend(*left.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    for axes in (left, right):
        axes.axhline(0.0, color="grey", linewidth=0.8)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


def _point(axes: Any, x: float, record: dict[str, Any], colour: Any) -> None:
    cell, distance = record["cell"], record["quality"]["frechet"]
    axes.errorbar(
        x,
        distance["value"],
        yerr=[[distance["value"] - distance["low"]], [distance["high"] - distance["value"]]],
        fmt=_MARKERS[_kind(cell)],
        color=colour,
        capsize=2,
        label=f"{_name(cell)}, {cell['num_steps']} steps",
    )


def write_report(report: dict[str, Any], out: Path) -> list[Path]:
    """Write ``sweep.md`` and ``sweep.png`` into a folder.

    Raises:
        ValueError: a figure is missing or of another kind.
    """
    paths = [Path(out) / "sweep.md", Path(out) / "sweep.png"]
    try:
        text = render(report)
        plot(report, paths[1])
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        found = f"{type(error).__name__}: {error}"
        raise ValueError(f"sweep: {Path(out) / 'sweep.json'} must hold a whole sweep, got {found}") from error
    paths[0].write_text(text)
    return paths
