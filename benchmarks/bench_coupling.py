"""Cost of ``couple``: eager PyTorch on the CPU; Triton against eager and compiled PyTorch on a GPU.

Each benchmark states the bytes that have to move: what the row pass needs of every draft and the commit pass of every
slot, read once, and the new states. ``extra_info`` holds them and the rate that they give; on a GPU also its percentage
of the bandwidth of a large copy, measured in the same run. Run with ``pytest benchmarks/bench_coupling.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import timing
import torch

from free_kernels.reference import coupling as reference

CUDA = torch.cuda.is_available()
on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not CUDA, reason="needs a CUDA device"),
    pytest.mark.benchmark(timer=timing.DeviceClock()) if CUDA else pytest.mark.benchmark,
]
GUIDANCE = {"guidance_scale": 4.0, "guidance_channels": 3, "clip": math.inf}
PLAIN = {"guidance_scale": 1.0, "guidance_channels": 4, "clip": math.inf}
# Slots, rows of each, latent.
CPU_SIZES = [
    pytest.param(1, 6, (1, 8, 8), id="digits-1"),
    pytest.param(64, 6, (1, 8, 8), id="digits-64"),
    pytest.param(1, 6, (4, 32, 32), id="xl256-1"),
    pytest.param(1, 6, (4, 64, 64), id="xl512-1"),
]
GPU_SIZES = [
    pytest.param(1, 6, (4, 32, 32), id="6x4096"),
    pytest.param(1, 6, (4, 64, 64), id="6x16384"),
    pytest.param(64, 8, (4, 64, 64), id="512x16384"),
]


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(
    slots: int, length: int, latent: tuple[int, ...], guided: bool, dtype: torch.dtype, device: str
) -> tuple[torch.Tensor | None, ...]:
    """Arguments of a round with learned variance; drafts are near the target's, so that rounds end at various rows."""
    g = torch.Generator(device).manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=g, device=device)  # noqa: E731
    channels, numel = latent[0], math.prod(latent)
    states, noise, slack_noise = (normal(slots, length, *latent) for _ in range(3))
    columns = torch.zeros(slots, length, 8, device=device)
    columns[..., 0], columns[..., 1], columns[..., 2], columns[..., 3] = 1.0, -0.1, -3.0, 0.1
    output = normal((2 if guided else 1) * slots * length, 2 * channels, *latent[1:]).to(dtype)
    options = (GUIDANCE if guided else PLAIN) | {"guidance_channels": min(3, channels) if guided else channels}
    mean, std = reference.gaussian_transition(states.flatten(0, 1), output, columns.flatten(0, 1), **options)
    mean, std = (x.view(slots, length, *latent)[:, :-1].contiguous() for x in (mean, std))
    mean += 0.7 / math.sqrt(numel) * std * normal(*mean.shape)
    uniform = 1 - torch.rand(slots, length, generator=g, device=device)
    offsets = torch.arange(slots + 1, device=device) * length
    slack = torch.full((slots, length), 0.9, device=device)
    return states, mean, std, noise, slack_noise, uniform, output, offsets, columns, slack, None


def moved_bytes(slots: int, length: int, latent: tuple[int, ...], guided: bool, dtype: torch.dtype, made: bool) -> int:
    """Each input once per pass, noise unless it is made in place; every slot counted as ending on a direct draw.

    A slot that ends on a reflection reads the draft's mean, deviation and slack noise of that row as well.
    """
    guided_part = min(3, latent[0]) / latent[0] if guided else 0.0
    noise, output = 0 if made else 4, dtype.itemsize * (2 + guided_part)
    per_draft = 3 * 4 + 2 * noise + output
    per_slot = 4 + noise + output + 4
    return round(math.prod(latent) * slots * ((length - 1) * per_draft + per_slot))


def record(benchmark: Any, needed: int, bandwidth: float | None) -> None:
    rate = needed / benchmark.stats.stats.median
    benchmark.extra_info["bytes"] = needed
    benchmark.extra_info["GB/s"] = round(rate / 1e9, 3)
    if bandwidth is not None:
        benchmark.extra_info["copy GB/s"] = round(bandwidth / 1e9, 1)
        benchmark.extra_info["percent of copy"] = round(100 * rate / bandwidth, 1)
        benchmark.extra_info["device"] = torch.cuda.get_device_name()


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize(("slots", "length", "latent"), CPU_SIZES)
def test_couple_on_cpu(benchmark: Any, slots: int, length: int, latent: tuple[int, ...], guided: bool) -> None:
    arguments = make(slots, length, latent, guided, torch.float32, "cpu")
    channels = latent[0]
    options = (GUIDANCE if guided else PLAIN) | {"guidance_channels": min(3, channels) if guided else channels}
    with torch.inference_mode():
        benchmark.pedantic(lambda: reference.couple(*arguments, **options), rounds=30, iterations=10, warmup_rounds=2)
    record(benchmark, moved_bytes(slots, length, latent, guided, torch.float32, made=False), None)


@cache
def compiled() -> Callable[..., object]:
    return torch.compile(reference.couple, fullgraph=True, dynamic=False)


@pytest.mark.parametrize("rival", ["triton", "triton-philox", "eager", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize(
    ("slots", "length", "latent"), [pytest.param(*size.values, id=size.id, marks=on_gpu) for size in GPU_SIZES]
)
def test_couple_on_gpu(
    benchmark: Any, slots: int, length: int, latent: tuple[int, ...], dtype: torch.dtype, rival: str
) -> None:
    arguments = make(slots, length, latent, True, dtype, "cuda")
    if rival.startswith("triton"):
        from free_kernels.triton import coupling as kernels

        states, mean, std, _, _, _, *rest = arguments
        images = torch.arange(slots, device="cuda")
        steps = torch.arange(length, device="cuda").repeat(slots, 1)
        calls: dict[str, Callable[[], object]] = {
            "triton": lambda: kernels.couple(*arguments, **GUIDANCE),
            "triton-philox": lambda: kernels.couple_philox(states, mean, std, 1, images, steps, *rest, **GUIDANCE),
        }
        call = calls[rival]
    else:
        function = reference.couple if rival == "eager" else compiled()
        call = lambda: function(*arguments, **GUIDANCE)  # noqa: E731
    bandwidth = timing.copy_bandwidth()
    with torch.inference_mode():
        benchmark.pedantic(call, rounds=100, iterations=1, warmup_rounds=10)
    made = rival == "triton-philox"
    record(benchmark, moved_bytes(slots, length, latent, True, dtype, made), bandwidth)
