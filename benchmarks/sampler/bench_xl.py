"""``sample`` against ``ancestral_sample`` on DiT-XL/2's shape with random weights, captured, and compiled and captured.

Target, dtype, hoisting, CUDA graphs and compilation are the same on both sides, runs are interleaved, and each draws
several images one after the other, so that captures are few beside replays. Random weights say nothing of acceptance,
so its two ends are measured: the head's weights are as random as the rest (few drafts are accepted), or so small that
features do not matter (all are accepted). What both give is ``round_over_step``, a round's time over an ordinary
step's with everything that comes on top of target and drafter: it is the number of steps that a round has to commit to
break even, and a drafter that commits c in the mean wins by ``c / round_over_step``.

Run ``python -m benchmarks.sampler.bench_xl --results DIR`` on a GPU; ``--ablations`` has draft lengths, verification
and ways to run a round instead. With ``--device cpu --quick`` everything runs on a small shape: no figures.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.report import store, timing
from benchmarks.sampler.bench_target import randomise
from free_dit.model import DiT, DiTConfig, dit_config
from free_kernels import DDPMSchedule, DiTTarget, FeatureDrafter, SampleResult, ancestral_sample, sample

# Of the head's weights: the target's mean then hangs on its features by far less than a deviation.
ACCEPTING = 1e-5
STEPS = 100


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        name: in the results.
        side: of the latent.
        compiled: whether blocks and head of the target go through torch.compile, for both samplers.
        guidance: its scale.
        accepting: whether all drafts are accepted, or hardly one.
        batch: images in the making at a time.
        length: draft length.
        more: further arguments of ``sample``.
    """

    name: str
    side: int
    compiled: bool = False
    guidance: float = 4.0
    accepting: bool = True
    batch: int = 1
    length: int = 6
    more: dict[str, Any] = field(default_factory=dict)


def comparisons(quick: bool = False) -> Iterator[Case]:
    """What is wanted most comes first: with guidance, captured, then compiled too; ``quick`` compiles one only."""
    for side, compiled, guidance in (
        (32, False, 4.0),
        (32, True, 4.0),
        (64, False, 4.0),
        (64, True, 4.0),
        (64, False, 1.0),
        (32, False, 1.0),
    ):
        for accepting in (True, False):
            if quick and compiled and (side, accepting) != (32, True):
                continue
            parts = [str(8 * side), "compiled" * compiled, "guided" if guidance > 1 else "plain"]
            parts += ["all accepted" if accepting else "few accepted"]
            yield Case(", ".join(filter(None, parts)), side, compiled, guidance, accepting)


def ablations() -> Iterator[Case]:
    """At 256 pixels, without guidance: what a round is made of, one change at a time."""
    yield Case("L = 6", 32, guidance=1.0)
    for length in (2, 4, 8, 12):
        yield Case(f"L = {length}", 32, guidance=1.0, length=length)
    yield Case("block verification", 32, guidance=1.0, more={"verification": "block"})
    yield Case("ops by the reference", 32, guidance=1.0, more={"backend": "reference"})
    yield Case("no CUDA graphs, on either side", 32, guidance=1.0, more={"cuda_graphs": False})
    yield Case("frozen drafter", 32, guidance=1.0, more={"drafter": "frozen"})
    for batch in (4, 16):
        yield Case(f"batch {batch}", 32, guidance=1.0, batch=batch)


