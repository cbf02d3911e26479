"""Cost of ``feature_attention`` against ``F.scaled_dot_product_attention`` and FlexAttention.

Each benchmark states the FLOPs of the keys that may be seen and the bytes of what has to be read and written once;
``extra_info`` holds them and the rates they give. On the ragged problem the rivals are handed keys and masks that are
already joined, which the op does not need. Run with ``pytest benchmarks/bench_attention.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import timing
import torch
import torch.nn.functional as F
from torch import Tensor

from free_kernels.ops.attention import feature_attention
from free_kernels.reference.attention import valid_slots

needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
# id, device, dtype, rows, tokens, heads, head dimension
SIZES = [
    pytest.param("cpu", torch.float32, 6, 16, 2, 32, id="cpu-digits-6"),
    pytest.param("cpu", torch.float32, 64, 16, 2, 32, id="cpu-digits-64"),
    pytest.param("cpu", torch.float32, 1, 256, 16, 72, id="cpu-xl256-1"),
    *(
        pytest.param("cuda", torch.bfloat16, rows, tokens, 16, head_dim, id=name, marks=needs_gpu)
        for rows in (1, 8, 64)
        for tokens in (256, 1024)
        for head_dim in (64, 72)
        for name in [f"cuda-{rows}x{tokens}-dim{head_dim}"]
    ),
]
CAPACITY = 2


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def measure(benchmark: Any, device: str, flops: int, moved_bytes: int, call: Callable[[], object]) -> None:
    with torch.inference_mode():
        if device == "cuda":
            benchmark._timer = timing.DeviceClock()
            benchmark.pedantic(call, rounds=100, iterations=1, warmup_rounds=10)
        else:
            benchmark.pedantic(call, rounds=30, iterations=20, warmup_rounds=2)
    seconds = benchmark.stats.stats.median
    benchmark.extra_info.update(flops=flops, bytes=moved_bytes)
    benchmark.extra_info["GFLOP/s"] = round(flops / seconds / 1e9, 2)
    benchmark.extra_info["GB/s"] = round(moved_bytes / seconds / 1e9, 3)


def make(device: str, dtype: torch.dtype, rows: int, tokens: int, heads: int, head_dim: int) -> tuple[Tensor, ...]:
    """Slices of a fused qkv, as a linear layer leaves them."""
    g = torch.Generator().manual_seed(0)
    return torch.randn(rows, tokens, 3, heads, head_dim, generator=g).to(device, dtype).unbind(2)


@cache
def flex() -> tuple[Callable[..., Tensor], Callable[..., object]]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    return torch.compile(flex_attention, dynamic=False), create_block_mask


@pytest.mark.parametrize("rival", ["ours", "sdpa"])
@pytest.mark.parametrize(("device", "dtype", "rows", "tokens", "heads", "head_dim"), SIZES)
def test_dense(
    benchmark: Any, device: str, dtype: torch.dtype, rows: int, tokens: int, heads: int, head_dim: int, rival: str
) -> None:
    q, k, v = make(device, dtype, rows, tokens, heads, head_dim)

    def sdpa() -> Tensor:
        return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)

    call = sdpa if rival == "sdpa" else lambda: feature_attention(q, k, v)
    measure(benchmark, device, 4 * rows * heads * tokens**2 * head_dim, 4 * q.numel() * q.itemsize, call)


@pytest.mark.parametrize("rival", ["ours", "sdpa_mask", "flex"])
@pytest.mark.parametrize(("device", "dtype", "rows", "tokens", "heads", "head_dim"), SIZES)
def test_ragged(
    benchmark: Any, device: str, dtype: torch.dtype, rows: int, tokens: int, heads: int, head_dim: int, rival: str
) -> None:
    """W = 3, rows with 0, 1 and 2 earlier steps in turn (one row alone: 1)."""
    if rival == "flex" and device == "cpu":
        pytest.skip("FlexAttention is compared on the GPU")
    q, k, v = make(device, dtype, rows, tokens, heads, head_dim)
    cache_k, cache_v = torch.randn(2, rows, CAPACITY, tokens, heads, head_dim).to(device, dtype)
    length = torch.arange(rows) % (CAPACITY + 1) if rows > 1 else torch.ones(1, dtype=torch.int64)
    keys_seen = tokens * (rows + int(length.sum()))
    length, position = length.to(device), torch.arange(rows, device=device) % CAPACITY
    used = F.pad(valid_slots(length, position, CAPACITY), (1, 0), value=True)
    keys, values = (
        torch.cat([own[:, None], cache], dim=1).flatten(1, 2).transpose(1, 2)
        for own, cache in ((k, cache_k), (v, cache_v))
    )
    queries = q.transpose(1, 2)
    if rival == "ours":

        def call() -> Tensor:
            return feature_attention(q, k, v, cache_k, cache_v, length, position)

    elif rival == "sdpa_mask":
        mask = used.repeat_interleave(tokens, dim=1)[:, None, None].expand(-1, -1, tokens, -1)

        def call() -> Tensor:
            return F.scaled_dot_product_attention(queries, keys, values, mask)

    else:
        attend, create_block_mask = flex()

        def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return used[b, j // tokens]

        block_mask = create_block_mask(visible, rows, None, tokens, keys.shape[2], device=device)

        def call() -> Tensor:
            return attend(queries, keys, values, block_mask=block_mask)

    width = heads * head_dim
    moved = (2 * rows * tokens + 2 * keys_seen) * width * q.itemsize
    with torch.inference_mode():
        want = feature_attention(q, k, v, cache_k, cache_v, length, position, backend="reference")
        got = call() if rival == "ours" else call().transpose(1, 2)
        torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)
    measure(benchmark, device, 4 * width * tokens * keys_seen, moved, call)
