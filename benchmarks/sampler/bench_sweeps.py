"""Speculative sampling beside sampling by sweeps: ``python -m benchmarks.sampler.bench_sweeps --out OUT``.

Both get the same target, the same steps and the same noise, and are counted by target calls and rows an image. A sweep
that stops at a tolerance leaves an error, which is measured against the ordinary sampler's image from the same noise;
a speculative image is another one of the same law. Counts do not depend on the machine but for rounding.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.sampler.sweeps import sample_by_sweeps
from free_dit import load_bundled
from free_dit.files import write_json
from free_dit.markdown import table
from free_dit.networks.denoiser import DenoiserTarget, photograph_crops
from free_kernels import DDPMSchedule, ancestral_sample, sample
from free_kernels.protocols import Drafter, Target

# Shares of a step's deviation. 0.1 is the default of the public implementation in diffusers (0.19).
TOLERANCES = (0.0, 1e-3, 1e-2, 1e-1)
LENGTHS, STEPS = (6, 12, 24), (250, 50)


def targets(images: int) -> dict[str, tuple[Target, Tensor, dict[str, Drafter | str], str]]:
    """By name: target, labels, drafters and variance."""
    denoiser = DenoiserTarget(photograph_crops(32))
    digits, learned = load_bundled("digits")
    return {
        "denoiser, 3,072 dimensions": (denoiser, torch.zeros(images).long(), {"frozen": "frozen"}, "fixed_small"),
        "digits, 64 dimensions": (digits, torch.arange(images) % 10, {"frozen": "frozen", "learned": learned}, "auto"),
    }


def measured(images: int, seed: int) -> Iterator[dict[str, Any]]:
    """Every sampler on every target."""
    for name, (target, labels, drafters, variance) in targets(images).items():
        for steps in STEPS:
            schedule = DDPMSchedule(steps, variance=variance)
            exact = ancestral_sample(target, labels, schedule=schedule, seed=seed).samples
            for length in LENGTHS:
                case = {"target": name, "steps": steps, "length": length}
                for drafter, one in drafters.items():
                    stats = sample(
                        target, labels, schedule=schedule, drafter=one, draft_length=length, seed=seed, max_slots=1
                    ).stats
                    found = {"calls": stats.target_calls / images, "rows": stats.target_rows / images, "error": None}
                    yield case | {"sampler": f"speculative, {drafter}", "tolerance": None} | found
                for tolerance in TOLERANCES:
                    swept = sample_by_sweeps(target, labels, schedule, window=length, tolerance=tolerance, seed=seed)
                    error = float((swept.samples - exact).square().mean().sqrt())
                    found = {"calls": swept.calls, "rows": swept.rows, "error": error}
                    yield case | {"sampler": "sweeps", "tolerance": tolerance} | found


def render(rows: list[dict[str, Any]]) -> str:
    """A table for each target: calls and rows an image, error of the image."""
    parts = []
    for name in dict.fromkeys(row["target"] for row in rows):
        mine = [row for row in rows if row["target"] == name]
        columns = list(dict.fromkeys((row["steps"], row["length"]) for row in mine))
        kinds = list(dict.fromkeys((row["sampler"], row["tolerance"]) for row in mine))
        body = []
        for kind, tolerance in kinds:
            cells = []
            for steps, length in columns:
                (row,) = (
                    one
                    for one in mine
                    if (one["sampler"], one["tolerance"]) == (kind, tolerance)
                    and (one["steps"], one["length"]) == (steps, length)
                )
                error = "" if row["error"] is None else f", {row['error']:.0e}"
                cells.append(f"{row['calls']:.1f}, {row['rows']:.0f}{error}")
            body.append([kind if tolerance is None else f"{kind}, {tolerance:g}", *cells])
        heading = [name, *(f"{steps} steps, L = {length}" for steps, length in columns)]
        parts.append("\n".join(table(heading, body)))
    return "\n".join(parts)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--seed", type=int, default=7)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for row in measured(asked.images, asked.seed):
        rows.append(row)
        print(row, flush=True)
        write_json(asked.out, {"images": asked.images, "seed": asked.seed, "torch": torch.__version__, "rows": rows})
    print(render(rows))


if __name__ == "__main__":
    main()
