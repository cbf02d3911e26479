"""Steps per call of drafts from clean samples: ``python -m benchmarks.sampler.bench_carried --out OUT``.

The frozen drafter on the bundled pairs and on the exact denoiser of photograph crops, one run a case. Other builds are
checkouts with the extension built in place, ``--build NAME=PATH``; every build draws the same cases in a process of its
own. Counts do not depend on the machine but for rounding.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch

# Rows of the page: a bundled pair and its guidance, or the side of a crop; and what they are called.
TARGETS = {
    ("digits", 1.0): "digits (64)",
    ("digits", 4.0): "digits, guidance 4 (64)",
    ("digits_sit", 1.0): "digits_sit (64)",
    (16, 1.0): "photograph denoiser (768)",
    (32, 1.0): "photograph denoiser (3,072)",
    (64, 1.0): "photograph denoiser (12,288)",
}
# Steps and draft lengths: the page's columns.
COLUMNS = ((50, 6), (50, 12), (250, 6), (250, 12), (250, 24))


def study() -> Any:
    """The study by dimension, by file: a process of another build would import that build's."""
    spec = importlib.util.spec_from_file_location("bench_dimension", Path(__file__).with_name("bench_dimension.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cases() -> list[dict[str, Any]]:
    """All cases, but for columns that a row leaves empty."""
    found = []
    for target, guidance in TARGETS:
        for steps, length in COLUMNS:
            of_digits = isinstance(target, str)
            if not (of_digits and length == 24) and not (target == 64 and steps == 50):
                images, seed = (16, 77) if of_digits else (4, 7)
                case = {"target": target, "guidance": guidance, "steps": steps, "length": length}
                found.append(case | {"images": images, "seed": seed})
    return found


def measured(asked: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The cases with this process's build."""
    from free_dit import load_bundled
    from free_kernels import DDPMSchedule, FlowSDESchedule, sample

    dimension = study()
    denoisers = dimension.denoiser_module()

    @cache
    def target_of(name: str | int) -> Any:
        if isinstance(name, str):
            return load_bundled(name)[0]
        return denoisers.DenoiserTarget(denoisers.photograph_crops(name))

    for case in asked:
        steps, of_digits = case["steps"], isinstance(case["target"], str)
        schedule = FlowSDESchedule(steps) if case["target"] == "digits_sit" else DDPMSchedule(steps)
        if not of_digits:
            schedule = DDPMSchedule(steps, variance="fixed_small")
        labels = torch.arange(case["images"]) % 10 if of_digits else torch.zeros(case["images"], dtype=torch.int64)
        settings = {"schedule": schedule, "drafter": "frozen", "draft_length": case["length"], "seed": case["seed"]}
        result = sample(target_of(case["target"]), labels, guidance_scale=case["guidance"], **settings)
        yield case | dimension.described(result.stats, steps)


def page(rows: list[dict[str, Any]], builds: list[str]) -> str:
    """Steps per call of all builds, in their order."""
    from free_dit.markdown import table

    by_case = {
        (row["target"], row["guidance"], row["steps"], row["length"], row["build"]): row["steps_per_call"]
        for row in rows
    }
    lines = []
    for target, name in TARGETS.items():
        cells = []
        for column in COLUMNS:
            figures = [by_case.get((*target, *column, build)) for build in builds]
            cells.append("" if None in figures else ", ".join(f"{figure:.2f}" for figure in figures))
        lines.append([name, *cells])
    heads, last = [], None
    for steps, length in COLUMNS:
        heads.append(f"L = {length}" if steps == last else f"{steps} steps, L = {length}")
        last = steps
    return "\n".join(table(["target (dimension)", *heads], lines))


def main() -> None:
    """Measure, and write the JSON and the table of the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--page", type=Path, help="whose table is renewed")
    parser.add_argument(
        "--build", action="append", default=[], metavar="NAME=PATH", help="another checkout, which is shown before"
    )
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        torch.set_num_threads(1)
        for row in measured(json.load(sys.stdin)):
            print(json.dumps(row), flush=True)
        return
    if asked.out is None:
        parser.error("--out is needed")
    from free_dit.files import write_json
    from free_dit.markdown import fill_page

    dimension = study()
    builds = [*(build.split("=", 1) for build in asked.build), ("here", str(dimension.ROOT))]
    rows = []
    for name, path in builds:
        for row in dimension.run_build(Path(__file__).resolve(), Path(path).resolve(), cases(), []):
            rows.append(row | {"build": name})
            print(f"{name:8s} {row['target']!s:10s} {row['steps']:4d} steps, L = {row['length']:2d}", end=" ")
            print(f"{row['steps_per_call']:.2f}", flush=True)
    names = [name for name, _ in builds]
    write_json(asked.out, {"builds": names, "rows": rows})
    if asked.page is not None:
        fill_page(asked.page, "carried", page(rows, names))
    print(page(rows, names))


if __name__ == "__main__":
    main()
