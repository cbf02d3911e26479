"""Ways to sample against one another: fixed and automatic draft lengths, relaxation, a useless drafter.

All samplers run one after the other, in a new order each turn, on the bundled digits DiT with the same seed a turn; the
figure of each is the median over turns of the ordinary sampler's time over its own, which two runs in every turn tell.
Turns to warm up, in which "auto" learns what rounds cost and what is accepted, are not counted; the first call of
all is kept apart. Run ``python -m benchmarks.sampler.bench_modes --results benchmarks/results``.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.report import store
from free_dit import load_bundled
from free_kernels import DDPMSchedule, SampleStats, ancestral_sample, sample
from free_kernels.conditioning import hoisted
from free_kernels.protocols import Drafter

STRENGTHS = (4.0, 16.0, 64.0)
LENGTHS = (2, 4, 6, 8, 10, 12)
# Batch, steps, turns to warm up and counted, fixed draft lengths.
CASES = ((1, 250, 3, 40, LENGTHS), (64, 250, 1, 4, LENGTHS[:3]), (1, 100, 3, 40, LENGTHS), (1, 50, 3, 40, LENGTHS))


class UselessDrafter:
    """The bundled drafter's work, thrown away: its features are random.

    Args:
        drafter: whose calls are made.
    """

    def __init__(self, drafter: Drafter) -> None:
        self._drafter = drafter
        self._generator = torch.Generator().manual_seed(1)

    def __call__(self, feature: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        """Random features; as dear as the drafter's own."""
        return torch.randn(feature.shape, generator=self._generator).copysign_(self._drafter(feature, *rest))

    def hoisted(self, timesteps: torch.Tensor, labels: torch.Tensor) -> UselessDrafter:
        """As the drafter's."""
        return UselessDrafter(hoisted(self._drafter, timesteps, labels))  # type: ignore[arg-type]


def samplers(batch: int, steps: int, lengths: tuple[int, ...]) -> dict[str, Callable[[int], SampleStats]]:
    """Every sampler by name, as a function of the seed; the ordinary one twice."""
    target, drafter = load_bundled("digits")
    labels, schedule = torch.arange(batch) % target.num_classes, DDPMSchedule(steps)

    def ordinary(seed: int) -> SampleStats:
        return ancestral_sample(target, labels, schedule=schedule, seed=seed).stats

    def speculative(length: int | str, chosen: Drafter = drafter, **settings: Any) -> Callable[[int], SampleStats]:
        settings |= {"schedule": schedule, "drafter": chosen, "draft_length": length}
        return lambda seed: sample(target, labels, seed=seed, **settings).stats

    found = {"ordinary": ordinary, "ordinary again": ordinary}
    found |= {f"L = {length}": speculative(length) for length in lengths}
    longest = lengths[-1]
    found[f"L = {longest}, block"] = speculative(longest, verification="block")
    if longest == LENGTHS[-1]:
        found |= {f"L = {longest}, relaxed {value:g}": speculative(longest, relaxation=value) for value in STRENGTHS}
    found["auto"] = speculative("auto")
    found["auto, block"] = speculative("auto", verification="block")
    return found | {"auto, useless drafter": speculative("auto", UselessDrafter(drafter))}


def measure(batch: int, steps: int, warm_up: int, turns: int, lengths: tuple[int, ...]) -> dict[str, Any]:
    """Figures of every sampler at a batch and a number of steps."""
    runs, order = samplers(batch, steps, lengths), random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    reductions: dict[str, list[float]] = {name: [] for name in runs}
    for turn in tqdm(range(turns + warm_up), desc=f"batch {batch}, {steps} steps", unit="turn"):
        for name in order.sample(sorted(runs), len(runs)):
            stats = runs[name](turn)
            seconds[name].append(stats.elapsed_s)
            reductions[name].append(stats.call_reduction)
    ordinary = (np.array(seconds["ordinary"]) + np.array(seconds["ordinary again"])) / 2
    figures = {}
    for name in runs:
        ratios = ordinary / np.array(seconds[name])
        low, middle, high = np.quantile(ratios[warm_up:], [0.25, 0.5, 0.75])
        figures[name] = {
            "ratio": float(middle),
            "quartiles": [float(low), float(high)],
            "first_call": float(ratios[0]),
            "call_reduction": float(np.mean(reductions[name][warm_up:])),
        }
    return {
        "batch": batch,
        "steps": steps,
        "turns": turns,
        "threads": torch.get_num_threads(),
        "ordinary_s": float(np.median(ordinary[warm_up:])),
        "samplers": figures,
    }


def main() -> None:
    """Measure, print and merge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, help="merge figures into RESULTS/cpu/modes.json")
    parser.add_argument("--cases", type=int, nargs="*", default=list(range(len(CASES))), help=f"numbers in {CASES}")
    parser.add_argument("--turns", type=int, help="counted turns, instead of the case's own")
    arguments = parser.parse_args()
    for batch, steps, warm_up, turns, lengths in (CASES[number] for number in arguments.cases):
        entry = measure(batch, steps, warm_up, arguments.turns or turns, lengths)
        store.Keeper(arguments.results, "modes", f"batch {batch}, {steps} steps").keep("cpu", entry)
        for name, figures in entry["samplers"].items():
            print(f"batch {batch}, {steps} steps, {name}: {store.rounded(figures)}", flush=True)


if __name__ == "__main__":
    main()
