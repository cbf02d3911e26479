"""Figures of the analysis, each a PNG with its numbers as JSON beside it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from free_dit.experiments.analysis import (
    CouplingDraws,
    FeatureDynamics,
    Settings,
    Subject,
    Timeline,
    coupling_draws,
    feature_dynamics,
    parts_of_chain,
    pooled_mean,
    timeline,
    uncertainty_runs,
)
from free_dit.files import plain
from free_dit.networks.families import schedule_for
from free_kernels.validation import check_int, check_writable, fail

# The palette of Okabe and Ito, which colour-blind readers can distinguish.
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#E69F00", "#009E73", "#CC79A7"
VERMILION, SKY, BLACK, GREY = "#D55E00", "#56B4E9", "#000000", "#BBBBBB"
CYCLE = (BLUE, ORANGE, GREEN, PURPLE, VERMILION, SKY, BLACK)
STEP_AXIS = "sampling step k (0 = pure noise)"
# The paper: top-block features are at least this similar over most steps (arXiv 2511.20390, figure 3).
PAPER_SIMILARITY = 0.995
NAMES = ("temporal_similarity", "layer_change", "uncertainty", "reflection_coupling", "timeline")


def write_figures(out: Path, subjects: Sequence[Subject], settings: Settings = Settings()) -> list[Path]:
    """Measure and draw everything into the folder ``out``; all but the uncertainty is about the first subject.

    Returns:
        The PNG files, each with a JSON file of the same stem.

    Raises:
        ValueError, TypeError, OSError: a setting is wrong, or the folder cannot be written.
    """
    if not subjects:
        fail("figures", "model", "at least one", "none")
    check_int("figures", "num", settings.num, 1)
    check_int("figures", "draft_length", settings.draft_length, 2)
    check_int("figures", "steps", settings.steps, settings.draft_length)
    paths = [check_writable("figures", "out", Path(out) / f"{name}.png") for name in NAMES]
    similarity, change, uncertainty, reflection, rounds = paths
    first = subjects[0]
    schedule = schedule_for(first.target, settings.steps)
    labels = [torch.arange(settings.num) % subject.target.num_classes for subject in subjects]
    # First, because wrong settings raise an error here, before the slow measurements.
    runs = uncertainty_runs(subjects, labels, settings)
    draw_uncertainty(uncertainty, runs, [subject.title for subject in subjects], settings)
    dynamics = feature_dynamics(first.target, schedule, labels[0], settings.seed, progress=True)
    draw_similarity(similarity, dynamics, first.title, settings)
    draw_change(change, dynamics, first.title, settings)
    draw_coupling(reflection, coupling_draws(settings.gap, settings.draws, settings.seed))
    lines = {
        kind: timeline(
            first.target, schedule, labels[0][: settings.shown], drafter, settings.draft_length, settings.seed, True
        )
        for kind, drafter in first.drafters.items()
    }
    draw_timeline(rounds, lines, first.title, settings)
    return paths


def draw_similarity(path: Path, dynamics: FeatureDynamics, model: str, settings: Settings) -> None:
    """Heat map of every block over the chain, and the lines of the top block and the predicted noise."""
    blocks, pairs = dynamics.similarity.shape
    top, output = dynamics.similarity[-1], dynamics.output_similarity
    figure, (upper, lower) = plt.subplots(2, 1, figsize=(8.5, 7), sharex=True, layout="constrained")
    # Without this limit a few very dissimilar steps at the ends would determine the colour range.
    low = math.floor(1000 * np.quantile(dynamics.similarity, 0.02)) / 1000
    edges = np.arange(pairs + 1) + 0.5
    mesh = upper.pcolormesh(
        edges, np.arange(blocks + 1) + 0.5, dynamics.similarity, cmap="cividis", vmin=min(low, 0.999), vmax=1.0
    )
    figure.colorbar(mesh, ax=upper, extend="min", label="cosine similarity", pad=0.01)
    upper.set(ylabel="block (top block last)", title="Block outputs, mean over images")
    upper.yaxis.set_major_locator(MaxNLocator(integer=True))
    steps = np.arange(1, pairs + 1)
    for values, name, colour in ((top, f"top block ({blocks})", BLUE), (output, "predicted noise", VERMILION)):
        share = float((values >= PAPER_SIMILARITY).mean())
        label = f"{name}: {share:.0%} of steps at least {PAPER_SIMILARITY}"
        lower.plot(steps, 1 - values, color=colour, label=label)
    lower.axhline(1 - PAPER_SIMILARITY, color="grey", linestyle=":", linewidth=1)
    lower.set(
        yscale="log",
        xlabel=f"{STEP_AXIS}; similarity of steps k - 1 and k",
        ylabel="1 - cosine similarity\n(up: less alike)",
        title="Top block and network output",
    )
    lower.grid(alpha=0.3)
    lower.legend(loc="best")
    figure.suptitle(f"Temporal similarity of consecutive steps ({model}; {settings.num} images, unguided)")
    _write(figure, path, model, settings, dynamics={"similarity": dynamics.similarity, "output_similarity": output})


def draw_change(path: Path, dynamics: FeatureDynamics, model: str, settings: Settings) -> None:
    """In-layer change of every block, early against late part of the chain: relative and absolute."""
    blocks, num_steps = dynamics.change.shape
    parts = dict(zip(("early", "late"), parts_of_chain(num_steps, settings.part), strict=True))
    panels = {
        "relative_change": ("Relative to the input", "||out - in|| / ||in||", dynamics.relative_change),
        "change": ("Absolute", "||out - in||", dynamics.change),
    }
    data = {
        name: {part: values[:, steps].mean(1) for part, steps in parts.items()} for name, (*_, values) in panels.items()
    }
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    positions = np.arange(1, blocks + 1)
    for one, (name, (title, label, _)) in zip(axes, panels.items(), strict=True):
        for (part, steps), offset, colour in zip(parts.items(), (-0.2, 0.2), (BLUE, ORANGE), strict=True):
            legend = f"{part}: steps {steps.start} to {steps.stop - 1}"
            one.bar(positions + offset, data[name][part], width=0.4, color=colour, label=legend)
        one.set(xlabel="block (top block last)", ylabel=label, title=title)
        one.set_xlim(0.4, blocks + 0.6)
        one.xaxis.set_major_locator(MaxNLocator(integer=True))
        one.grid(axis="y", alpha=0.3)
        one.set_axisbelow(True)
    axes[0].legend(loc="best")
    figure.suptitle(f"What each block changes ({model}; {settings.num} images, unguided)")
    ranges = {part: [steps.start, steps.stop] for part, steps in parts.items()}
    whole = {"relative_change_by_step": dynamics.relative_change, "change_by_step": dynamics.change}
    _write(figure, path, model, settings, steps=ranges, **data, **whole)


def draw_uncertainty(path: Path, runs: list[dict[str, Any]], titles: list[str], settings: Settings) -> None:
    """Uncertainty over acceptance, a column for each guidance scale; colour: the model, dashes: the drafter."""
    scales = list(dict.fromkeys(run["guidance_scale"] for run in runs))
    names = list(dict.fromkeys(run["model"] for run in runs))
    kinds = list(dict.fromkeys(run["drafter"] for run in runs))
    several = len(names) > 1
    styles = {"frozen": "--", "learned": "-"}
    figure, axes = plt.subplots(
        2,
        len(scales),
        figsize=(1.5 + 3.6 * len(scales), 6.5),
        sharex=True,
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    for run in runs:
        column = scales.index(run["guidance_scale"])
        # With one model, colours also distinguish its drafters.
        colour = CYCLE[(names.index(run["model"]) if several else kinds.index(run["drafter"])) % len(CYCLE)]
        title = titles[names.index(run["model"])].partition(" parameters")[0]
        label = f"{run['drafter']} drafter"
        label = f"{title}, {label}" if several else label
        steps = np.arange(len(run["tested"]))
        # A geometric mean, because deviations span decades: the largest would dominate an arithmetic mean.
        logs = np.log(np.maximum(run["uncertainty"], np.finfo(float).tiny))
        share = run["accepted"] / np.maximum(run["tested"], 1)
        curves = (
            np.exp(pooled_mean(logs, run["tested"], settings.window)),
            pooled_mean(share, run["tested"], settings.window),
        )
        for row, curve in enumerate(curves):
            axes[row, column].plot(steps, curve, color=colour, linestyle=styles[run["drafter"]], label=label)
    for column, scale in enumerate(scales):
        axes[0, column].set(yscale="log", title=f"guidance scale {scale:g}")
        axes[1, column].set(ylim=(-0.03, 1.03), xlabel=STEP_AXIS)
    axes[0, 0].set_ylabel("uncertainty (squared whitened\ndeviation, summed over the latent)")
    axes[1, 0].set_ylabel("accepted share of tested drafts")
    for one in axes.flat:
        one.grid(alpha=0.3)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2 if several else len(labels), frameon=False)
    about = "several models" if several else titles[0]
    figure.suptitle(
        f"Uncertainty and acceptance of drafts ({about})\n{settings.num} images, draft length "
        f"{settings.draft_length}, means over {settings.window} steps (geometric for the uncertainty)",
        fontsize="medium",
    )
    _write(figure, path, titles, settings, runs=runs)


def draw_coupling(path: Path, draws: CouplingDraws) -> None:
    """Histograms of drafts under p and of committed states under q, and committed state against draft."""
    # Slow to import, and no other command needs it.
    from scipy import stats as statistics

    test = statistics.kstest(draws.committed.astype(float), "norm", (draws.gap, 1.0))
    share = float(draws.accepted.mean())
    grid = np.linspace(-3.8, draws.gap + 3.8, 400)
    p, q = statistics.norm.pdf(grid), statistics.norm.pdf(grid, draws.gap)
    edges = np.linspace(grid[0], grid[-1], 61)
    weight = 1 / (len(draws.drafts) * (edges[1] - edges[0]))
    colours = {"accepted": GREEN, "refused": SKY, "reflected": ORANGE}
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.4), layout="constrained")
    counts = {}
    histograms = (
        (axes[0], draws.drafts, "refused", "Drafts, drawn from p"),
        (axes[2], draws.committed, "reflected", "Committed states, distributed as q"),
    )
    for one, values, other, title in histograms:
        split = [values[draws.accepted], values[~draws.accepted]]
        names = ("accepted", other)
        heights, _, _ = one.hist(
            split,
            bins=edges,
            weights=[np.full(len(part), weight) for part in split],
            stacked=True,
            color=[colours[name] for name in names],
            label=[f"{name} ({len(part) / len(values):.3f})" for name, part in zip(names, split, strict=True)],
        )
        counts[other] = {"accepted": heights[0], "total": heights[1]}
        one.plot(grid, p, color=BLACK, linestyle="--", label="p: draft density")
        one.plot(grid, q, color=BLACK, label="q: target density")
        one.set(xlabel="state (standard deviations)", ylabel="probability density", title=title)
        one.set_ylim(0, 1.55 * p.max())
    axes[0].plot(grid, np.minimum(p, q), color=VERMILION, linewidth=2.2, label="min(p, q)")
    chosen = slice(0, 1500)
    kept = draws.accepted[chosen]
    for mask, name in ((kept, "accepted"), (~kept, "reflected")):
        pair = (draws.drafts[chosen][mask], draws.committed[chosen][mask])
        axes[1].scatter(*pair, s=5, color=colours[name], label=f"{name}: " + _LAWS[name])
    axes[1].axvline(draws.gap / 2, color="grey", linestyle=":", linewidth=1, label="midpoint, gap / 2")
    axes[1].set(
        xlabel="draft y (standard deviations)",
        ylabel="committed state (standard deviations)",
        title="Where a draft goes",
        aspect="equal",
    )
    axes[1].margins(y=0.45)
    for one in axes:
        one.legend(loc="upper left", fontsize="small", ncols=1 if one is axes[1] else 2)
    figure.suptitle(
        f"Reflection maximal coupling, gap {draws.gap:g} std: accepted {share:.4f} of {len(draws.drafts):,} drafts, "
        f"2 Phi(-gap / 2) = {draws.expected_acceptance:.4f}; committed states against q: KS p = {test.pvalue:.2f}"
    )
    _write(
        figure,
        path,
        gap=draws.gap,
        draws=len(draws.drafts),
        accepted_share=share,
        expected_acceptance=draws.expected_acceptance,
        ks_p_value=float(test.pvalue),
        bin_edges=edges,
        draft_density={"accepted": counts["refused"]["accepted"], "all": counts["refused"]["total"]},
        committed_density={"accepted": counts["reflected"]["accepted"], "all": counts["reflected"]["total"]},
    )


_LAWS = {"accepted": "y itself", "reflected": "gap - y"}
_MARKS = {
    "accepted": (GREEN, "draft accepted"),
    "refused": (ORANGE, "draft refused, reflected"),
    "direct": (BLUE, "drawn from the target (no draft)"),
    "discarded": (GREY, "draft discarded"),
}


def draw_timeline(path: Path, lines: dict[str, Timeline], model: str, settings: Settings) -> None:
    """Steps against rounds, then the rows of every round of every image, bottom row first."""
    panels = [(kind, image, rounds) for kind, line in lines.items() for image, rounds in enumerate(line.images)]
    heights = [2.6] + [1.0] * len(panels)
    figure, axes = plt.subplots(
        len(heights),
        1,
        figsize=(11, 1.2 + 1.15 * sum(heights)),
        sharex=True,
        height_ratios=heights,
        layout="constrained",
    )
    longest = max(rounds[-1].round + 1 for _, _, rounds in panels)
    steps = next(iter(lines.values())).num_steps
    axes[0].plot([0, longest], [0, longest], color=BLACK, linestyle=":", label="ordinary sampler: a step a call")
    for kind, image, rounds in panels:
        done = [0] + [one.first_step + one.committed for one in rounds]
        colour = (VERMILION, PURPLE, SKY)[list(lines).index(kind)]
        label = f"{kind} drafter: {steps / np.mean([len(r) for r in lines[kind].images]):.2f} steps a round"
        axes[0].plot(range(len(done)), done, color=colour, alpha=0.8, label=None if image else label)
    axes[0].set(ylabel="steps committed", ylim=(0, 1.03 * steps), xlim=(-0.5, longest + 0.5))
    axes[0].grid(alpha=0.3)
    axes[0].legend(loc="best")
    for one, (kind, image, rounds) in zip(axes[1:], panels, strict=True):
        bottom = np.zeros(len(rounds))
        for mark, (colour, _) in _MARKS.items():
            height = np.array([_rows(each, mark) for each in rounds], dtype=float)
            one.bar([each.round for each in rounds], height, bottom=bottom, width=0.85, color=colour, align="edge")
            bottom += height
        one.set_ylabel(f"{kind}\nimage {image}\nrows")
        one.set_ylim(0, settings.draft_length + 0.2)
        one.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes[-1].set_xlabel("round (one packed target call)")
    handles = [Patch(color=colour, label=label) for colour, label in _MARKS.values()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.suptitle(f"Rounds of single images ({model}; {steps} steps, draft length {settings.draft_length}, unguided)")
    data = {
        kind: {
            "columns": ["round", "first_step", "rows", "committed"],
            "images": [[[r.round, r.first_step, r.rows, r.committed] for r in rounds] for rounds in line.images],
            "rounds_per_image": line.stats.rounds_per_image,
            "acceptance": line.stats.acceptance,
        }
        for kind, line in lines.items()
    }
    _write(figure, path, model, settings, drafters=data)


def _rows(one: Any, mark: str) -> int:
    """Rows of a round with a mark; all marks together are its rows, without the last one if a draft was refused."""
    return 1 - one.refused if mark == "direct" else getattr(one, mark)


def _write(
    figure: plt.Figure, path: Path, model: str | list[str] | None = None, settings: Settings | None = None, **data: Any
) -> None:
    """Save the figure, and its numbers as JSON beside it, a line for each key."""
    figure.savefig(path, dpi=130)
    plt.close(figure)
    known = {"model": model, "settings": settings, **data}
    rows = [f"{json.dumps(key)}: {json.dumps(plain(value))}" for key, value in known.items() if value is not None]
    path.with_suffix(".json").write_text("{\n" + ",\n".join(rows) + "\n}\n")
