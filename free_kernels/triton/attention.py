"""``feature_attention`` on the GPU: block sizes, launch, and the configurations that are compiled ahead of time."""

from __future__ import annotations

import contextlib
import itertools
import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from free_kernels.triton.aot import POINTERS, AotConfiguration
from free_kernels.triton.attention_kernels import feature_attention_kernel

INTERPRETED = not isinstance(feature_attention_kernel, triton.runtime.JITFunction)


@dataclass(frozen=True)
class Configuration:
    """Block sizes and launch options of one problem.

    Attributes:
        block_m: queries of a program.
        block_n: keys of a step.
        block_d, block_e: columns of a head's two parts; ``block_e`` is 0 if the head dimension is a power of two.
        num_warps: warps of a program.
        num_stages: depth of the software pipeline over key blocks.
    """

    block_m: int
    block_n: int
    block_d: int
    block_e: int
    num_warps: int
    num_stages: int


def configure(dtype: torch.dtype, head_dim: int, tokens: int, row_heads: int, processors: int) -> Configuration:
    """Blocks for ``row_heads`` = R * H problems of ``tokens`` queries on a device with ``processors`` SMs.

    Depends on shapes only, so a captured graph never changes its grid.
    """
    block_d = 1 << (head_dim.bit_length() - 1)
    rest = head_dim - block_d
    block_e = max(16, triton.next_power_of_2(rest)) if rest else 0
    fits = max(16, triton.next_power_of_2(tokens))
    if dtype == torch.float32:
        # Exact float32 products run on the ordinary cores and hold their operands in registers: narrow blocks of keys,
        # and of queries too where masks need registers.
        block_n = min(32 if block_d + block_e < 128 else 16, fits)
        block_m = min(64 if tokens % block_n == 0 else 32, fits)
        return Configuration(block_m, block_n, block_d, block_e, 8 if block_m == 64 else 4, 2)
    # Large blocks read keys less often; small ones fill the device when there are few queries.
    block_m = 128 if row_heads * triton.cdiv(tokens, 128) >= 2 * processors else 64
    block_m, block_n = min(block_m, fits), min(64, fits)
    num_warps = 8 if block_m == 128 and head_dim > 64 else 4
    return Configuration(block_m, block_n, block_d, block_e, num_warps, 3)


def _constants(c: Configuration, head_dim: int, tokens: int, cached: bool) -> dict[str, object]:
    return {
        "HEAD_DIM": head_dim,
        "BLOCK_M": c.block_m,
        "BLOCK_N": c.block_n,
        "BLOCK_D": c.block_d,
        "BLOCK_E": c.block_e,
        "EVEN": tokens % c.block_n == 0,
        "CACHED": cached,
    }


def feature_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache_k: Tensor | None,
    cache_v: Tensor | None,
    cache_length: Tensor | None,
    cache_position: Tensor | None,
    scale: float | None,
    window: int | None,
) -> Tensor:
    """Contract of :func:`free_kernels.ops.attention.feature_attention`; arguments have been checked."""
    if INTERPRETED and q.dtype == torch.bfloat16:
        # The interpreter's bfloat16 arithmetic is wrong.
        wide = (None if x is None else x.float() for x in (q, k, v, cache_k, cache_v))
        return feature_attention(*wide, cache_length, cache_position, scale, window).to(q.dtype)
    rows, tokens, heads, head_dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    scale = (head_dim**-0.5 if scale is None else scale) * math.log2(math.e)
    cached = cache_k is not None and window != 1
    capacity = cache_k.shape[1] if cached else 1
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 1
    c = configure(q.dtype, head_dim, tokens, rows * heads, processors)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    with torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext():
        feature_attention_kernel[(rows * heads * triton.cdiv(tokens, c.block_m),)](
            q,
            k,
            v,
            cache_k if cached else k,
            cache_v if cached else v,
            cache_length if cached else k,
            cache_position if cached else k,
            out,
            *strides,
            tokens,
            heads,
            capacity,
            capacity + 1 if window is None else window,
            scale,
            **_constants(c, head_dim, tokens, cached),
            ALIGN=math.gcd(16 // q.element_size(), head_dim, *strides),
            num_warps=c.num_warps,
            num_stages=c.num_stages,
        )
    return out


def aot_configurations() -> list[AotConfiguration]:
    """Every kind of problem that :func:`configure` tells apart on 132 processors, with and without masks."""
    small, large = 1, 10**6
    found = []
    for head_dim in (32, 64, 72, 96, 128):
        for tokens, row_heads in ((25, large), (200, large), (256, small), (256, large)):
            found.append(_aot(torch.bfloat16, head_dim, tokens, row_heads, True))
        for tokens in (25, 256):
            found.append(_aot(torch.float32, head_dim, tokens, large, True))
    found += [_aot(torch.float16, head_dim, 256, large, True) for head_dim in (64, 72)]
    found.append(_aot(torch.bfloat16, 64, 16, large, True))
    for head_dim, dtype in itertools.product((64, 72), (torch.bfloat16, torch.float32)):
        found.append(_aot(dtype, head_dim, 256, large, False))
    return found


def _aot(dtype: torch.dtype, head_dim: int, tokens: int, row_heads: int, cached: bool) -> AotConfiguration:
    """What the launch of a fused qkv of 16 heads compiles."""
    c = configure(dtype, head_dim, tokens, row_heads, 132)
    constants = _constants(c, head_dim, tokens, cached) | {"ALIGN": 16 // dtype.itemsize}
    names = [name for name in feature_attention_kernel.arg_names if name not in constants]
    signature = {name: POINTERS[dtype] if name.startswith("p_") else "i32" for name in names} | {"scale": "fp32"}
    if cached:
        signature |= {name: POINTERS[torch.int64] for name in ("p_length", "p_position")}
    divisible = [name for name in names if name.startswith("p_") or name.endswith("_row")]
    label = f"feature_attention {POINTERS[dtype][1:]} dim {head_dim} T {tokens} {c.block_m} x {c.block_n}"
    return AotConfiguration(
        label if cached else f"{label} uncached",
        feature_attention_kernel,
        signature,
        constants,
        c.num_warps,
        c.num_stages,
        divisible,
    )
