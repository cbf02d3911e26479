"""What needs a process of its own, because Triton settles while it is imported whether it interprets.

``attention_worker.py interpret`` runs the kernel in the interpreter, ``attention_worker.py aot`` compiles it to machine
code without a GPU. Each prints one line of JSON.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from typing import Any

os.environ["TRITON_INTERPRET"] = str(int(sys.argv[1:] == ["interpret"]))

import torch
from rounding import attention_rounding

import free_kernels.ops.attention.triton_launch as kernels
from free_kernels.ops.aot import DEVICES, compile_configuration
from free_kernels.ops.attention import feature_attention
from free_kernels.ops.attention.reference import valid_slots

HEAD_DIMS, TOKENS, WINDOWS = (32, 72, 128), (5, 16, 33), (None, 2, 1)


def make(head_dim: int, tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Slices of a fused qkv and a ring of 3: rows with none, some (wrapped around the end) and all slots valid."""
    g = torch.Generator().manual_seed(1000 * head_dim + tokens)
    q, k, v = torch.randn(4, tokens, 3, 2, head_dim, generator=g).to(dtype).unbind(2)
    cache_k, cache_v = torch.randn(2, 4, 3, tokens, 2, head_dim, generator=g).to(dtype)
    length, position = torch.tensor([0, 2, 1, 3]), torch.tensor([1, 0, 2, 1])
    used = valid_slots(length, position, 3)
    # Whatever is not valid must not be read.
    cache_k[~used], cache_v[~used] = torch.nan, torch.nan
    return q, k, v, cache_k, cache_v, length, position


def poisoned_empty(*arguments: object, **options: object) -> torch.Tensor:
    return torch.full(*arguments, torch.nan, **options)


def interpret() -> dict[str, Any]:
    """For each case: error and eager's error against float64, what rounding may add, whether the output is well formed.

    The control is a case whose kernel is given queries off by 2^-16, which is an eighth of what tf32 rounds them by.
    """
    assert kernels.INTERPRETED
    # The kernel's output starts as NaN: an element that is never written shows.
    kernels.torch = type("Poisoned", (), {"__getattr__": lambda _, name: getattr(torch, name)})()
    kernels.torch.empty = poisoned_empty
    results, scale = [], 0.2
    for head_dim, tokens, window, dtype in itertools.product(
        HEAD_DIMS, TOKENS, WINDOWS, (torch.float32, torch.float16, torch.bfloat16)
    ):
        if dtype != torch.float32 and (tokens != 5 or window is not None):
            continue
        arguments = make(head_dim, tokens, dtype)
        exact = feature_attention(
            *(x.double() if x.is_floating_point() else x for x in arguments), window=window, scale=scale
        )
        got = feature_attention(*arguments, window=window, scale=scale, backend="triton")
        eager = feature_attention(*arguments, window=window, scale=scale, backend="reference")
        case = f"{str(dtype).removeprefix('torch.')}-{head_dim}-{tokens}-{window}"
        errors = [float((x.double() - exact).abs().max()) for x in (got, eager)]
        q, k, v, *ring = arguments[:5]
        allowed = attention_rounding(q, k, v, scale, *ring)
        results.append([case, *errors, allowed, got.is_contiguous() and got.dtype == dtype])
        if case == "float32-72-16-None":
            wrong = feature_attention(q * (1 + 2.0**-16), *arguments[1:], window=window, scale=scale, backend="triton")
            control = [float((wrong.double() - exact).abs().max()), errors[1], allowed]
    return {"cases": results, "control": control}


def aot() -> list[dict[str, Any]]:
    """The configurations of the head dimensions of DiT, compiled for two devices."""
    return [
        compile_configuration(c, device)._asdict()
        for device in (DEVICES["sm_80"], DEVICES["sm_90"])
        for c in kernels.aot_configurations(device)
        if "bf16 dim 64 T 256" in c.label or "bf16 dim 72 T 2" in c.label
    ]


if __name__ == "__main__":
    print(json.dumps(interpret() if sys.argv[1] == "interpret" else aot()))
