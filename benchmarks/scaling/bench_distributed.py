"""Two processes against one on the bundled digits pair, measured beside the scale model's prediction.

Run ``OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 benchmarks/scaling/bench_distributed.py``; writes
``docs/scale/measured.json`` and renews the tables of ``docs/scale-model.md``. First the model's inputs are measured
here, then one process, two that share the images and two that share the rows take turns on the same seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from free_dit.configuration import CONFIGS
from free_dit.experiments.network_calls import NetworkCalls
from free_dit.experiments.scale.link import link_cost_and_slowdown
from free_dit.experiments.scale.measure import measure
from free_dit.experiments.scale.page import build_report, render, write_data
from free_dit.experiments.scale.prediction import Inputs, Layout, predict, read_inputs
from free_dit.loading import load_target
from free_dit.markdown import fill_page, table
from free_kernels import DDPMSchedule, SampleResult, sample
from free_kernels.distributed import api as distributed

DOCS = Path(__file__).resolve().parents[2] / "docs"
MODES = {"one process": Layout(1, 1), "data parallel": Layout(2, 1), "verify parallel": Layout(1, 2)}
# Images that differ by more than rounding: another decision fell in a near-tie, and the rest of the chain with it.
DIFFERENT = 1e-3


def timed(run: Callable[[], SampleResult | None]) -> tuple[float, SampleResult | None]:
    """Seconds until every process is done, and this one's result."""
    dist.barrier()
    began = time.perf_counter()
    result = run()
    dist.barrier()
    return time.perf_counter() - began, result


def compare(target: Any, drafter: Any, batch: int, length: int, steps: int, turns: int) -> dict[str, dict[str, Any]]:
    """Seconds ``[turns]`` of each mode, and how its images differ from one process's; rank 0's figures count."""
    meshes = {name: distributed.sample_mesh(layout.verify) for name, layout in MODES.items() if sum(layout) > 2}
    labels = torch.arange(batch) % target.num_classes
    settings: dict[str, Any] = {"schedule": DDPMSchedule(steps), "drafter": drafter, "draft_length": length}

    def run(name: str, seed: int) -> SampleResult | None:
        if name in meshes:
            return distributed.sample(target, labels, mesh=meshes[name], seed=seed, **settings)
        return sample(target, labels, seed=seed, **settings) if dist.get_rank() == 0 else None

    names = list(MODES)
    found: dict[str, dict[str, Any]] = {name: {"times": [], "difference": 0.0, "different": 0} for name in names}
    for turn in range(-1, turns):
        images: dict[str, torch.Tensor] = {}
        for name in names if turn % 2 else reversed(names):
            seconds, result = timed(partial(run, name, 1000 + turn))
            if turn >= 0:
                found[name]["times"].append(seconds)
            if result is not None:
                images[name] = result.samples
        for name in meshes if dist.get_rank() == 0 and turn >= 0 else ():
            gap = (images[name] - images["one process"]).abs().flatten(1).amax(1)
            found[name]["difference"] = max(found[name]["difference"], float(gap.max()))
            found[name]["different"] += int((gap > DIFFERENT).sum())
    return found


