"""Steps per target call against the dimension of a state: ``python -m benchmarks.sampler.bench_dimension --out OUT``.

The target is the exact denoiser of photograph crops (``free_dit.networks.denoiser``): its dimension can be chosen, and
nothing has to be trained. Builds that are compared are checkouts with the extension built in place, such as a second
one of an earlier revision: ``--build before=PATH``. Every build draws the same cases in a process of its own. Steps per
call do not depend on the machine but for rounding.
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
DENOISER = ROOT / "python" / "free_dit" / "networks" / "denoiser.py"
# Steps, drafters (share of the gap that they close; 0: frozen) and draft lengths of the study, by the side of a crop.
CASES = [
    {"side": side, "steps": steps, "share": share, "length": length}
    for side, all_steps in ((4, (250,)), (8, (250,)), (16, (250,)), (32, (50, 100, 250, 1000)), (64, (250,)))
    for steps in all_steps
    for share in (0.0, 0.8)
    for length in (6, 12, 24)
]


def denoiser_module() -> Any:
    """The closed-form target, by file: earlier revisions have none."""
    spec = importlib.util.spec_from_file_location("denoiser", DENOISER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def measured(cases: list[dict[str, Any]], images: int, seed: int) -> Iterator[dict[str, Any]]:
    """The cases with this process's build: with refused rows, and without where it can be chosen."""
    import free_kernels

    module, targets = denoiser_module(), {}
    chosen = "reuse_refused" in inspect.signature(free_kernels.sample).parameters
    for case in cases:
        target = targets.setdefault(case["side"], module.DenoiserTarget(module.photograph_crops(case["side"])))
        drafter = module.PullingDrafter(target, case["share"]) if case["share"] else "frozen"
        for reuse in (True, False) if chosen else (None,):
            stats = free_kernels.sample(
                target,
                torch.zeros(images, dtype=torch.int64),
                schedule=free_kernels.DDPMSchedule(case["steps"], variance="fixed_small"),
                drafter=drafter,
                draft_length=case["length"],
                seed=seed,
                **({} if reuse is None else {"reuse_refused": reuse}),
            ).stats
            yield case | {"dimension": 3 * case["side"] ** 2, "reuse": reuse} | described(stats, case["steps"])


def run_build(script: Path, path: Path, cases: list[dict[str, Any]], arguments: list[str]) -> Iterator[dict[str, Any]]:
    """The cases with the build of a checkout, in a process of its own that runs ``script --worker``."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(path), str(path / "python")])}
    command = [sys.executable, str(script), "--worker", *arguments]
    with subprocess.Popen(command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as worker:
        worker.stdin.write(json.dumps(cases))
        worker.stdin.close()
        for line in worker.stdout:
            yield json.loads(line)
    if worker.returncode:
        raise RuntimeError(f"{script.stem}: the build in {path} must run, got exit status {worker.returncode}")


def described(stats: Any, steps: int) -> dict[str, float]:
    """Steps per call, their standard error and acceptance of a run."""
    rounds = stats.rounds_per_image / steps
    return {
        "steps_per_call": stats.call_reduction,
        # Over images, as a share: the figure is one over a mean.
        "standard_error": float(rounds.std(ddof=1) / len(rounds) ** 0.5 / rounds.mean()),
        "acceptance": stats.acceptance,
    }


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Steps per call against dimension at 250 steps, a panel for each drafter."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 3.8), sharey=True, constrained_layout=True)
    lengths = sorted({row["length"] for row in rows})
    styles = {True: "-", False: ":", None: "--"}
    for panel, share, title in zip(panels, (0.0, 0.8), ("frozen drafter", "a drafter five times better"), strict=True):
        for number, length in enumerate(lengths):
            for build, reuse in sorted({(row["build"], row["reuse"]) for row in rows}, key=str):
                line = [
                    (row["dimension"], row["steps_per_call"])
                    for row in rows
                    if (row["steps"], row["share"], row["length"]) == (250, share, length)
                    and (row["build"], row["reuse"]) == (build, reuse)
                ]
                label = f"L = {length}, {build}" + {True: ", reuse", False: ", without", None: ""}[reuse]
                panel.plot(*zip(*sorted(line), strict=True), styles[reuse], color=f"C{number}", marker=".", label=label)
        panel.set(xscale="log", title=title, xlabel="dimension of a state")
    panels[0].set_ylabel("steps per target call")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=7)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measure, print, plot and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="folder of dimension.json and dimension.png")
    parser.add_argument("--build", action="append", default=[], metavar="NAME=PATH", help="another checkout")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        torch.set_num_threads(1)
        for row in measured(json.load(sys.stdin), asked.images, asked.seed):
            print(json.dumps(row), flush=True)
        return
    if asked.out is None:
        parser.error("--out is needed")
    rows = []
    for name, path in (("this", str(ROOT)), *(build.split("=", 1) for build in asked.build)):
        drawn = ["--images", str(asked.images), "--seed", str(asked.seed)]
        for row in run_build(Path(__file__).resolve(), Path(path).resolve(), CASES, drawn):
            rows.append(row | {"build": name})
            reuse = {True: "reuse", False: "without", None: ""}[row["reuse"]]
            print(
                f"{name:8s} {row['dimension']:6d} dimensions {row['steps']:5d} steps, share {row['share']}, L = "
                f"{row['length']:2d} {reuse:8s} {row['steps_per_call']:6.3f} steps a call, acceptance "
                f"{row['acceptance']:.3f}",
                flush=True,
            )
            asked.out.mkdir(parents=True, exist_ok=True)
            report = {"images": asked.images, "seed": asked.seed, "torch": torch.__version__, "rows": rows}
            (asked.out / "dimension.json").write_text(json.dumps(report, indent=1) + "\n")
    plot(rows, asked.out / "dimension.png")


if __name__ == "__main__":
    main()
