"""Cost of ``adaptive_norm``: compiled against eager PyTorch, on the CPU and on a GPU.

Bytes: what is read and written. The eager rival is the reference. Run with ``pytest benchmarks/ops/bench_norms.py
--benchmark-only``.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from free_kernels import extension
from free_kernels.ops.norms import NormArguments, adaptive_norm

pytestmark = pytest.mark.usefixtures("one_thread")
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
# Device, dtype, rows, tokens, width.
SIZES = [
    pytest.param("cpu", torch.float32, 1, 16, 96, id="digits-1"),
    pytest.param("cpu", torch.float32, 6, 16, 96, id="digits-6"),
    pytest.param("cpu", torch.float32, 64, 16, 96, id="digits-64"),
    pytest.param("cpu", torch.float32, 6, 256, 1152, id="xl256-6"),
    pytest.param("cuda", torch.bfloat16, 1, 256, 1152, id="cuda-xl256-1", marks=on_gpu),
    pytest.param("cuda", torch.bfloat16, 16, 1024, 1152, id="cuda-xl512-16", marks=on_gpu),
]
OURS = {"cpu": "extension", "cuda": "triton"}
# Where a modulation of a drafter's only block is: gate, shift, scale, gain.
CALLS = {"enter": (-1, 0, 1, -1), "half block": (2, 3, 4, -1), "leave": (5, 6, 7, 8)}


@pytest.mark.parametrize("rival", ["reference", "ours"])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(("device", "dtype", "rows", "tokens", "width"), SIZES)
def test_adaptive_norm(
    measure: Callable[..., None],
    device: str,
    dtype: torch.dtype,
    rows: int,
    tokens: int,
    width: int,
    call: str,
    rival: str,
) -> None:
    """The three calls of a drafter of one block."""
    if rival == "ours" and device == "cpu" and not extension.has_extension():
        pytest.skip(extension.why_no_extension())
    backend = OURS[device] if rival == "ours" else "reference"
    x = torch.randn(rows, tokens, width, device=device, dtype=dtype)
    update, modulations = torch.randn_like(x if call != "enter" else x[:1]), x.new_ones(rows, 9, width)
    skip = torch.randn_like(x) if call == "leave" else None
    arguments = NormArguments(x, update, modulations, skip, *CALLS[call], 1e-6)
    used = sum(place >= 0 for place in CALLS[call])
    measure(
        lambda: adaptive_norm(arguments, backend),
        device=device,
        op="adaptive_norm",
        case=f"{call}, {rows} rows of {tokens} x {width}",
        backend=backend,
        ours=rival == "ours",
        dtype=dtype,
        # Two results are written.
        moved=3 * x.nbytes + update.nbytes + used * modulations[:, 0].nbytes + (0 if skip is None else skip.nbytes),
        iterations=10 if rows * tokens * width > 1 << 20 else 100,
        params={"rows": rows, "tokens": tokens, "width": width},
    )
