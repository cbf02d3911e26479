"""Attention of a draft step to its own tokens and to a ring of earlier steps, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from free_kernels.ops.attention.arguments import AttentionArguments


def valid_slots(cache_length: Tensor, cache_position: Tensor, capacity: int, window: int | None = None) -> Tensor:
    """bool ``[R, C]``: which of a ring's ``C`` slots hold one of the latest ``window - 1`` valid steps.

    Args:
        cache_length: ``[R]`` int64 in ``[0, C]``.
        cache_position: ``[R]`` int64, slot of the latest step.
        capacity: C.
        window: steps that a query sees, its own included; ``C + 1`` if None.
    """
    age = (cache_position[:, None] - torch.arange(capacity, device=cache_position.device)) % capacity
    length = cache_length if window is None or window > capacity else cache_length.clamp(max=window - 1)
    return age < length[:, None]


def _join(own: Tensor, cache: Tensor, valid: Tensor) -> Tensor:
    """Own tokens, then the ring's: ``[R, (1 + C) T, H, Dh]``. Slots out of use become 0, because 0 * NaN is NaN."""
    cache = cache.masked_fill(~valid[:, :, None, None, None], 0)
    return torch.cat([own, cache.flatten(1, 2)], dim=1)


def _visible(valid: Tensor, tokens: int) -> Tensor:
    """bool ``[R, 1, 1, (1 + C) T]`` for the keys of :func:`_join`."""
    visible = valid.new_ones(valid.shape[0], 1 + valid.shape[1], tokens)
    visible[:, 1:] = valid[:, :, None]
    return visible.flatten(1)[:, None, None]


def feature_attention(arguments: AttentionArguments) -> Tensor:
    """Contract of :func:`free_kernels.ops.attention.feature_attention`; differentiable, float64 too."""
    q, k, v, cache_k, cache_v, cache_length, cache_position, scale, window = arguments
    mask = None
    if cache_k is not None and window != 1:
        valid = valid_slots(cache_length, cache_position, cache_k.shape[1], window)
        mask = _visible(valid, k.shape[1])
        k, v = _join(k, cache_k, valid), _join(v, cache_v, valid)
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask, scale=scale)
    return out.transpose(1, 2).contiguous()


def feature_attention_backward(
    grad: Tensor, arguments: AttentionArguments
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of :func:`feature_attention` by their closed form, because the kernel has no backward pass.

    With ``P = softmax(scale q k^T)``: ``dv = P^T g``, ``dS = P (g v^T - rowsum(g o))``, ``dq = scale dS k``,
    ``dk = scale dS^T q``. The whole of P, ``[R, H, T, (1 + C) T]``, is in memory; computed in float32 at least.

    Args:
        grad: ``[R, T, H, Dh]``, gradient of the output.
        arguments: as in :func:`feature_attention`.

    Returns:
        Gradients of q, k, v, cache_k and cache_v (None without a cache; zero in slots out of use).
    """
    q, k, v, cache_k, cache_v, cache_length, cache_position, scale, window = arguments
    wide = torch.promote_types(q.dtype, torch.float32)
    tokens, scale = q.shape[1], q.shape[-1] ** -0.5 if scale is None else scale
    cached = cache_k is not None and window != 1
    keys, values = k, v
    if cached:
        valid = valid_slots(cache_length, cache_position, cache_k.shape[1], window)
        keys, values = _join(k, cache_k, valid), _join(v, cache_v, valid)
    g, queries, keys, values = (x.to(wide).transpose(1, 2) for x in (grad, q, keys, values))
    scores = queries @ keys.mT * scale
    if cached:
        scores = scores.masked_fill(~_visible(valid, tokens), -torch.inf)
    p = scores.softmax(dim=-1)
    dp = g @ values.mT
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
    dq, dk, dv = (x.transpose(1, 2).to(q.dtype) for x in (ds @ keys, ds.mT @ queries, p.mT @ g))
    if cache_k is None:
        return dq, dk, dv, None, None
    if not cached:
        return dq, dk, dv, torch.zeros_like(cache_k), torch.zeros_like(cache_v)
    caches = (x[:, tokens:].unflatten(1, cache_k.shape[1:3]).contiguous() for x in (dk, dv))
    return dq, dk[:, :tokens].contiguous(), dv[:, :tokens].contiguous(), *caches


def append_features(
    cache_k: Tensor, cache_v: Tensor, k: Tensor, v: Tensor, cache_length: Tensor, cache_position: Tensor
) -> None:
    """Contract of :func:`free_kernels.ops.attention.append_features`."""
    capacity = cache_k.shape[1]
    cache_position.add_(1).remainder_(capacity)
    cache_length.add_(1).clamp_(max=capacity)
    # Autograd keeps the index for the backward pass, and the counter is changed in place by later calls.
    keeps_index = torch.is_grad_enabled() and (k.requires_grad or v.requires_grad)
    slot = cache_position.clone() if keeps_index else cache_position
    row = torch.arange(k.shape[0], device=k.device)
    cache_k.index_put_((row, slot), k)
    cache_v.index_put_((row, slot), v)
