"""Every Gaussian scheduler of diffusers: what it converges to, and how many of its steps a target call commits.

Deviations are those of the last state where the network is exact and the data N(0, 1/4): in closed form from our table,
and of the scheduler's own loop. Steps per call are those of the bundled digits models: a mean over images with its
standard error, for drafts of clean samples ("frozen") and for the learned drafter. Nothing is timed.

Run ``OMP_NUM_THREADS=1 python -m benchmarks.sampler.bench_schedulers --results benchmarks/results`` and the same with
``--page docs/schedulers.md`` for the tables of that page.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.report import store
from benchmarks.sampler.scheduler_laws import GAUSSIAN, MULTISTEP, Chosen, deviation, draws
from free_dit import load_bundled
from free_dit.markdown import fill_page
from free_kernels import sample

LAW_STEPS, STEPS = (10, 50, 200), (20, 50, 100)
DRAWS, IMAGES, LENGTH = 200_000, 100, 6
# The digits were trained with these; TCD, LCM and Euler have others by default.
BETAS = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}


def law(chosen: Chosen, is_gaussian: bool) -> dict[str, Any]:
    """Deviations by number of steps."""
    drawn = [float(draws(chosen, steps, DRAWS).std()) for steps in LAW_STEPS]
    exact = [deviation(chosen, steps) for steps in LAW_STEPS] if is_gaussian else None
    return {"steps": LAW_STEPS, "closed_form": exact, "drawn": drawn, "draws": DRAWS}


def steps_per_call(chosen: Chosen, steps: int) -> dict[str, Any]:
    """Of the digits with each drafter: mean and standard error over images, and the share of drafts accepted."""
    is_flow = "stochastic_sampling" in chosen.settings
    target, learned = load_bundled("digits_sit" if is_flow else "digits")
    schedule = chosen._replace(settings={**chosen.settings, **({} if is_flow else BETAS)}).schedule(steps)
    found: dict[str, Any] = {"images": IMAGES, "draft_length": LENGTH}
    for name, drafter in (("frozen", "frozen"), ("learned", learned)):
        stats = sample(
            target, torch.arange(IMAGES) % 10, schedule=schedule, drafter=drafter, draft_length=LENGTH, seed=1
        ).stats
        ratios = steps / np.asarray(stats.rounds_per_image, dtype=np.float64)
        error = float(ratios.std(ddof=1)) / IMAGES**0.5
        found[name] = {"mean": float(ratios.mean()), "error": error, "acceptance": float(stats.acceptance)}
    return found


def _drawn(deviations: list[float], count: int) -> str:
    """Cells of deviations with their standard error, that of ``count`` normals."""
    return " | ".join(f"{value:.3f} ± {value / (2 * count) ** 0.5:.3f}" for value in deviations)


def law_table(benchmarks: dict[str, Any]) -> str:
    """Markdown of the deviations."""
    lines = ["| scheduler | Gaussian steps | " + " | ".join(f"{steps} steps" for steps in LAW_STEPS) + " |"]
    lines.append("|---" * (2 + len(LAW_STEPS)) + "|")
    for name in (*GAUSSIAN, *MULTISTEP):
        figures = benchmarks[f"law of {name}"]
        # The closed form to its last digit kept; what is drawn to its error.
        exact, drawn = figures["closed_form"], figures["drawn"]
        numbers = " | ".join(f"{value:.4f}"[1:] for value in exact) if exact else _drawn(drawn, figures["draws"])
        lines.append(f"| {name} | {'yes' if figures['closed_form'] else 'no'} | {numbers} |")
    return "\n".join(lines)


def steps_table(benchmarks: dict[str, Any]) -> str:
    """Markdown of the steps per call."""
    lines = ["| scheduler | drafter | " + " | ".join(f"{steps} steps" for steps in STEPS) + " |"]
    lines.append("|---" * (2 + len(STEPS)) + "|")
    for name in GAUSSIAN:
        for drafter in ("frozen", "learned"):
            figures = [benchmarks[f"{name}, {steps} steps"][drafter] for steps in STEPS]
            cells = " | ".join(f"{one['mean']:.2f} ± {one['error']:.2f}" for one in figures)
            lines.append(f"| {name} | {drafter} | {cells} |")
    return "\n".join(lines)


def fill(page: Path, results: Path) -> None:
    """Put the tables into the page."""
    held = store.load(results)["benchmarks"]
    for name, table in (("deviations", law_table(held)), ("steps per call", steps_table(held))):
        fill_page(page, name, table)


def main() -> None:
    """Measure and merge, or fill the page with what has been measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, help="merge figures into RESULTS/cpu/schedulers.json")
    parser.add_argument("--page", type=Path, help="measure nothing: fill this page with the figures")
    arguments = parser.parse_args()
    if arguments.page is not None:
        fill(arguments.page, (arguments.results or store.RESULTS) / "cpu" / "schedulers.json")
        return
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    for name, chosen in tqdm({**GAUSSIAN, **MULTISTEP}.items(), desc="laws"):
        store.Keeper(arguments.results, "schedulers", f"law of {name}").keep("cpu", law(chosen, name in GAUSSIAN))
    for name, chosen in tqdm(GAUSSIAN.items(), desc="steps per call"):
        for steps in STEPS:
            entry = steps_per_call(chosen, steps)
            store.Keeper(arguments.results, "schedulers", f"{name}, {steps} steps").keep("cpu", entry)


if __name__ == "__main__":
    main()
