"""Cost of packing, committing and random numbers: compiled against eager PyTorch, on the CPU and on a GPU.

Bytes: what is read and written. The eager rivals are the reference, which decides everything in tensors, and on a GPU
also a bare gather with indices that are already there (for the random numbers: ``torch.randn``, which has no keys). Run
with ``pytest benchmarks/ops/bench_packing.py --benchmark-only``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from free_kernels import extension
from free_kernels.ops.packing import commit_drafts, pack_drafts
from free_kernels.ops.random import philox_normal

pytestmark = pytest.mark.usefixtures("one_thread")
NUM_STEPS, NULL_LABEL = 250, 10
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
# Device, slots, rows of each, latent, feature. The last ones hold 64 MiB and more of states and of parent features.
SIZES = [
    pytest.param("cpu", 1, 6, (1, 8, 8), (16, 64), id="digits-1"),
    pytest.param("cpu", 64, 6, (1, 8, 8), (16, 64), id="digits-64"),
    pytest.param("cpu", 1, 6, (4, 32, 32), (256, 1152), id="xl256-1"),
    pytest.param("cuda", 1, 6, (4, 32, 32), (256, 1152), id="cuda-xl256-1", marks=on_gpu),
    pytest.param("cuda", 128, 8, (4, 64, 64), (1024, 1152), id="cuda-xl512-128", marks=on_gpu),
    pytest.param("cuda", 1024, 6, (4, 32, 32), (256, 1152), id="cuda-xl256-1024", marks=on_gpu),
]
# Device, keys, numbers of each.
DRAWS = [
    pytest.param("cpu", 6, 64, id="6x64"),
    pytest.param("cpu", 384, 64, id="384x64"),
    pytest.param("cpu", 6, 4096, id="6x4096"),
    pytest.param("cuda", 6, 4096, id="cuda-6x4096", marks=on_gpu),
    pytest.param("cuda", 4096, 16384, id="cuda-4096x16384", marks=on_gpu),
]


def backend_or_skip(op: str, device: str, rival: str) -> None:
    """Skip where the extension is not there, or a rival has no meaning."""
    if rival == "extension":
        reason = extension.why_no_kernel(op, device)
        if reason is not None:
            pytest.skip(reason)
    if rival in ("gather", "randn", "triton") and device == "cpu":
        pytest.skip(f"{rival} is compared on the GPU")


def describe(slots: int, length: int, latent: tuple[int, ...], feature: tuple[int, ...]) -> dict[str, Any]:
    return {"slots": slots, "length": length, "latent": latent, "feature": feature}


@pytest.mark.parametrize("rival", ["reference", "gather", "extension"])
@pytest.mark.parametrize(("device", "slots", "length", "latent", "feature"), SIZES)
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
def test_pack_drafts(
    measure: Callable[..., None],
    device: str,
    slots: int,
    length: int,
    latent: tuple[int, ...],
    feature: tuple[int, ...],
    guided: bool,
    rival: str,
) -> None:
    backend_or_skip("pack_drafts", device, rival)
    states = torch.randn(slots, length, *latent, device=device)
    # Ragged where there are several slots: 1 ... L rows in turn.
    lengths = torch.arange(slots, device=device).neg() % length + 1 if slots > 1 else torch.tensor([length]).to(device)
    rows, branches = int(lengths.sum()), 2 if guided else 1
    zeros = torch.zeros(slots, dtype=torch.int64, device=device)
    arguments = (states, lengths, zeros, zeros, torch.arange(NUM_STEPS, device=device), rows)
    null_label = NULL_LABEL if guided else None
    flat = states.flatten(0, 1)
    used = torch.arange(length, device=device) < lengths[:, None]
    index = used.flatten().nonzero().squeeze(1).repeat(branches)
    calls: dict[str, Callable[[], object]] = {"gather": lambda: flat.index_select(0, index)}
    measure(
        calls.get(rival, lambda: pack_drafts(*arguments, null_label, backend=rival)),
        device=device,
        op="pack_drafts",
        case=f"{slots} slots, {rows} rows of {math.prod(latent)}, {'guided' if guided else 'plain'}",
        backend=rival,
        ours=rival == "extension",
        moved=rows * (1 + branches) * states[0, 0].nbytes,
        iterations=100,
        params=describe(slots, length, latent, feature),
    )


@pytest.mark.parametrize("rival", ["reference", "gather", "extension"])
@pytest.mark.parametrize(("device", "slots", "length", "latent", "feature"), SIZES)
def test_commit_drafts(
    measure: Callable[..., None],
    device: str,
    slots: int,
    length: int,
    latent: tuple[int, ...],
    feature: tuple[int, ...],
    rival: str,
) -> None:
    """No image ends, however many calls there are: every call does the same work."""
    backend_or_skip("commit_drafts", device, rival)
    zeros = torch.zeros(slots, dtype=torch.int64, device=device)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    written = {
        "state": torch.randn(slots, *latent, device=device),
        "previous": torch.randn(slots, *latent, device=device),
        "parent": torch.randn(1, slots, *feature, device=device, dtype=dtype),
        "steps": zeros.clone(),
        "images": torch.arange(slots, device=device),
        "labels": zeros.clone(),
        "samples": torch.randn(2 * slots, *latent, device=device),
        "all_labels": torch.zeros(2 * slots, dtype=torch.int64, device=device),
        "queue": torch.tensor([slots], device=device),
    }
    next_states = torch.randn(slots, *latent, device=device)
    draft_states = torch.randn(slots, length, *latent, device=device)
    features = torch.randn(slots * length, *feature, device=device, dtype=dtype)
    arguments = (zeros + 2, next_states, draft_states, features, torch.arange(slots + 1, device=device) * length)
    row = torch.arange(slots, device=device) * length + 1

    def gather() -> None:
        torch.index_select(features, 0, row, out=written["parent"][0])
        torch.index_select(draft_states.flatten(0, 1), 0, row, out=written["previous"])
        written["state"].copy_(next_states)

    measure(
        gather if rival == "gather" else lambda: commit_drafts(*arguments, **written, num_steps=10**9, backend=rival),
        device=device,
        op="commit_drafts",
        case=f"{slots} slots of {math.prod(latent)}, features of {math.prod(feature)}",
        backend=rival,
        ours=rival == "extension",
        moved=2 * (written["state"].nbytes + written["previous"].nbytes + written["parent"].nbytes),
        iterations=100,
        params=describe(slots, length, latent, feature),
    )


@pytest.mark.parametrize("rival", ["reference", "randn", "extension", "triton"])
@pytest.mark.parametrize(("device", "keys", "numel"), DRAWS)
def test_philox_normal(measure: Callable[..., None], device: str, keys: int, numel: int, rival: str) -> None:
    if device == "cuda" and rival == "extension":
        pytest.skip("on a GPU the random numbers are Triton's")
    backend_or_skip("philox_normal", device, rival)
    index = torch.arange(keys, device=device)

    def randn() -> Tensor:
        return torch.randn(keys, numel, device=device)

    measure(
        randn if rival == "randn" else lambda: philox_normal(1, index, index, 1, numel, backend=rival),
        device=device,
        op="philox_normal",
        case=f"{keys} keys, {numel} numbers of each",
        backend=rival,
        ours=rival == ("triton" if device == "cuda" else "extension"),
        moved=4 * keys * numel,
        iterations=100,
        params={"keys": keys, "numel": numel},
    )
