"""What the adapters cost, and what a batch's shape does to an output.

Cost: ``features`` + ``head`` over the module's own forward, for the original's family and diffusers', as they are,
hoisted, and compiled; calls are timed in turn, and ratios taken within a turn. Rounding: a row in a packed call of six
against the same row alone, and against the float32 network, along chains of the ordinary sampler. Each pair of outputs
gives the next state two Gaussians; ``sqrt(KL / 2)`` bounds their total variation (Pinsker), and its sum over the steps
that of the chain.

On a CPU run it with ``OMP_NUM_THREADS=1``: time is the process's own, over all of its threads.

Run ``python -m benchmarks.sampler.bench_families --results benchmarks/results``: the bundled digits DiT on a CPU; on a
GPU also DiT-XL/2 with random weights, for the cost.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn

from benchmarks.report import store, timing
from benchmarks.sampler.bench_target import randomise, timed_in_turn
from free_dit.bundled import load_bundled
from free_dit.checkpoints import convert_dit_to_diffusers, diffusers_config, use_original_arithmetic
from free_dit.model import DiT, dit_config
from free_kernels import DDPMSchedule, DiffusersDiTTarget, DiTTarget
from free_kernels.ops.coupling import gaussian_transition

ROWS = 6
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def diffusers_twin(module: DiT) -> nn.Module:
    """The same weights in diffusers' family."""
    with torch.device(module.pos_embed.device):
        twin = DiTTransformer2DModel(**diffusers_config(module.config))
    twin.load_state_dict(convert_dit_to_diffusers(module.state_dict()))
    use_original_arithmetic(twin)
    # diffusers' own `to` warns about parts that a DiT does not have.
    return nn.Module.to(twin, module.pos_embed.dtype).eval().requires_grad_(False)


def costs(module: DiT, rows: int, compiled: bool, rounds: int) -> dict[str, Any]:
    """Ratios of each way of calling a target over its module's forward, with quartiles."""
    twin, device, dtype = diffusers_twin(module), module.pos_embed.device, module.pos_embed.dtype
    size, channels = module.config.input_size, module.config.in_channels
    x = torch.randn(rows, channels, size, size, device=device, dtype=dtype)
    t = torch.arange(rows, device=device) * 150 + 3
    y = torch.arange(rows, device=device) % module.config.num_classes

    def split(target: Any) -> Callable[[], Tensor]:
        return lambda: target.head(target.features(x, t, y), t, y)

    calls: dict[str, Callable[[], object]] = {}
    for family, forward, adapter, network in (
        ("original", lambda: module(x, t, y), DiTTarget, module),
        ("diffusers", lambda: twin(x, timestep=t, class_labels=y).sample, DiffusersDiTTarget, twin),
    ):
        calls |= {f"{family} forward": forward, f"{family} plain": split(adapter(network))}
        calls[f"{family} hoisted"] = split(adapter(network).hoisted(t, y.unique()))
        if compiled:
            calls[f"{family} compiled"] = split(adapter(network, compile=True).hoisted(t, y.unique()))
    # On a CPU the process's own seconds: a busy machine changes them little.
    seconds = timed_in_turn(calls, device.type, rounds, time.process_time if device.type == "cpu" else None)
    entry: dict[str, Any] = {"rows": rows, "dtype": timing.dtype_name(dtype), "rounds": rounds}
    for name in calls:
        family, way = name.split()
        if way == "forward":
            entry[f"{family} forward_s"] = float(np.median(seconds[name]))
        else:
            entry[name] = [
                float(q) for q in np.quantile(seconds[name] / seconds[f"{family} forward"], [0.25, 0.5, 0.75])
            ]
    return entry


def gaussian_kl(mean: Tensor, std: Tensor, other_mean: Tensor, other_std: Tensor) -> Tensor:
    """``KL(N(mean, std^2) || N(other))`` of diagonal Gaussians, summed over elements: ``[R]``."""
    ratio = (std / other_std).double() ** 2
    gap = ((mean - other_mean) / other_std).double() ** 2
    return 0.5 * (gap + ratio - 1 - ratio.log()).flatten(1).sum(1)