class Pairs:
    """Targets and drafters of a shape, made once.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        quick: a small shape in float32.
    """

    def __init__(self, device: str, quick: bool) -> None:
        self.device, self.quick = device, quick
        self.dtype = torch.float32 if quick else torch.bfloat16
        self._side = 0

    def __call__(self, case: Case) -> tuple[DiTTarget, FeatureDrafter]:
        """The pair of a case; one shape is held at a time."""
        if case.side != self._side:
            self._module = self._drafter = self._targets = None
            gc.collect()
            if self.device == "cuda":
                torch.cuda.empty_cache()
            config = dit_config("DiT-XL/2", input_size=case.side)
            if self.quick:
                config = DiTConfig(case.side // 4, hidden_size=64, depth=2, num_heads=2, num_classes=10)
            with torch.device(self.device):
                self._module = randomise(DiT(config)).to(self.dtype)
                target = DiTTarget(self._module)
                drafter = FeatureDrafter(target.latent_shape, target.feature_shape, target.num_classes)
            self._drafter = randomise(drafter).to(self.dtype)
            self._head = self._module.final_layer.linear.weight.clone()
            self._targets = {False: target}
            self._side = case.side
        # In place: what is compiled or hoisted keeps its weights.
        self._module.final_layer.linear.weight.copy_(self._head * (ACCEPTING if case.accepting else 1.0))
        if case.compiled not in self._targets:
            self._targets[True] = DiTTarget(self._module, compile=True)
        return self._targets[case.compiled], self._drafter


def samplers(
    case: Case, pairs: Pairs, steps: int, images: int
) -> tuple[Callable[[int], SampleResult], Callable[[int], SampleResult]]:
    """The ordinary sampler and the speculative one, as functions of the seed."""
    target, drafter = pairs(case)
    labels: Tensor = torch.arange(images, device=target.device) % target.num_classes
    settings = {"schedule": DDPMSchedule(steps), "guidance_scale": case.guidance, "max_slots": case.batch}
    settings["cuda_graphs"] = case.more.get("cuda_graphs", pairs.device == "cuda")
    more = {"drafter": drafter, "draft_length": case.length} | settings | case.more

    def ordinary(seed: int) -> SampleResult:
        return ancestral_sample(target, labels, seed=seed, **settings)

    def speculative(seed: int) -> SampleResult:
        return sample(target, labels, seed=seed, **more)

    return ordinary, speculative


def measure(case: Case, pairs: Pairs, seconds: float, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Figures of a case, from as many pairs as fit into some seconds after the warm-up; at least three.

    Args:
        case: what is compared.
        pairs: makes target and drafter.
        seconds: for the pairs.
        keep: takes the figures after every pair.
    """
    steps, images = (13, 2) if pairs.quick else (STEPS, case.batch * (3 if case.accepting else 1))
    ordinary, speculative = runs = samplers(case, pairs, steps, images)
    began = time.perf_counter()
    # Compiles.
    ordinary(0), speculative(0)
    warm_up, began = time.perf_counter() - began, time.perf_counter()
    least, most = (1, 1) if pairs.quick else (3, 20)
    times, reductions = np.empty((most, 2)), []
    for pair in range(most):
        for which in (0, 1) if pair % 2 == 0 else (1, 0):
            stats = runs[which](pair + 1).stats
            times[pair, which] = stats.elapsed_s
            if which:
                reductions.append(stats.call_reduction)
        ratios, medians = times[: pair + 1, 0] / times[: pair + 1, 1], np.median(times[: pair + 1], axis=0)
        entry = {"model": "DiT-XL/2's shape", "pixels": 8 * case.side, "weights": "random", "images": images}
        entry |= {"dtype": timing.dtype_name(pairs.dtype), "steps": steps, "batch": case.batch}
        entry |= {"compiled": case.compiled, "guidance": case.guidance, "draft_length": case.length}
        entry |= {"cuda_graphs": pairs.device == "cuda"} | case.more
        entry |= {"pairs": pair + 1, "ratio": float(np.median(ratios))}
        entry |= {"ratio_low": float(ratios.min()), "ratio_high": float(ratios.max()), "warm_up_s": warm_up}
        entry |= {"ordinary_s": float(medians[0]), "speculative_s": float(medians[1])}
        reduction = float(np.mean(reductions))
        entry |= {"call_reduction": reduction, "round_over_step": reduction / entry["ratio"]}
        keep(entry)
        if pair + 1 >= least and time.perf_counter() - began > seconds:
            break
    return entry


def main() -> None:
    """Measure, print and merge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, help="merge figures into RESULTS/<device>/xl.json or ablations.json")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--ablations", action="store_true", help="these instead of the comparisons")
    parser.add_argument("--seconds", type=float, default=8.0, help="for the pairs of a case; %(default)s")
    parser.add_argument("--quick", action="store_true", help="a small shape and one pair: a smoke run, no figures")
    arguments = parser.parse_args()
    if arguments.device == "cpu" and not arguments.quick:
        parser.error("a CPU is too slow for this shape: add --quick, which measures nothing")
    if arguments.quick and arguments.results is not None and arguments.results.resolve() == store.RESULTS:
        parser.error("--quick measures nothing worth keeping: give it another --results folder")
    pairs, failed = Pairs(arguments.device, arguments.quick), []
    chosen, stem = (ablations(), "ablations") if arguments.ablations else (comparisons(arguments.quick), "xl")
    for case in chosen:
        keeper = store.Keeper(arguments.results, stem, case.name)
        try:
            with torch.no_grad():
                entry = measure(case, pairs, arguments.seconds, lambda made, k=keeper: k.keep(arguments.device, made))
        except (RuntimeError, FloatingPointError) as error:
            # One case that cannot run must not keep the others from running.
            failed.append(case.name)
            print(f"FAILED {case.name}: {type(error).__name__}: {str(error)[:2000]}", flush=True)
            continue
        print(case.name, json.dumps(store.rounded(entry)), flush=True)
    if failed:
        raise SystemExit(f"failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
