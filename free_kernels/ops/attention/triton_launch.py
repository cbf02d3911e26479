"""``feature_attention`` on the GPU: block sizes, launch, and the configurations that are compiled ahead of time."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from free_kernels.ops.aot import POINTERS, AotConfiguration, Device, configuration
from free_kernels.ops.attention.arguments import AttentionArguments
from free_kernels.ops.attention.triton_kernels import feature_attention_kernel
from free_kernels.ops.triton_device import current, limits

INTERPRETED = not isinstance(feature_attention_kernel, triton.runtime.JITFunction)


@dataclass(frozen=True)
class Configuration:
    """Block sizes and launch options of one problem."""

    block_m: int  # queries of a program
    block_n: int  # keys that a program handles at a time
    block_d: int  # columns of the first part of a head
    block_e: int  # columns of the second part; 0 if the head dimension is a power of two
    num_warps: int
    num_stages: int  # depth of the software pipeline over key blocks


def configure(
    dtype: torch.dtype, head_dim: int, tokens: int, row_heads: int, processors: int, shared: int
) -> Configuration:
    """Blocks for ``row_heads`` = R * H problems of ``tokens`` queries.

    ``processors`` is the device's number of multiprocessors, ``shared`` the bytes of shared memory that a program may
    have. The result depends on shapes and device only, so that a CUDA graph can hold the launch.
    """
    block_d = 1 << (head_dim.bit_length() - 1)
    rest = head_dim - block_d
    block_e = max(16, triton.next_power_of_2(rest)) if rest else 0
    fits = max(16, triton.next_power_of_2(tokens))
    if dtype == torch.float32:
        # Exact float32 products do not use the tensor cores and keep their operands in registers, so blocks of keys are
        # small, and smaller where masks or a short second part of a head need registers; with masks queries are fewer.
        block_n = min(32 if block_d < 128 and block_e != 16 and tokens % 32 == 0 else 16, fits)
        block_m = min(64 if tokens % block_n == 0 else 32, fits)
        c = Configuration(block_m, block_n, block_d, block_e, 8 if block_m == 64 else 4, 2)
    else:
        # Large blocks read keys less often; small blocks keep all multiprocessors busy when there are few queries.
        block_m = 128 if row_heads * triton.cdiv(tokens, 128) >= 2 * processors else 64
        # For narrow heads, 64 keys with 64 queries would spill registers on sm_100.
        block_n = min(32 if block_m == 64 and head_dim < 64 else 64, fits)
        block_m = min(block_m, fits)
        # A warp's matrix product has 16 queries: with more warps, those of narrow heads would have to split the keys.
        num_warps = 8 if block_m == 128 and head_dim > 64 else 2 if block_m == 32 and head_dim < 64 else 4
        c = Configuration(block_m, block_n, block_d, block_e, num_warps, 3)
    return _shrink(c, dtype, shared)


def _shrink(c: Configuration, dtype: torch.dtype, shared: int) -> Configuration:
    """The configuration made to fit ``shared`` bytes, or the smallest one: first fewer stages, then fewer keys.

    The compiler keeps at most this in shared memory: the block of queries, one block of keys and one of values for each
    stage, and on sm_100 1 KiB of barriers.
    """

    def needed(c: Configuration) -> int:
        return (c.block_m + 2 * c.num_stages * c.block_n) * (c.block_d + c.block_e) * dtype.itemsize + 1024

    while needed(c) > shared:
        if c.num_stages > 2:
            c = replace(c, num_stages=c.num_stages - 1)
        elif c.block_n > 32:
            c = replace(c, block_n=c.block_n // 2)
        elif c.block_m > 32:
            c = replace(c, block_m=c.block_m // 2, num_warps=4)
        elif c.block_n > 16:
            c = replace(c, block_n=c.block_n // 2)
        elif c.num_stages > 1:
            c = replace(c, num_stages=1)
        elif c.block_m > 16:
            c = replace(c, block_m=c.block_m // 2)
        else:
            return c
    return c


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


def feature_attention(arguments: AttentionArguments) -> Tensor:
    """Contract of :func:`free_kernels.ops.attention.feature_attention`; arguments have been checked."""
    q, k, v, cache_k, cache_v, cache_length, cache_position, scale, window = arguments
    if INTERPRETED and q.dtype == torch.bfloat16:
        # Triton's interpreter computes wrong values in bfloat16.
        wide = (x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments)
        return feature_attention(AttentionArguments(*wide)).to(q.dtype)
    rows, tokens, heads, head_dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    scale = (head_dim**-0.5 if scale is None else scale) * math.log2(math.e)
    cached = cache_k is not None and window != 1
    capacity = cache_k.shape[1] if cached else 1
    c = configure(q.dtype, head_dim, tokens, rows * heads, *limits(q.device))
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    with current(q):
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


def aot_configurations(device: Device) -> list[AotConfiguration]:
    """Every case that :func:`configure` distinguishes on 132 multiprocessors, with and without masks."""
    small, large = 1, 10**6
    found = []
    for head_dim in (32, 64, 72, 96, 128):
        for tokens, row_heads in ((25, large), (200, large), (256, small), (256, large)):
            found.append(_aot(device, torch.bfloat16, head_dim, tokens, row_heads, True))
        for tokens in (25, 256):
            found.append(_aot(device, torch.float32, head_dim, tokens, large, True))
    found += [_aot(device, torch.float16, head_dim, 256, large, True) for head_dim in (64, 72)]
    found.append(_aot(device, torch.bfloat16, 64, 16, large, True))
    for head_dim, dtype in itertools.product((64, 72), (torch.bfloat16, torch.float32)):
        found.append(_aot(device, dtype, head_dim, 256, large, False))
    return found


def _aot(
    device: Device, dtype: torch.dtype, head_dim: int, tokens: int, row_heads: int, cached: bool
) -> AotConfiguration:
    """What a launch on slices of a fused qkv with 16 heads compiles."""
    c = configure(dtype, head_dim, tokens, row_heads, 132, device.shared)
    values = _constants(c, head_dim, tokens, cached) | {"ALIGN": 16 // dtype.itemsize}
    pointers = [name for name in feature_attention_kernel.arg_names if name.startswith("p_")]
    types = dict.fromkeys(pointers, POINTERS[dtype]) | {"scale": "fp32"}
    if cached:
        types |= dict.fromkeys(("p_length", "p_position"), POINTERS[torch.int64])
    group = f"feature_attention {POINTERS[dtype][1:]} dim {head_dim}"
    return configuration(
        feature_attention_kernel,
        types,
        values,
        ["stride_q_row", "stride_k_row", "stride_v_row"],
        label=f"{group} T {tokens} {c.block_m} x {c.block_n}{'' if cached else ' uncached'}",
        group=group,
        # Masks take registers, too.
        size=2 * c.block_m * (c.block_d + c.block_e) * dtype.itemsize + (not values["EVEN"]),
        num_warps=c.num_warps,
        num_stages=c.num_stages,
    )
