"""Bytes for each image in the making, by formula and measured: ``python -m benchmarks.sampler.bench_memory --out OUT``.

Measured is the most that a run on the CPU had alive at once, divided by its slots, with a target and a drafter of the
shapes in question that allocate nothing but what they return: a network's own activations come on top. No kernel runs.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmarks.sampler.live_bytes import LiveBytes
from benchmarks.sampler.shapes import SHAPES, Shape, ShapedDrafter, ShapedTarget
from free_dit.files import write_json
from free_dit.markdown import fill_page, table
from free_kernels import DDPMSchedule, estimate_memory, sample
from free_kernels.sampling.cuda_graphs import row_bucket

STEPS = 30


def measure(shape: Shape, length: int, learned: bool, **settings: Any) -> dict[str, Any]:
    """Formula and measurement of a run."""
    settings |= {
        "schedule": DDPMSchedule(STEPS),
        "drafter": ShapedDrafter() if learned else "frozen",
        "draft_length": length,
        "guidance_scale": shape.guidance,
    }
    target = ShapedTarget(shape)
    estimate = estimate_memory(target, **settings)
    labels = torch.arange(shape.slots) % target.num_classes
    with LiveBytes() as alive:
        sample(target, labels, max_slots=shape.slots, **settings)
    return {
        "shape": shape.name,
        "drafter": "learned" if learned else "frozen",
        "draft_length": length,
        "reuse_refused": settings.get("reuse_refused", True),
        "slots": shape.slots,
        "bytes_per_slot": estimate.as_dict(),
        "measured_peak_per_slot": alive.peak / shape.slots,
        "measured_peak": alive.peak,
        "graphs": graphs(length, shape.slots),
    }


def graphs(length: int, slots: int) -> int:
    """How many CUDA graphs a run may capture: rounds of one row a slot, and of L with few numbers of rows in all."""
    return 1 + len({row_bucket(rows, length * slots) for rows in range(1, length * slots + 1)})


def page(cases: list[dict[str, Any]]) -> str:
    """The table as Markdown: bytes for each slot."""
    parts = ("states", "parent", "refused_rows", "drafts", "noise", "drafting", "verification", "peak")
    header = ["shape", "drafter", "L", "reuse", *(part.replace("_", " ") for part in parts)]
    header += ["measured", "all slots, GiB", "CUDA graphs"]
    rows = []
    for case in cases:
        sizes = [case["bytes_per_slot"][part] for part in parts] + [case["measured_peak_per_slot"]]
        unit = 1024.0 if case["shape"] == "digits" else 1024.0**2
        name = f"{case['shape']} ({'KiB' if unit == 1024.0 else 'MiB'})"
        how = [name, case["drafter"], str(case["draft_length"]), "yes" if case["reuse_refused"] else "no"]
        total = f"{case['measured_peak'] / 1024**3:.2g}"
        rows.append([*how, *(f"{size / unit:.2f}" for size in sizes), total, str(case["graphs"])])
    return "\n".join(table(header, rows))


def main() -> None:
    """Measure, and write ``memory.json`` and the table of the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--page", type=Path, help="whose table is renewed")
    arguments = parser.parse_args()
    cases = []
    for shape in SHAPES:
        for length in (6, 12):
            for learned in (False, True):
                cases.append(measure(shape, length, learned))
                print(page(cases[-1:]).splitlines()[2], flush=True)
        cases.append(measure(shape, 12, True, reuse_refused=False))
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out / "memory.json", {"steps": STEPS, "cases": cases})
    if arguments.page is not None:
        fill_page(arguments.page, "memory", page(cases))


if __name__ == "__main__":
    main()
