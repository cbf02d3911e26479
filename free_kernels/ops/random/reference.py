"""Philox4x32-10 in plain PyTorch int64 arithmetic: the oracle and the fallback of the compiled ops.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from free_kernels.ops.random.arguments import PhiloxArguments

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four 32-bit output words, as int64, of counters that broadcast together (taken modulo 2**32)."""
    key0, key1 = seed & _MASK, seed >> 32 & _MASK
    c0, c1, c2, c3 = (word & _MASK for word in counter)
    for _ in range(10):
        # The products overflow int64, but their low 64 bits, of which both halves are used, are right.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = (product1 >> 32 & _MASK) ^ c1 ^ key0, product1 & _MASK
        c2, c3 = (product0 >> 32 & _MASK) ^ c3 ^ key1, product0 & _MASK
        key0, key1 = (key0 + _WEYL[0]) & _MASK, (key1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _uniform_words(arguments: PhiloxArguments) -> Tensor:
    """Uniforms in (0, 1] by block and output word: float32 ``[M, ceil(numel / 4), 4]``."""
    seed, images, steps, purpose, numel, rounds = arguments
    block = torch.arange((numel + 3) // 4, device=images.device)[None, :]
    last = torch.full_like(images, purpose) if rounds is None else purpose + 256 * rounds
    words = philox((block, steps[:, None], images[:, None], last[:, None]), seed)
    words = torch.stack(torch.broadcast_tensors(*words), dim=-1)
    return (words.to(torch.float32) * 2.0**-32 + 2.0**-33).clamp(max=1.0)


def philox_uniform(arguments: PhiloxArguments) -> Tensor:
    """Contract of :func:`free_kernels.ops.random.philox_uniform`."""
    return _uniform_words(arguments).flatten(1)[:, : arguments.numel].contiguous()


def philox_normal(arguments: PhiloxArguments) -> Tensor:
    """Contract of :func:`free_kernels.ops.random.philox_normal`."""
    uniform = _uniform_words(arguments)
    radius = (-2.0 * uniform[..., 0::2].log()).sqrt()
    angle = 2.0 * math.pi * uniform[..., 1::2]
    normal = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1)
    return normal.flatten(1)[:, : arguments.numel].contiguous()
