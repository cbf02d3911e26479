"""Where a captured round of ``sample`` on DiT-XL/2's shape spends the GPU's time: by kernel and by kind of kernel.

Rounds in which all six drafts are accepted, with guidance, after everything is captured; the profiler sees them only.
``python -m benchmarks.sampler.profile_xl --results DIR`` on a GPU; ``--device cpu --quick`` is a smoke run.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.report import store
from benchmarks.sampler.bench_xl import STEPS, Case, Pairs
from free_kernels import DDPMSchedule, sample

# By the first that matches a kernel's name.
KINDS = {
    "coupling": r"coupling_|block_(rows|commit)",
    "noise": r"philox",
    "packing": r"pack_kernel|commit_(plan|copy)",
    "attention": r"flash|fmha|attention|attn",
    "matrix products": r"gemm|gemv|nvjet|cutlass|xmma|cublas|addmm|::mm\b|linear|matmul",
    "normalisation": r"layer_?norm",
    "copies": r"memcpy|memset|copy|cat|index",
}
SHOWN = 25


def kind_of(name: str) -> str:
    """A kernel's kind."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), "elementwise")


def summary(kernels: Iterable[tuple[str, float, int]], rounds: int) -> dict[str, Any]:
    """Microseconds and calls of a round, by kernel and by kind.

    Args:
        kernels: name, microseconds and calls of each in all rounds.
        rounds: how many these are.
    """
    longest = sorted(kernels, key=lambda kernel: -kernel[1])
    kinds: dict[str, float] = {}
    for name, microseconds, _ in longest:
        kinds[kind_of(name)] = kinds.get(kind_of(name), 0.0) + microseconds / rounds
    shown = [{"name": n[:90], "us": us / rounds, "calls": calls / rounds} for n, us, calls in longest[:SHOWN]]
    return {"rounds": rounds, "us": sum(kinds.values()), "kinds": kinds, "kernels": shown}


def measure(case: Case, pairs: Pairs) -> dict[str, Any]:
    """Figures of some rounds in the middle of a run."""
    target, drafter = pairs(case)
    on_gpu = pairs.device == "cuda"
    profiler = profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU])
    first, last = (1, 3) if pairs.quick else (20, 40)
    taken: list[float] = []

    def between(info: Any) -> None:
        if info.round in (first, last) and on_gpu:
            torch.cuda.synchronize()
        if info.round == first:
            profiler.start()
            taken.append(time.perf_counter())
        elif info.round == last:
            taken.append(time.perf_counter())
            profiler.stop()

    labels = torch.arange(3, device=target.device)
    settings = {"schedule": DDPMSchedule(13 if pairs.quick else STEPS), "guidance_scale": case.guidance}
    settings |= {"draft_length": case.length, "max_slots": 1, "cuda_graphs": on_gpu}
    sample(target, labels, drafter=drafter, callback=between, **settings)
    events = profiler.key_averages()
    kernels = [
        (event.key, event.self_device_time_total if on_gpu else event.self_cpu_time_total, event.count)
        for event in events
        if not event.key.startswith("ProfilerStep")
    ]
    found = summary([kernel for kernel in kernels if kernel[1] > 0], last - first)
    if not found["us"]:
        raise RuntimeError("profile_xl: the profiler saw no kernel")
    # The profiler's own cost is in this and not in the kernels' times.
    return {
        "pixels": 8 * case.side,
        "guidance": case.guidance,
        "profiled_round_s": (taken[1] - taken[0]) / (last - first),
    } | found


def main() -> None:
    """Measure, print and merge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, help="merge figures into RESULTS/<device>/profile_xl.json")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="a small shape: a smoke run, no figures")
    arguments = parser.parse_args()
    if arguments.device == "cpu" and not arguments.quick:
        parser.error("a CPU is too slow for this shape: add --quick, which measures nothing")
    pairs = Pairs(arguments.device, arguments.quick)
    for side in (32, 64):
        case = Case(f"round at {8 * side}, guided, six rows", side)
        with torch.no_grad():
            entry = measure(case, pairs)
        store.Keeper(arguments.results, "profile_xl", case.name).keep(arguments.device, entry)
        print(case.name, json.dumps(store.rounded(entry)), flush=True)


if __name__ == "__main__":
    main()
