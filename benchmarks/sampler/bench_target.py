"""rho(L), the cost of a packed call of L rows over a call of one: it decides what speculation can win.

A round of draft length L costs ``rho(L) + (L - 1) d`` ordinary steps, with d a drafting step (the drafter and the
target's head, as the sampler calls them) over a one-row target call; so many steps must be committed in it to break
even. With guidance a row is two network rows, in both. Coupling, noise and packing come on top. Calls of all sizes are
timed in turn, and ratios taken within a turn.

Run ``python -m benchmarks.sampler.bench_target --results benchmarks/results``: on a GPU DiT-B/2, L/2 and XL/2 at 256
and 512 with random weights in bfloat16, target and drafter each as a CUDA graph; on a CPU the bundled digits pair in
float32.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.report import store, timing
from free_dit.bundled import load_bundled
from free_dit.model import DiT, dit_config
from free_kernels import DDPMSchedule, DiTTarget, FeatureDrafter

LENGTHS = tuple(range(1, 9))
# Network rows: L without guidance, 2 L with it.
ROWS = tuple(sorted({branches * length for branches in (1, 2) for length in LENGTHS}))
# Name and side of the latent.
MODELS = tuple((name, side) for name in ("DiT-B/2", "DiT-L/2", "DiT-XL/2") for side in (32, 64))


def randomise(module: nn.Module) -> nn.Module:
    """All weights random: zeros, as adaLN-zero starts with, would be easier to multiply by."""
    generator = torch.Generator(next(module.parameters()).device).manual_seed(0)
    for parameter in module.parameters():
        parameter.data.normal_(0.0, 0.02, generator=generator)
    return module.eval().requires_grad_(False)


def random_pair(name: str, side: int, device: str, dtype: torch.dtype) -> tuple[DiTTarget, FeatureDrafter]:
    """A standard DiT and the default drafter of its shapes."""
    with torch.device(device):
        target = DiTTarget(randomise(DiT(dit_config(name, input_size=side))).to(dtype))
        drafter = FeatureDrafter(target.latent_shape, target.feature_shape, target.num_classes)
    return target, randomise(drafter).to(dtype)


def calls_of(target: DiTTarget, drafter: FeatureDrafter) -> dict[str, Callable[[], Tensor]]:
    """The target on each number of rows, and a drafting step on one row of each branch; hoisted as in the sampler."""
    device, timesteps = target.device, DDPMSchedule().timesteps.to(target.device)
    labels = torch.tensor([0, target.num_classes], device=device)
    fast, quick_drafter = target.hoisted(timesteps, labels), drafter.hoisted(timesteps, labels)

    def inputs(rows: int) -> tuple[Tensor, Tensor, Tensor]:
        state = torch.randn(rows, *target.latent_shape, device=device)
        at = torch.arange(rows, device=device)
        return state, timesteps[at % len(timesteps)], labels[at % 2]

    def verify(rows: int) -> Callable[[], Tensor]:
        state, t, y = inputs(rows)
        return lambda: fast.head(fast.features(state, t, y), t, y)

    def draft(rows: int) -> Callable[[], Tensor]:
        state, t, y = inputs(rows)
        previous, feature = torch.randn_like(state), fast.features(state, t, y)
        return lambda: fast.head(quick_drafter(feature, previous, state, t, y), t, y)

    verifying = {f"target {rows}": verify(rows) for rows in ROWS}
    return verifying | {f"draft {branches}": draft(branches) for branches in (1, 2)}


def captured(calls: dict[str, Callable[[], Tensor]]) -> tuple[dict[str, Callable[[], object]], list[Any]]:
    """Each call as a CUDA graph, and what must outlive the replays."""
    graphs, kept, pool = {}, [], torch.cuda.graph_pool_handle()
    for name, call in calls.items():
        graphs[name], alive = timing.captured(call, pool)
        kept.append(alive)
    return graphs, kept


def timed_in_turn(
    calls: dict[str, Callable[[], object]], device: str, rounds: int, now: Callable[[], float] | None = None
) -> dict[str, np.ndarray]:
    """Seconds ``[rounds]`` of each call by a clock (the device's if None); every other turn goes backwards."""
    now, names = now or timing.clock(device), list(calls)
    seconds = {name: np.empty(rounds) for name in names}
    for turn in range(-2, rounds):
        for name in names if turn % 2 else reversed(names):
            begin = now()
            calls[name]()
            elapsed = now() - begin
            if turn >= 0:
                seconds[name][turn] = elapsed
    return seconds


def ratios(seconds: dict[str, np.ndarray], branches: int) -> dict[str, Any]:
    """rho(1 ... 8) and d with the quartiles of each, and the median call of one row."""
    one = seconds[f"target {branches}"]
    rho = [np.quantile(seconds[f"target {branches * length}"] / one, [0.25, 0.5, 0.75]) for length in LENGTHS]
    drafting = np.quantile(seconds[f"draft {branches}"] / one, [0.25, 0.5, 0.75])
    return {
        "call_s": float(np.median(one)),
        "rho": [float(x[1]) for x in rho],
        "rho_quartiles": [[float(x[0]), float(x[2])] for x in rho],
        "d": float(drafting[1]),
        "d_quartiles": [float(drafting[0]), float(drafting[2])],
    }


@torch.inference_mode()
def measure(target: DiTTarget, drafter: FeatureDrafter, rounds: int) -> dict[str, Any]:
    """Figures of one pair on its device."""
    device, kept = target.device.type, []
    calls: dict[str, Callable[[], object]] = calls_of(target, drafter)  # type: ignore[assignment]
    if device == "cuda":
        calls, kept = captured(calls)  # type: ignore[arg-type]
    seconds = timed_in_turn(calls, device, rounds)
    entry: dict[str, Any] = {"latent": list(target.latent_shape), "dtype": timing.dtype_name(target.dtype)}
    entry |= {"mode": "CUDA graph" if kept else "eager", "rounds": rounds}
    entry |= {} if kept else {"threads": torch.get_num_threads()}
    return entry | {"plain": ratios(seconds, 1), "guided": ratios(seconds, 2)}


def cases(device: str, models: list[str], quick: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and figures of every pair of a device."""
    if device == "cuda":
        for name, side in MODELS:
            if name in models:
                pair = random_pair(name, side, device, torch.bfloat16)
                entry = measure(*pair, 2 if quick else 30)
                yield f"{name} {8 * side}", {"model": name, "pixels": 8 * side, "weights": "random"} | entry
                del pair
                gc.collect()
                torch.cuda.empty_cache()
        return
    default = torch.get_num_threads()
    for threads in sorted({1, default}):
        torch.set_num_threads(threads)
        entry = measure(*load_bundled("digits"), 2 if quick else 100)
        yield f"digits {threads} threads", {"model": "digits", "pixels": 8, "weights": "bundled"} | entry
    torch.set_num_threads(default)


def main() -> None:
    """Measure, print and merge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, help="merge figures into RESULTS/<device>/target.json")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", nargs="*", default=[name for name, _ in MODELS], help="on a GPU; all of them")
    parser.add_argument("--quick", action="store_true", help="two rounds: a smoke run, no figures")
    arguments = parser.parse_args()
    if arguments.quick and arguments.results is not None and arguments.results.resolve() == store.RESULTS:
        parser.error("--quick measures nothing worth keeping: give it another --results folder")
    for name, entry in cases(arguments.device, arguments.models, arguments.quick):
        store.Keeper(arguments.results, "target", name).keep(arguments.device, entry)
        print(name, json.dumps(store.rounded(entry)), flush=True)


if __name__ == "__main__":
    main()
