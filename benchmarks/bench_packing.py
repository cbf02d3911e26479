"""Cost of a call of the packing and random-number ops, compiled against eager PyTorch, on the CPU.

Each benchmark states the bytes that it reads and writes; ``extra_info`` holds them and the rate they give. Run with
``pytest benchmarks/bench_packing.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from free_kernels import extension
from free_kernels.ops.packing import commit_drafts, pack_drafts
from free_kernels.ops.random import philox_normal

DRAFT_LENGTH, NUM_STEPS = 6, 250
BACKENDS = [
    "reference",
    pytest.param(
        "extension",
        marks=pytest.mark.skipif(not extension.has_extension(), reason=str(extension.why_no_extension())),
    ),
]
SIZES = [
    pytest.param(1, (1, 8, 8), (16, 64), id="digits-1"),
    pytest.param(64, (1, 8, 8), (16, 64), id="digits-64"),
    pytest.param(1, (4, 32, 32), (256, 1152), id="xl256-1"),
]


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def measure(benchmark: Any, moved_bytes: int, call: Callable[[], object]) -> None:
    with torch.inference_mode():
        benchmark.pedantic(call, rounds=50, iterations=100, warmup_rounds=2)
    benchmark.extra_info["bytes"] = moved_bytes
    benchmark.extra_info["GB/s"] = round(moved_bytes / benchmark.stats.stats.median / 1e9, 3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("slots", "latent", "feature"), SIZES)
@pytest.mark.parametrize("null_label", [None, 10], ids=["plain", "guided"])
def test_pack_drafts(
    benchmark: Any,
    slots: int,
    latent: tuple[int, ...],
    feature: tuple[int, ...],
    null_label: int | None,
    backend: str,
) -> None:
    states = torch.randn(slots, DRAFT_LENGTH, *latent)
    zeros = torch.zeros(slots, dtype=torch.int64)
    arguments = (states, zeros + DRAFT_LENGTH, zeros, zeros, torch.arange(NUM_STEPS), slots * DRAFT_LENGTH)
    branches = 1 if null_label is None else 2
    moved = states.nbytes * (1 + branches)
    measure(benchmark, moved, lambda: pack_drafts(*arguments, null_label, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("slots", "latent", "feature"), SIZES)
def test_commit_drafts(
    benchmark: Any, slots: int, latent: tuple[int, ...], feature: tuple[int, ...], backend: str
) -> None:
    zeros = torch.zeros(slots, dtype=torch.int64)
    written = {
        "state": torch.randn(slots, *latent),
        "previous": torch.randn(slots, *latent),
        "parent": torch.randn(1, slots, *feature),
        "steps": zeros.clone(),
        "images": torch.arange(slots),
        "labels": zeros.clone(),
        "samples": torch.randn(2 * slots, *latent),
        "all_labels": torch.zeros(2 * slots, dtype=torch.int64),
        "queue": torch.tensor([slots]),
    }
    arguments = (
        zeros + 2,
        torch.randn(slots, *latent),
        torch.randn(slots, DRAFT_LENGTH, *latent),
        torch.randn(slots * DRAFT_LENGTH, *feature),
        torch.arange(slots + 1) * DRAFT_LENGTH,
    )
    moved = 2 * (written["state"].nbytes + written["previous"].nbytes + written["parent"].nbytes)

    # A chain so long that no image ends: every call does the same work.
    def call() -> None:
        commit_drafts(*arguments, **written, num_steps=10**9, backend=backend)

    measure(benchmark, moved, call)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("keys", "numel"), [(6, 64), (384, 64), (6, 4096)])
def test_philox_normal(benchmark: Any, keys: int, numel: int, backend: str) -> None:
    index = torch.arange(keys)
    measure(benchmark, 4 * keys * numel, lambda: philox_normal(1, index, index, 1, numel, backend=backend))
