"""Steps per target call of a trained model, this build beside others.

``python -m benchmarks.sampler.bench_checkpoint --model MODEL --drafter DRAFTER --build before=PATH --out OUT``: MODEL
is a bundled name or what ``python -m free_dit train`` writes, DRAFTER what ``train-drafter`` writes, PATH a checkout
with its extension built in place. Steps per call do not depend on the machine but for rounding.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
LENGTHS = (6, 12)


def dimension_module() -> Any:
    """What this benchmark shares with ``bench_dimension``, by file: earlier revisions have none."""
    spec = importlib.util.spec_from_file_location("bench_dimension", ROOT / "benchmarks/sampler/bench_dimension.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def measured(cases: list[dict[str, Any]], asked: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The cases with this process's build."""
    from free_dit.loading import load_target
    from free_kernels import DDPMSchedule, FeatureDrafter, sample

    shared = dimension_module()
    target, _ = load_target(asked.model)
    drafter = FeatureDrafter.load(asked.drafter, target) if asked.drafter else "frozen"
    labels = torch.arange(asked.images) % target.num_classes
    for case in cases:
        # Builds of before know no such argument.
        settings = {} if case.get("reuse", True) else {"reuse_refused": False}
        stats = sample(
            target,
            labels,
            schedule=DDPMSchedule(case["steps"]),
            drafter=drafter,
            draft_length=case["length"],
            seed=asked.seed,
            **settings,
        ).stats
        yield case | shared.described(stats, case["steps"])


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="the target's file")
    parser.add_argument("--drafter", default="", help="the drafter's file; the frozen drafter if not given")
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--build", action="append", default=[], metavar="NAME=PATH", help="another checkout")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--seed", type=int, default=77)
    parser.add_argument("--without-reuse", action="store_true", help="this build also without refused rows")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        torch.set_num_threads(1)
        for row in measured(json.load(sys.stdin), asked):
            print(json.dumps(row), flush=True)
        return
    if asked.out is None:
        parser.error("--out is needed")
    kind = "learned" if asked.drafter else "frozen"
    cases = [{"drafter": kind, "steps": asked.steps, "length": length} for length in LENGTHS]
    drawn = ["--model", asked.model, "--drafter", asked.drafter]
    drawn += ["--images", str(asked.images), "--seed", str(asked.seed)]
    rows = []
    for name, path in (("this", str(ROOT)), *(build.split("=", 1) for build in asked.build)):
        more = [case | {"reuse": False} for case in cases] if asked.without_reuse and name == "this" else []
        for row in dimension_module().run_build(Path(__file__).resolve(), Path(path).resolve(), cases + more, drawn):
            rows.append(row | {"build": name})
            print(
                f"{name:8s} {row['drafter']:8s} {'' if row.get('reuse', True) else 'without reuse, '}"
                f"{row['steps']:5d} steps, L = {row['length']:2d} "
                f"{row['steps_per_call']:6.3f} steps a call (standard error {100 * row['standard_error']:.1f} %), "
                f"acceptance {row['acceptance']:.3f}",
                flush=True,
            )
            report = {"images": asked.images, "seed": asked.seed, "torch": torch.__version__, "rows": rows}
            asked.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