def cases(
    inputs: Inputs, batch: int, length: int, turns: int, found: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """The modes of a batch, measured beside predicted."""
    chain, rows = inputs.chain(length), []
    one = np.array(found["one process"]["times"])
    first = predict(inputs, MODES["one process"], batch, chain).latency_s
    for name, layout in MODES.items():
        seconds, predicted = np.array(found[name]["times"]), predict(inputs, layout, batch, chain).latency_s
        ratios = one / seconds
        speed = {"median": float(np.median(ratios)), "low": float(ratios.min()), "high": float(ratios.max())}
        row = {"mode": name, "batch": batch, "seconds": float(np.median(seconds)), "predicted_s": predicted}
        row |= {"speed": None if layout == (1, 1) else speed, "predicted_speed": first / predicted}
        row |= {"images": batch * turns, "different_images": found[name]["different"]}
        rows.append(row | {"difference": found[name]["difference"], "times": seconds.round(4).tolist()})
    return rows


def render_validation(measured: dict[str, Any]) -> str:
    """Two processes against one, measured beside predicted."""
    settings = measured["settings"]
    lines = [
        f"{measured['inputs']['origin']}; draft length {settings['draft_length']}, {settings['turns']} interleaved "
        f"turns, median (range); `{settings['command']}`. Every rank has one thread of {settings['cores']} cores. "
        f"Speed is one process's time over two's.",
        "",
    ]
    rows = []
    for case in measured["cases"]:
        speed = case["speed"]
        shown = "" if speed is None else f"{speed['median']:.2f} ({speed['low']:.2f} to {speed['high']:.2f})"
        predicted = "" if speed is None else f"{case['predicted_speed']:.2f}"
        seconds = f"{case['seconds']:.2f}"
        same = "" if speed is None else f"{case['different_images']} of {case['images']}, {case['difference']:.1e}"
        rows.append([case["mode"], str(case["batch"]), seconds, f"{case['predicted_s']:.2f}", shown, predicted, same])
    headers = ["mode", "batch", "seconds", "predicted", "speed", "predicted", "images that differ, largest difference"]
    return "\n".join([*lines, *table(headers, rows)])


def render_page(docs: Path, measured: dict[str, Any] | None) -> None:
    """Renew all of the page's predictions, and what it says of the measurements if there are any."""
    page, scale = docs / "scale-model.md", docs / "scale"
    parts = {}
    if measured is not None:
        parts = {"predictions": ("digits", Inputs(**measured["inputs"]), measured["details"])}
        fill_page(page, "validation", render_validation(measured))
    for side in (256, 512):
        name = f"scale_dit_xl_{side}"
        parts[f"what-if {side}"] = (name, *read_inputs(CONFIGS / f"{name}.toml"))
    for part, (name, inputs, details) in parts.items():
        report = build_report(inputs, details)
        write_data(report, scale, name)
        fill_page(page, part, render(report))


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of scale-model.md and scale/")
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 16])
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--draft-length", type=int, default=6)
    parser.add_argument("--quick", action="store_true", help="a smoke run, no figures: 30 steps, one turn")
    parser.add_argument("--render-only", action="store_true", help="renew the page, one process, nothing is measured")
    arguments = parser.parse_args()
    if arguments.quick and arguments.docs.resolve() == DOCS:
        parser.error("--quick measures nothing worth keeping: give it another --docs folder")
    out = arguments.docs / "scale" / "measured.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    if arguments.render_only:
        render_page(arguments.docs, json.loads(out.read_text()) if out.exists() else None)
        return
    turns, steps = (1, 30) if arguments.quick else (arguments.turns, arguments.steps)
    length, device = arguments.draft_length, torch.device("cpu")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    if dist.get_world_size() != 2:
        parser.error(f"takes two processes, got {dist.get_world_size()}")
    target, drafter = load_target("digits", device)
    with torch.inference_mode():
        link = link_cost_and_slowdown(NetworkCalls(target, 8).target, device)
    leads = dist.get_rank() == 0
    if leads:
        quick = {"turns": 2, "images": 8, "length": 6} if arguments.quick else {}
        inputs, details = measure(target, drafter, link, num_steps=steps, **quick)
    rows = []
    for batch in arguments.batches:
        found = compare(target, drafter, batch, length, steps, turns)
        rows += cases(inputs, batch, length, turns, found) if leads else []
    if leads:
        command = "torchrun --standalone --nproc-per-node 2 benchmarks/scaling/bench_distributed.py"
        settings = {"draft_length": length, "turns": turns, "steps": steps, "cores": os.cpu_count(), "command": command}
        measured = {"settings": settings, "cases": rows, "inputs": asdict(inputs), "details": details}
        out.write_text(json.dumps(measured, indent=1) + "\n")
        render_page(arguments.docs, measured)
        print(render_validation(measured), f"\nwrote {out}", file=sys.stdout, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
