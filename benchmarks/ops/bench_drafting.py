"""Cost of the drafting ops: compiled against eager PyTorch, on the CPU and on a GPU.

Bytes: what is read and written. The eager rival is the reference. Run with ``pytest benchmarks/ops/bench_drafting.py
--benchmark-only``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from free_kernels import extension
from free_kernels.ops.drafting import (
    AdvanceArguments,
    KeepArguments,
    KeepCleanArguments,
    ReplayArguments,
    api,
    keep_clean_rows,
    keep_rows,
    replay_drafts,
)
from free_kernels.ops.tokens import TokenArguments, drafter_tokens

pytestmark = pytest.mark.usefixtures("one_thread")
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
# Device, slots, rows of each, latent, feature.
SIZES = [
    pytest.param("cpu", 1, 6, (1, 8, 8), (16, 64), id="digits-1"),
    pytest.param("cpu", 64, 12, (1, 8, 8), (16, 64), id="digits-64"),
    pytest.param("cpu", 1, 6, (4, 32, 32), (256, 1152), id="xl256-1"),
    pytest.param("cuda", 1, 12, (4, 32, 32), (256, 1152), id="cuda-xl256-1", marks=on_gpu),
    pytest.param("cuda", 16, 12, (4, 64, 64), (1024, 1152), id="cuda-xl512-16", marks=on_gpu),
]
OURS = {"cpu": "extension", "cuda": "triton"}


def choose(device: str, rival: str) -> str:
    """The backend of a rival; skips where the extension is not there."""
    if rival == "reference":
        return rival
    if device == "cpu" and not extension.has_extension():
        pytest.skip(extension.why_no_extension())
    return OURS[device]


@pytest.mark.parametrize("rival", ["reference", "ours"])
@pytest.mark.parametrize(("device", "slots", "length", "latent", "feature"), SIZES)
def test_advance_drafts(
    measure: Callable[..., None],
    device: str,
    slots: int,
    length: int,
    latent: tuple[int, ...],
    feature: tuple[int, ...],
    rival: str,
) -> None:
    backend, drafts = choose(device, rival), slots * (length - 1)
    states, noise = torch.randn(2, slots, length, *latent, device=device).unbind()
    rows = torch.arange(drafts, device=device).view(slots, length - 1)
    output = torch.randn(drafts, *latent, device=device)
    arguments = AdvanceArguments(
        states.contiguous(),
        *(torch.empty(slots, length - 1, *latent, device=device) for _ in range(2)),
        noise.contiguous(),
        0.1 * torch.randn(slots, length, 8, device=device),
        output,
        rows,
        0,
        length - 1,
        1.0,
        latent[0],
        math.inf,
    )
    row = states[0, 0].nbytes
    measure(
        lambda: api.ADVANCE(arguments, arguments.states, backend),
        device=device,
        op="advance_drafts",
        case=f"{slots} slots, {length - 1} drafts of {math.prod(latent)}",
        backend=backend,
        ours=rival == "ours",
        # State, noise and output in, three results out.
        moved=drafts * row * 6,
        iterations=100,
        params={"slots": slots, "length": length, "latent": latent, "feature": feature},
    )


@pytest.mark.parametrize("rival", ["reference", "ours"])
@pytest.mark.parametrize(("device", "slots", "length", "latent", "feature"), SIZES)
@pytest.mark.parametrize("seen", [False, True], ids=["carried", "old rows"])
def test_replay_drafts(
    measure: Callable[..., None],
    device: str,
    slots: int,
    length: int,
    latent: tuple[int, ...],
    feature: tuple[int, ...],
    seen: bool,
    rival: str,
) -> None:
    """All drafts carried along from the row before, or each from a row of its step."""
    backend, drafts = choose(device, rival), slots * (length - 1)
    states, noise = torch.randn(2, slots, length, *latent, device=device).unbind()
    held, clean = torch.randn(2, drafts, *latent, device=device).unbind()
    places = torch.arange(drafts, device=device).view(slots, length - 1)
    arguments = ReplayArguments(
        states.contiguous(),
        *(torch.empty(slots, length - 1, *latent, device=device) for _ in range(2)),
        noise.contiguous(),
        0.1 * torch.randn(50, 8, device=device),
        torch.full((slots,), 20, device=device),
        held.contiguous(),
        clean.contiguous(),
        places if seen else torch.full_like(places, -1),
        torch.arange(slots, device=device),
        torch.ones(slots, 3, 2, device=device),
        torch.ones(slots, 2, *latent, device=device),
        math.inf,
    )
    row = states[0, 0].nbytes
    measure(
        lambda: replay_drafts(arguments, backend),
        device=device,
        op="replay_drafts",
        case=f"{slots} slots, {length - 1} drafts of {math.prod(latent)}, {'old rows' if seen else 'carried'}",
        backend=backend,
        ours=rival == "ours",
        # State and noise in, three results out; states and clean samples of old rows; sums of elements.
        moved=drafts * row * (7 if seen else 5) + arguments.pattern.nbytes,
        iterations=100,
        params={"slots": slots, "length": length, "latent": latent, "feature": feature},
    )


@pytest.mark.parametrize("rival", ["reference", "ours"])
@pytest.mark.parametrize(("device", "slots", "length", "latent", "feature"), SIZES)
def test_keep_clean_rows(
    measure: Callable[..., None],
    device: str,
    slots: int,
    length: int,
    latent: tuple[int, ...],
    feature: tuple[int, ...],
    rival: str,
) -> None:
    """All rows of a round, as after a refusal of the first draft."""
    backend, places = choose(device, rival), length + 2
    ones, held = torch.ones(slots, dtype=torch.int64, device=device), (slots, places, *latent)
    arguments = KeepCleanArguments(
        torch.randn(slots, length, *latent, device=device),
        torch.randn(slots * length, *latent, device=device),
        torch.arange(slots + 1, device=device) * length,
        ones,
        ones * length,
        ones * 20,
        0.1 * torch.randn(50, 8, device=device),
        torch.arange(slots, device=device) * places + 19 % (places - 1),
        # The last committed step, 20, was asked about before.
        torch.full((slots, places), 20, device=device),
        torch.zeros(held, device=device),
        torch.zeros(held, device=device),
        torch.zeros(slots, 3, 2, device=device),
        torch.zeros(slots, 2, *latent, device=device),
        1.0,
        latent[0],
        math.inf,
    )
    measure(
        lambda: keep_clean_rows(arguments, backend),
        device=device,
        op="keep_clean_rows",
        case=f"{slots} slots, {length} rows of {math.prod(latent)}",
        backend=backend,
        ours=rival == "ours",
        # Rows are measured, then read again and written; so are sums of elements.
        moved=3 * (arguments.states.nbytes + arguments.output.nbytes + arguments.pattern.nbytes),
        iterations=20,
        params={"slots": slots, "length": length, "latent": latent, "feature": feature},
    )


@pytest.mark.parametrize("rival", ["reference", "ours"])
@pytest.mark.parametrize(("device", "slots", "length", "latent", "feature"), SIZES)
def test_keep_rows(
    measure: Callable[..., None],
    device: str,
    slots: int,
    length: int,
    latent: tuple[int, ...],
    feature: tuple[int, ...],
    rival: str,
) -> None:
    """All rows of a round, as after a refusal of the first draft."""
    backend, rows, places = choose(device, rival), slots * length, length + 1
    ones = torch.ones(slots, dtype=torch.int64, device=device)
    arguments = KeepArguments(
        torch.randn(slots, length, *latent, device=device),
        torch.randn(rows, *feature, device=device),
        torch.randn(rows, *latent, device=device),
        torch.arange(slots + 1, device=device) * length,
        ones,
        ones * length,
        ones * 20,
        torch.full((slots, places), -1, device=device),
        torch.empty(slots, places, *latent, device=device),
        torch.empty(1, slots, places, *feature, device=device),
    )
    measure(
        lambda: keep_rows(arguments, backend),
        device=device,
        op="keep_rows",
        case=f"{slots} slots, {length} rows of {math.prod(latent)}, features {feature[0]} x {feature[1]}",
        backend=backend,
        ours=rival == "ours",
        # Rows in and out; outputs are looked at.
        moved=2 * (arguments.states.nbytes + arguments.features.nbytes) + arguments.output.nbytes,
        iterations=20,
        params={"slots": slots, "length": length, "latent": latent, "feature": feature},
    )


@pytest.mark.parametrize("rival", ["reference", "ours"])
@pytest.mark.parametrize(("device", "slots", "length", "latent", "feature"), SIZES)
def test_drafter_tokens(
    measure: Callable[..., None],
    device: str,
    slots: int,
    length: int,
    latent: tuple[int, ...],
    feature: tuple[int, ...],
    rival: str,
) -> None:
    """A drafter's call on all slots, with all three inputs."""
    backend = choose(device, rival)
    patch = math.isqrt(latent[1] * latent[2] // feature[0])
    arguments = TokenArguments(
        torch.randn(slots, *feature, device=device),
        torch.randn(slots, *latent, device=device),
        torch.randn(slots, *latent, device=device),
        torch.zeros(slots, dtype=torch.int64, device=device),
        torch.ones(1000, device=device),
        *(1, patch, patch, 0, 1, 2),
    )
    measure(
        lambda: drafter_tokens(arguments, backend),
        device=device,
        op="drafter_tokens",
        case=f"{slots} rows of {math.prod(latent)}, features {feature[0]} x {feature[1]}",
        backend=backend,
        ours=rival == "ours",
        moved=2 * arguments.feature.nbytes + 5 * arguments.state.nbytes,
        iterations=100,
        params={"slots": slots, "latent": latent, "feature": feature},
    )
