"""Cost of ``feature_attention`` against ``F.scaled_dot_product_attention`` and FlexAttention.

FLOPs: those of the keys that may be seen. Bytes: what has to be read and written once. On the ragged problem the rivals
are handed keys and masks that are already joined, which the op does not need. Run with
``pytest benchmarks/ops/bench_attention.py --benchmark-only``.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from free_kernels.ops.attention import feature_attention
from free_kernels.ops.attention.reference import valid_slots

pytestmark = pytest.mark.usefixtures("one_thread")
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


def make(
    device: str, dtype: torch.dtype, rows: int, tokens: int, heads: int, head_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Slices of a fused qkv, as a linear layer leaves them."""
    g = torch.Generator(device).manual_seed(0)
    return torch.randn(rows, tokens, 3, heads, head_dim, generator=g, device=device).to(dtype).unbind(2)


def describe(rows: int, tokens: int, heads: int, head_dim: int) -> dict[str, int]:
    return {"rows": rows, "tokens": tokens, "heads": heads, "head_dim": head_dim}


@pytest.mark.parametrize("rival", ["ours", "sdpa"])
@pytest.mark.parametrize(("device", "dtype", "rows", "tokens", "heads", "head_dim"), SIZES)
def test_dense(
    measure: Callable[..., None],
    device: str,
    dtype: torch.dtype,
    rows: int,
    tokens: int,
    heads: int,
    head_dim: int,
    rival: str,
) -> None:
    q, k, v = make(device, dtype, rows, tokens, heads, head_dim)

    def sdpa() -> Tensor:
        return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)

    measure(
        sdpa if rival == "sdpa" else lambda: feature_attention(q, k, v),
        device=device,
        op="feature_attention, no memory",
        case=f"{rows} x {tokens} tokens, {heads} heads of {head_dim}",
        backend=rival,
        ours=rival == "ours",
        dtype=dtype,
        iterations=20,
        moved=4 * q.numel() * q.itemsize,
        flops=4 * rows * heads * tokens**2 * head_dim,
        params=describe(rows, tokens, heads, head_dim),
    )


@pytest.mark.parametrize("rival", ["ours", "sdpa_mask", "flex"])
@pytest.mark.parametrize(("device", "dtype", "rows", "tokens", "heads", "head_dim"), SIZES)
def test_ragged(
    measure: Callable[..., None],
    device: str,
    dtype: torch.dtype,
    rows: int,
    tokens: int,
    heads: int,
    head_dim: int,
    rival: str,
) -> None:
    """W = 3, rows with 0, 1 and 2 earlier steps in turn (one row alone: 1)."""
    if rival == "flex" and (device == "cpu" or head_dim != 72):
        pytest.skip("FlexAttention is compared on the GPU, with the heads of DiT-XL (each shape is compiled)")
    q, k, v = make(device, dtype, rows, tokens, heads, head_dim)
    cache_k, cache_v = torch.randn(2, rows, CAPACITY, tokens, heads, head_dim, device=device).to(dtype)
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
        call = flex_call(queries, keys, values, used, tokens)

    width = heads * head_dim
    with torch.inference_mode():
        want = feature_attention(q, k, v, cache_k, cache_v, length, position, backend="reference")
        got = call() if rival == "ours" else call().transpose(1, 2)
        torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)
    measure(
        call,
        device=device,
        op="feature_attention, memory of 0 to 2 steps",
        case=f"{rows} x {tokens} tokens, {heads} heads of {head_dim}",
        backend=rival,
        ours=rival == "ours",
        dtype=dtype,
        iterations=20,
        moved=(2 * rows * tokens + 2 * keys_seen) * width * q.itemsize,
        flops=4 * width * tokens * keys_seen,
        params=describe(rows, tokens, heads, head_dim) | {"capacity": CAPACITY},
    )


def flex_call(queries: Tensor, keys: Tensor, values: Tensor, used: Tensor, tokens: int) -> Callable[[], Tensor]:
    """FlexAttention compiled for these shapes."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return used[b, j // tokens]

    # Dynamo gives up on a function after eight shapes, and would then time the eager one.
    torch.compiler.reset()
    attend = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    block_mask = create_block_mask(visible, len(queries), None, tokens, keys.shape[2], device=str(queries.device))
    return lambda: attend(queries, keys, values, block_mask=block_mask)
