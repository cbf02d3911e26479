"""Cost of ``couple``, ``couple_block``: C++ against eager PyTorch on a CPU, Triton against eager and compiled on a GPU.

Bytes: what the row pass needs of every draft and the commit pass of every slot, read once, and the new states. FLOPs:
see :func:`needed_flops`. Run with ``pytest benchmarks/ops/bench_coupling.py --benchmark-only``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from free_kernels.ops.coupling import (
    couple,
    couple_block,
    couple_block_philox,
    couple_philox,
    gaussian_transition,
    reference,
)
from free_kernels.ops.coupling import reference_block as block
from free_kernels.ops.coupling.arguments import CouplingArguments

pytestmark = pytest.mark.usefixtures("one_thread")
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
# Slots, rows of each, latent.
CPU_SIZES = [
    pytest.param(1, 6, (1, 8, 8), id="digits-1"),
    pytest.param(64, 6, (1, 8, 8), id="digits-64"),
    pytest.param(1, 6, (4, 32, 32), id="xl256-1"),
    pytest.param(1, 6, (4, 64, 64), id="xl512-1"),
    pytest.param(64, 6, (4, 32, 32), id="xl256-64"),
]
GPU_SIZES = [
    pytest.param(1, 6, (4, 32, 32), id="6x4096", marks=on_gpu),
    pytest.param(1, 6, (4, 64, 64), id="6x16384", marks=on_gpu),
    pytest.param(64, 8, (4, 64, 64), id="512x16384", marks=on_gpu),
]
Arguments = tuple[Tensor, ...]


def options_of(latent: tuple[int, ...], guided: bool) -> dict[str, Any]:
    """Guidance 4 on at most three channels, or none."""
    if not guided:
        return {"guidance_scale": 1.0, "guidance_channels": latent[0], "clip": math.inf}
    return {"guidance_scale": 4.0, "guidance_channels": min(3, latent[0]), "clip": math.inf}


def make(
    slots: int, length: int, latent: tuple[int, ...], guided: bool, dtype: torch.dtype, device: str
) -> tuple[Arguments, Arguments, Arguments]:
    """Drafts, random numbers and the rest of a round with learned variance.

    Drafts are near the target's, so that rounds end at various rows.
    """
    g = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device=device)

    channels, numel = latent[0], math.prod(latent)
    states, noise, slack_noise = (normal(slots, length, *latent) for _ in range(3))
    columns = torch.zeros(slots, length, 8, device=device)
    columns[..., 0], columns[..., 1], columns[..., 2], columns[..., 3] = 1.0, -0.1, -3.0, 0.1
    output = normal((2 if guided else 1) * slots * length, 2 * channels, *latent[1:]).to(dtype)
    flat = states.flatten(0, 1), output, columns.flatten(0, 1)
    mean, std = (
        x.view(slots, length, *latent)[:, :-1].contiguous()
        for x in gaussian_transition(*flat, **options_of(latent, guided))
    )
    mean += 0.7 / math.sqrt(numel) * std * normal(*mean.shape)
    uniform = 1 - torch.rand(slots, length, generator=g, device=device)
    offsets = torch.arange(slots + 1, device=device) * length
    return (states, mean, std), (noise, slack_noise, uniform), (output, offsets, columns)


def guided_share(latent: tuple[int, ...], guided: bool) -> float:
    return min(3, latent[0]) / latent[0] if guided else 0.0


def needed_bytes(
    slots: int,
    length: int,
    latent: tuple[int, ...],
    guided: bool,
    dtype: torch.dtype,
    made: bool,
    learned: bool = True,
) -> int:
    """Each input once per pass, noise unless it is ``made`` in place; every slot counted as ending on a direct draw.

    A slot that ends on a reflection or a residual also reads the draft's mean, deviation and slack noise of that row.
    """
    noise, output = 0 if made else 4, dtype.itemsize * (1 + learned + guided_share(latent, guided))
    per_draft = 3 * 4 + (1 + learned) * noise + output
    per_slot = 4 + noise + output + 4
    return round(math.prod(latent) * slots * ((length - 1) * per_draft + per_slot))


def needed_flops(slots: int, length: int, latent: tuple[int, ...], guided: bool) -> int:
    """Each addition, product, quotient, root, exponential and comparison counted as one; noise is not counted.

    Nor is what a slot's rows cost, not their elements: the decision.

    Of an element of a drafted row, with learned variance: mean 3, deviation 3, whitened gap 2, ratio of the variances
    2, root of what is shared and its error 6, shared noise 2, products of these 4, thirteen sums of products 26, error
    and extreme of the ratios 4. Of an element of a slot's last row, drawn directly: mean 3, deviation 3, draw 2.
    Guidance adds 3 in its channels.
    """
    guidance = 3 * guided_share(latent, guided)
    return round(math.prod(latent) * slots * ((length - 1) * (52 + guidance) + 8 + guidance))


def describe(slots: int, length: int, latent: tuple[int, ...]) -> dict[str, Any]:
    return {"slots": slots, "length": length, "latent": latent}


Measure = Callable[..., None]
guidance = pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
cpu_sizes = pytest.mark.parametrize(("slots", "length", "latent"), CPU_SIZES)
cpu_rivals = pytest.mark.parametrize("rival", ["extension", "eager"])
rivals = pytest.mark.parametrize("rival", ["triton", "triton-philox", "eager", "compiled"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
gpu_sizes = pytest.mark.parametrize(("slots", "length", "latent"), GPU_SIZES)


def on_cpu(
    measure: Measure,
    name: str,
    slots: int,
    length: int,
    latent: tuple[int, ...],
    guided: bool,
    rival: str,
    learned: bool = True,
) -> None:
    """Measure one of the two ops by one of its backends; a fixed variance is the first half of the output."""
    drafts, (noise, slack_noise, uniform), (output, *rest) = make(slots, length, latent, guided, torch.float32, "cpu")
    if not learned:
        slack_noise, output = None, output[:, : latent[0]].contiguous()
    options = options_of(latent, guided) | {"backend": "reference" if rival == "eager" else rival}
    op = {"couple": couple, "couple_block": couple_block}[name]
    kind = f"{'guided' if guided else 'plain'}{'' if learned else ', fixed variance'}"
    measure(
        lambda: op(*drafts, noise, slack_noise, uniform, output, *rest, **options),
        device="cpu",
        op=name,
        case=f"{slots} x {length} rows of {math.prod(latent)}, {kind}, float32 output",
        backend=rival,
        ours=rival == "extension",
        moved=needed_bytes(slots, length, latent, guided, torch.float32, made=False, learned=learned),
        flops=needed_flops(slots, length, latent, guided) if learned else 0,
        params=describe(slots, length, latent),
    )


@cpu_rivals
@guidance
@cpu_sizes
def test_couple_on_cpu(
    measure: Measure, slots: int, length: int, latent: tuple[int, ...], guided: bool, rival: str
) -> None:
    on_cpu(measure, "couple", slots, length, latent, guided, rival)


@cpu_rivals
@cpu_sizes
def test_couple_with_a_fixed_variance_on_cpu(
    measure: Measure, slots: int, length: int, latent: tuple[int, ...], rival: str
) -> None:
    on_cpu(measure, "couple", slots, length, latent, False, rival, learned=False)


@cpu_rivals
@guidance
@cpu_sizes
def test_couple_block_on_cpu(
    measure: Measure, slots: int, length: int, latent: tuple[int, ...], guided: bool, rival: str
) -> None:
    on_cpu(measure, "couple_block", slots, length, latent, guided, rival)


def on_gpu(
    measure: Measure, name: str, slots: int, length: int, latent: tuple[int, ...], dtype: torch.dtype, rival: str
) -> None:
    """Measure one of the two ops or one of its rivals."""
    drafts, drawn, rest = make(slots, length, latent, True, dtype, "cuda")
    options = options_of(latent, True)
    images = torch.arange(slots, device="cuda")
    steps = torch.arange(length, device="cuda").repeat(slots, 1)
    # Dynamo gives up on a function after a few shapes; each of ours is compiled afresh.
    torch.compiler.reset()
    tensors, keys = (*drafts, *drawn, *rest), (*drafts, 1, images, steps, *rest)
    if name == "couple":
        op, by_keys, rounds, eager = couple, couple_philox, {}, reference.couple
    else:
        op, by_keys, rounds, eager = couple_block, couple_block_philox, {"rounds": images}, block.couple_block
    arguments = CouplingArguments(*tensors, relaxation=None, **options)
    compiled = torch.compile(eager, fullgraph=True, dynamic=False)
    calls: dict[str, Callable[[], object]] = {
        "triton": lambda: op(*tensors, backend="triton", **options),
        "triton-philox": lambda: by_keys(*keys, **rounds, backend="triton", **options),
        "eager": lambda: eager(arguments),
        "compiled": lambda: compiled(arguments),
    }
    measure(
        calls[rival],
        device="cuda",
        op=name,
        case=f"{slots} x {length} rows of {math.prod(latent)}, guided, {str(dtype).removeprefix('torch.')} output",
        backend=rival,
        ours=rival == "triton",
        moved=needed_bytes(slots, length, latent, True, dtype, rival == "triton-philox"),
        flops=needed_flops(slots, length, latent, True),
        params=describe(slots, length, latent),
    )


@rivals
@dtypes
@gpu_sizes
def test_couple_on_gpu(
    measure: Measure, slots: int, length: int, latent: tuple[int, ...], dtype: torch.dtype, rival: str
) -> None:
    on_gpu(measure, "couple", slots, length, latent, dtype, rival)


@rivals
@dtypes
@gpu_sizes
def test_couple_block_on_gpu(
    measure: Measure, slots: int, length: int, latent: tuple[int, ...], dtype: torch.dtype, rival: str
) -> None:
    on_gpu(measure, "couple_block", slots, length, latent, dtype, rival)