def rounding(model: DiT, dtype: torch.dtype, num_steps: int) -> dict[str, Any]:
    """A row among six against the row alone, and against the float32 network, over whole chains of six images."""
    device = model.pos_embed.device
    schedule = DDPMSchedule(num_steps)
    table = schedule.table("learned_range").to(device)
    labels = torch.arange(ROWS, device=device)
    steps = schedule.timesteps.to(device)
    exact = DiTTarget(model).hoisted(steps, labels)
    target = DiTTarget(copy.deepcopy(model).to(dtype)).hoisted(steps, labels)
    generator = torch.Generator(device).manual_seed(0)
    state = torch.randn(ROWS, *target.latent_shape, generator=generator, device=device)
    largest, bounds = (
        0.0,
        {"alone": torch.zeros(ROWS, dtype=torch.float64), "float32": torch.zeros(ROWS, dtype=torch.float64)},
    )
    differing = 0
    for k in range(num_steps):
        t = steps[k].expand(ROWS)

        def call(network: DiTTarget, rows: slice, t: Tensor = t, state: Tensor = state) -> Tensor:
            h = network.features(state[rows], t[rows], labels[rows])
            return network.head(h, t[rows], labels[rows]).float()

        packed = call(target, slice(None))
        others = {
            "alone": torch.cat([call(target, slice(i, i + 1)) for i in range(ROWS)]),
            "float32": call(exact, slice(None)),
        }
        gap = (packed - others["alone"]).abs()
        largest = max(largest, float(gap.max() / packed.abs().max()))
        differing += int((gap > 0).flatten(1).any(1).sum())
        mean, std = gaussian_transition(state, packed, table[k].expand(ROWS, -1))
        if k + 1 < num_steps:
            for name, output in others.items():
                other = gaussian_transition(state, output, table[k].expand(ROWS, -1))
                bounds[name] += (gaussian_kl(mean, std, *other) / 2).clamp(min=0).sqrt().cpu()
        state = torch.addcmul(mean, std, torch.randn(state.shape, generator=generator, device=device))
    return {
        "dtype": timing.dtype_name(dtype),
        "steps": num_steps,
        "images": ROWS,
        "rows that differ": differing / (num_steps * ROWS),
        "largest difference over largest output": largest,
        "total variation a step, packed against alone": float(bounds["alone"].mean()) / (num_steps - 1),
        "total variation a step, against float32": float(bounds["float32"].mean()) / (num_steps - 1),
    }


@torch.inference_mode()
def main() -> None:
    """Measure, print and merge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, help="merge figures into RESULTS/<device>/families.json")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", choices=("rounding", "cost"), help="half of it")
    parser.add_argument("--no-compile", action="store_true", help="leave out compiled targets")
    parser.add_argument("--quick", action="store_true", help="two rounds and ten steps: a smoke run, no figures")
    arguments = parser.parse_args()
    device, rounds = arguments.device, 2 if arguments.quick else 40

    def keep(name: str, entry: dict[str, Any]) -> None:
        entry |= {"threads": torch.get_num_threads()} if device == "cpu" else {}
        store.Keeper(arguments.results, "families", name).keep(device, entry)
        print(name, json.dumps(store.rounded(entry)), flush=True)

    digits = load_bundled("digits")[0].module.to(device)
    for dtype in DTYPES if arguments.only != "cost" else ():
        keep(f"rounding {timing.dtype_name(dtype)}", rounding(digits, dtype, 10 if arguments.quick else 250))
    models = {"digits": digits} if arguments.only != "rounding" else {}
    if models and device == "cuda":
        with torch.device(device):
            models["DiT-XL/2"] = randomise(DiT(dit_config("DiT-XL/2")))  # type: ignore[assignment]
    for name, model in models.items():
        for dtype in (torch.float32, torch.bfloat16):
            module = copy.deepcopy(model).to(dtype)
            for rows in (1, ROWS):
                entry = costs(module, rows, not arguments.no_compile, rounds)
                keep(f"cost {name} {timing.dtype_name(dtype)} {rows}", entry)


if __name__ == "__main__":
    main()
