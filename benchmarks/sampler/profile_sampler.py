"""Where the time of ``sample`` goes: milliseconds per round and share of each part, beside the ordinary sampler's step.

Run ``python -m benchmarks.sampler.profile_sampler``; writes JSON with the machine's facts to ``--out``. On a GPU every
part is waited for, so that the parts of a round add up to more than a round of the sampler takes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from benchmarks.report import store
from free_dit import load_bundled
from free_dit.experiments.wall_clock import machine, wall_clock_ratio
from free_kernels import PhiloxNoise, SampleResult, SampleStats, ancestral_sample, sample
from free_kernels.drafters import FeatureDrafter
from free_kernels.sampling import draft_sources as sources_module
from free_kernels.sampling import drafting as drafting_module
from free_kernels.sampling import refused_rows as rows_module
from free_kernels.sampling import round as round_module
from free_kernels.sampling import run_stats as stats_module
from free_kernels.sampling import slots as slots_module
from free_kernels.sampling.job import Job
from free_kernels.sampling.round import Rounds
from free_kernels.sampling.speculative import Speculation
from free_kernels.targets import DiTTarget
from free_kernels.targets import fused_head as head_module
from free_kernels.targets.adaln import AdaLNTarget

# Ops of a round by the part that their time counts for: which ones run depends on device, noise and verification.
TIMED_OPS = {
    **dict.fromkeys(("couple", "couple_philox", "couple_block", "couple_block_philox"), "couple"),
    "pack_drafts": "pack_drafts",
    "commit_drafts": "commit_drafts",
    "renew_slots": "commit_drafts",
    **dict.fromkeys(("open_round", "open_keyed_round"), "opening"),
    **dict.fromkeys(("ADVANCE", "advance_from_features"), "drafts"),
    "replay_drafts": "drafts",
    "draft_rows": "drafts",
    **dict.fromkeys(("join_rows", "row_errors", "correct_features"), "refused rows"),
    **dict.fromkeys(("keep_rows", "keep_clean_rows", "find_rows"), "refused rows"),
    "tally_round": "tally",
    # On a CPU this one is the coupling and all that follows from it.
    "decide_round": "decision",
}
# One image is drawn fast: more pairs cost little. At batch 64 "auto" is about as fast as the ordinary sampler: a few
# pairs do not tell a gain from a loss there.
LEAST_PAIRS_OF_ONE, LEAST_PAIRS_AT_64 = 11, 13
# Pairs of compiled networks before those that are timed, in which all sizes of a call are met and compiled.
COMPILED_WARM_UPS = 9
# The modules that call them.
CALLERS = round_module, slots_module, drafting_module, sources_module, rows_module, stats_module, head_module
# Methods of the two networks by part; tables are what they make once for a run.
NETWORKS = {
    (AdaLNTarget, "features"): "target features",
    (AdaLNTarget, "tabled"): "target tables",
    (FeatureDrafter, "forward"): "drafter",
    (FeatureDrafter, "hoisted"): "drafter tables",
}
METHODS = NETWORKS | {
    (AdaLNTarget, "head"): "target head",
    (Job, "draw"): "noise",
    (PhiloxNoise, "of_round"): "noise",
}


class Clock:
    """Seconds spent in wrapped callables, by name; on a GPU it waits for the device before and after each."""

    def __init__(self, device: str) -> None:
        self.seconds: dict[str, float] = {}
        self._wait: Callable[[], None] = torch.cuda.synchronize if device == "cuda" else lambda: None

    def wrap(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """``call``, timed."""

        def timed(*arguments: Any, **settings: Any) -> Any:
            self._wait()
            started = time.perf_counter()
            result = call(*arguments, **settings)
            self._wait()
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
            return result

        return timed


class Span:
    """From the first call of any of the wrapped methods to the end of the last one, in seconds."""

    def __init__(self) -> None:
        self.began, self.ended = float("inf"), 0.0

    def wrap(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """``call``, watched."""

        def watched(*arguments: Any, **settings: Any) -> Any:
            self.began = min(self.began, time.perf_counter())
            result = call(*arguments, **settings)
            self.ended = time.perf_counter()
            return result

        return watched

    @property
    def seconds(self) -> float:
        """Its length."""
        return self.ended - self.began


def digits(device: str) -> tuple[DiTTarget, FeatureDrafter]:
    """The bundled pair on a device."""
    target, drafter = load_bundled("digits")
    target.module.to(device)
    return target, drafter.to(device)


def timed_ops(module: Any, clock: Clock) -> Any:
    """The ops that a module calls, timed within a ``with`` block."""
    calls = {name: clock.wrap(part, getattr(module, name)) for name, part in TIMED_OPS.items() if hasattr(module, name)}
    return mock.patch.multiple(module, **calls) if calls else contextlib.nullcontext()


def timed_methods(methods: dict[tuple[type, str], str], clock: Clock) -> contextlib.ExitStack:
    """Methods of classes, timed within a ``with`` block."""
    stack = contextlib.ExitStack()
    for (owner, name), part in methods.items():
        stack.enter_context(mock.patch.object(owner, name, clock.wrap(part, getattr(owner, name))))
    return stack


def spread(shares: list[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {"median": float(np.median(shares)), "low": min(shares), "high": max(shares)}


def profile(device: str, batch: int, draft_length: int, guidance: float, runs: int) -> dict[str, Any]:
    """Parts of one configuration, over several runs after a warm-up.

    The shares outside of the networks, heads among it, are of other runs, in which nothing but the networks and their
    tables has a timer: those around single ops take as long as some of these. One is of all rounds of a run, from the
    first one's begin to the last one's end; the other of the whole call, whose checks and stats are then spread over
    its rounds.
    """
    target, drafter = digits(device)
    labels = torch.arange(batch, device=device) % 10
    settings = {"guidance_scale": guidance}

    def run(seed: int) -> SampleStats:
        return sample(target, labels, drafter=drafter, draft_length=draft_length, seed=seed, **settings).stats

    run(0)
    clock, lighter, elapsed, rounds, rows, steps = Clock(device), Clock(device), 0.0, 0, 0, []
    of_rounds: list[float] = []
    of_call: list[float] = []
    for seed in range(runs):
        with timed_methods(METHODS, clock) as stack:
            for module in CALLERS:
                stack.enter_context(timed_ops(module, clock))
            stats = run(seed)
        elapsed, rounds, rows = elapsed + stats.elapsed_s, rounds + stats.target_calls, rows + stats.target_rows
        lighter.seconds.clear()
        span = Span()
        with timed_methods(NETWORKS, lighter) as stack:
            # The drafter's tables are made just before the first round that drafts.
            for owner, name in ((Speculation, "_prepare_drafter"), (Rounds, "play")):
                stack.enter_context(mock.patch.object(owner, name, span.wrap(getattr(owner, name))))
            whole = run(seed).elapsed_s
        tables, within = lighter.seconds.pop("target tables"), lighter.seconds.pop("drafter tables", 0.0)
        networks = sum(lighter.seconds.values())
        of_rounds.append(1 - networks / (span.seconds - within))
        of_call.append(1 - networks / (whole - tables - within))
        steps.append(ancestral_sample(target, labels, seed=seed, **settings).stats.elapsed_s / 250)
    clock.seconds["everything else"] = elapsed - sum(clock.seconds.values())
    parts = dict(sorted(clock.seconds.items(), key=lambda item: -item[1]))
    return {
        "batch": batch,
        "draft_length": draft_length,
        "guidance": guidance,
        "rows_per_call": rows / rounds,
        "ms_per_round": 1e3 * elapsed / rounds,
        "ms_per_ordinary_step": 1e3 * float(np.median(steps)),
        "outside_of_networks": spread(of_rounds),
        "outside_of_networks_with_start": spread(of_call),
        "parts": {name: {"ms": 1e3 * s / rounds, "share": s / elapsed} for name, s in parts.items()},
    }


def ratios(
    device: str, batch: int, lengths: tuple[int | str, ...], pairs: int, *, frozen: bool = False, compiled: bool = False
) -> list[dict[str, Any]]:
    """Wall-clock ratios by draft length, interleaved with the ordinary sampler; ``compiled`` holds for both."""
    target, drafter = digits(device)
    if compiled:
        target = DiTTarget(target.module, compile=True)
        drafter.compile()
    used = "frozen" if frozen else drafter
    labels = torch.arange(batch, device=device) % 10

    def ordinary(seed: int) -> SampleResult:
        return ancestral_sample(target, labels, seed=seed)

    def speculative(length: int | str) -> Callable[[int], SampleResult]:
        return lambda seed: sample(target, labels, drafter=used, draft_length=length, seed=seed)

    warm_ups = COMPILED_WARM_UPS if compiled else 1
    found = [(length, wall_clock_ratio(ordinary, speculative(length), batch, pairs, warm_ups)) for length in lengths]
    how = {"drafter": "frozen" if frozen else "learned", "compiled": compiled}
    return [{"draft_length": length, **how, **vars(ratio)} for length, ratio in found]


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/DEVICE/profile.json")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--pairs", type=int, default=11)
    parser.add_argument("--only-parts", action="store_true", help="no ratios")
    parser.add_argument("--quick", action="store_true", help="one run of one image: a smoke run, no figures")
    arguments = parser.parse_args()
    if arguments.quick and arguments.out is None:
        parser.error("--quick measures nothing worth keeping: give it a file with --out")
    device, pairs = arguments.device, arguments.pairs
    of_one = max(LEAST_PAIRS_OF_ONE, pairs)
    out = arguments.out or store.RESULTS / store.device_slug(device) / "profile.json"
    facts = machine() if device == "cpu" else machine() | {"gpu": torch.cuda.get_device_name()}
    cases = ((1, 6, 1.0, 1),) if arguments.quick else ((1, 6, 1.0, 12), (1, 6, 2.0, 3), (64, 6, 1.0, 1))
    report = {
        "machine": facts,
        "command": "python -m benchmarks.sampler.profile_sampler"
        + (" --device cuda" if device == "cuda" else "")
        + ("" if pairs == parser.get_default("pairs") else f" --pairs {pairs}"),
        "profiles": [profile(device, *case) for case in cases],
        "ratios": []
        if arguments.only_parts
        else [
            *ratios(device, 1, (4, 6, 8, 12, 16, "auto"), of_one, frozen=True),
            *ratios(device, 8, (6, 12), min(5, pairs), frozen=True),
            *ratios(device, 64, (4, 6), min(3, pairs), frozen=True),
            *ratios(device, 64, ("auto",), max(LEAST_PAIRS_AT_64, pairs), frozen=True),
            *ratios(device, 1, (6, 12), of_one, frozen=True, compiled=True),
            *ratios(device, 1, (2, 4, 6, 8, 12), of_one),
            *ratios(device, 8, (6, 12), min(5, pairs)),
            *ratios(device, 64, (4, 6), min(3, pairs)),
            *ratios(device, 64, ("auto",), max(LEAST_PAIRS_AT_64, pairs)),
            *ratios(device, 1, (6, 12), of_one, compiled=True),
        ],
    }
    for entry in report["profiles"]:
        print(
            f"\nbatch {entry['batch']}, L = {entry['draft_length']}, guidance {entry['guidance']:g}: "
            f"{entry['ms_per_round']:.2f} ms a round of {entry['rows_per_call']:.2f} rows; "
            f"an ordinary step takes {entry['ms_per_ordinary_step']:.2f} ms"
        )
        for name, of_what in (("outside_of_networks", "rounds"), ("outside_of_networks_with_start", "call")):
            beyond = entry[name]
            print(
                f"  outside of both networks and their tables, of the {of_what}: {beyond['median']:.1%} "
                f"({beyond['low']:.1%} to {beyond['high']:.1%})"
            )
        for name, part in entry["parts"].items():
            print(f"  {name:18s} {part['ms']:7.2f} ms {part['share']:6.1%}")
    print("\nbatch  L  drafter  ratio (range)")
    for entry in report["ratios"]:
        span = f"({entry['low']:.2f} to {entry['high']:.2f})"
        how = ", compiled" if entry["compiled"] else ""
        print(
            f"{entry['batch']:5d} {entry['draft_length']:>4}  {entry['drafter']:7s}  {entry['median']:.2f} {span}{how}"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=2) + "\n")
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
