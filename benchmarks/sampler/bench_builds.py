"""This build against another: ``python -m benchmarks.sampler.bench_builds --build before=PATH --out OUT``.

PATH is a checkout with its extension built in place. Each build has a process of its own with one thread that keeps the
bundled digits loaded; they draw the same cases in turn, one image at a time, and a ratio is taken within each turn.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
CASES = [
    {"drafter": drafter, "steps": steps, "draft_length": length}
    for drafter in ("frozen", "learned")
    for steps in (250, 50)
    for length in (6, 12, "auto")
] + [{"drafter": "ancestral", "steps": steps, "draft_length": 1} for steps in (250, 50)]


def serve() -> None:
    """Answer cases, a line of JSON each, until the input ends."""
    import torch

    from free_dit import load_bundled
    from free_kernels import DDPMSchedule, ancestral_sample, sample

    torch.set_num_threads(1)
    target, learned = load_bundled("digits")
    for line in sys.stdin:
        case = json.loads(line)
        labels = torch.tensor([case["seed"] % 10])
        settings = {"schedule": DDPMSchedule(case["steps"]), "seed": case["seed"]}
        began, used = time.perf_counter(), time.process_time()
        if case["drafter"] == "ancestral":
            result = ancestral_sample(target, labels, **settings)
        else:
            drafter = learned if case["drafter"] == "learned" else "frozen"
            result = sample(target, labels, drafter=drafter, draft_length=case["draft_length"], **settings)
        used = time.process_time() - used
        answer = {"seconds": time.perf_counter() - began, "cpu_seconds": used}
        print(json.dumps(answer | {"steps_per_call": result.stats.call_reduction}), flush=True)


class Build:
    """A build's process.

    Args:
        path: its checkout.
    """

    def __init__(self, path: Path) -> None:
        paths = os.pathsep.join([str(path), str(path / "python")])
        environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(Path(__file__).resolve()), "--serve"]
        self._process = subprocess.Popen(
            command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=1
        )

    def draw(self, case: dict[str, Any]) -> dict[str, Any]:
        """One image: wall and processor seconds, steps per call."""
        self._process.stdin.write(json.dumps(case) + "\n")
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"bench_builds: the build must answer, got exit status {self._process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()
        self._process.wait()


def compared(builds: dict[str, Build], case: dict[str, Any], pairs: int) -> dict[str, Any]:
    """A case: seconds of the other build over this one's, within each pair."""
    (_, this), (_, other) = builds.items()
    for build in (this, other):
        build.draw(case | {"seed": 1000})
    drawn = []
    for seed in range(pairs):
        order = (this, other) if seed % 2 else (other, this)
        answers = {id(build): build.draw(case | {"seed": seed}) for build in order}
        drawn.append((answers[id(this)], answers[id(other)]))
    found: dict[str, Any] = {}
    for name in ("seconds", "cpu_seconds"):
        ratios = [before[name] / now[name] for now, before in drawn]
        low, median, high = (float(q) for q in np.quantile(ratios, [0.25, 0.5, 0.75]))
        found[name] = {"ratio": median, "lower_quartile": low, "upper_quartile": high}
        found[name]["this"] = float(np.median([now[name] for now, _ in drawn]))
    calls = [[1 / answer["steps_per_call"] for answer in one] for one in zip(*drawn, strict=True)]
    now, before = (1 / float(np.mean(one)) for one in calls)
    return case | found | {"steps_per_call": now, "steps_per_call_before": before, "pairs": pairs}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--build", metavar="NAME=PATH", help="the other checkout")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.serve:
        serve()
        return
    if asked.build is None or "=" not in asked.build:
        parser.error(f"--build must be NAME=PATH, got {asked.build}")
    from benchmarks.report.store import machine_facts

    name, path = asked.build.split("=", 1)
    builds = {"this": Build(ROOT), name: Build(Path(path).resolve())}
    rows = []
    for case in CASES:
        row = compared(builds, case, asked.pairs)
        rows.append(row)
        wall, cpu = row["seconds"], row["cpu_seconds"]
        print(
            f"{case['drafter']:9s} {case['steps']:4d} steps, L = {case['draft_length']!s:4s} {name} / this: "
            f"{wall['ratio']:.3f} ({wall['lower_quartile']:.3f} to {wall['upper_quartile']:.3f}), processor time "
            f"{cpu['ratio']:.3f}, {cpu['this']:.3f} s now; "
            f"steps a call {row['steps_per_call_before']:.2f} -> {row['steps_per_call']:.2f}",
            flush=True,
        )
    for build in builds.values():
        build.close()
    if asked.out is not None:
        report = {"machine": machine_facts("cpu"), "other": name, "rows": rows}
        asked.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
