"""Heads of layer norm, modulation, linear layer and unpatchify, as one call on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from free_kernels.conditioning import ConditioningTable
from free_kernels.extension import why_no_kernel
from free_kernels.ops.final_layer import FinalLayerArguments, final_layer
from free_kernels.ops.final_layer.reference import unpatchify
from free_kernels.ops.rounds import HeadAdvanceArguments, advance_from_features
from free_kernels.targets.inspection import global_hooks, is_abstract, is_replaced, tensors_of


class HeadParts(NamedTuple):
    """What a head is made of.

    Attributes:
        norm: of the features.
        linear: from features to the O values of a token.
        unpatchify: from tokens ``[R, T, O]`` to the output.
        tokens: T.
        grid_rows: rows of the grid of tokens.
        patch: rows and columns of a token's patch.
    """

    norm: nn.Module
    linear: nn.Module
    unpatchify: Callable[[Tensor], Tensor]
    tokens: int
    grid_rows: int
    patch: tuple[int, int]


class FusedHead:
    """A head in one call of :func:`~free_kernels.ops.final_layer.final_layer`; made by :func:`fused_head`.

    Args:
        parts: the head's.
        table: modulations ``[N, 2, 1, D]``.
        shape: of the output of a row.
    """

    def __init__(self, parts: HeadParts, table: ConditioningTable, shape: torch.Size) -> None:
        self._linear, self._table, self._shape = parts.linear, table.parts, shape
        self._settings = parts.norm.eps, parts.grid_rows, *parts.patch

    def __call__(self, h: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The output of features ``[R, T, D]``."""
        output = final_layer(FinalLayerArguments(*self._given(h, t.contiguous(), y.contiguous())))
        return output if len(self._shape) == 3 else output.view(-1, *self._shape)

    def advance(self, h: Tensor, t: Tensor, y: Tensor, *drafts: Any) -> None:
        """A draft from features ``[R, T, D]``, without the output; ``drafts``: the rest of the op's arguments.

        ``t`` and ``y [R]`` are contiguous.
        """
        h = h if h.dtype == torch.float32 else h.float()
        advance_from_features(HeadAdvanceArguments(*self._given(h, t, y), *drafts))

    def _given(self, h: Tensor, t: Tensor, y: Tensor) -> tuple[Any, ...]:
        # Every draft asks: a module's own way to its parameters takes longer than some of the op's arithmetic.
        weights = self._linear._parameters
        return h.contiguous(), *self._table, t, y, weights["weight"], weights["bias"], *self._settings


def fused_head(parts: HeadParts, table: ConditioningTable) -> FusedHead | None:
    """The head in one call, where that is compiled and computes what the parts do; else None.

    That is: they are PyTorch's own modules with nothing attached, of float32 on the CPU as the table is, the norm has
    no weights, and tokens are laid out as the op does it.
    """
    norm, linear = parts.norm, parts.linear
    if why_no_kernel("final_layer_cpu", "cpu") is not None or global_hooks():
        return None
    if type(norm) is not nn.LayerNorm or type(linear) is not nn.Linear:
        return None
    if is_replaced(norm) or is_replaced(linear) or is_abstract(tensors_of([norm, linear])):
        return None
    if norm.weight is not None or norm.bias is not None or norm.normalized_shape != (linear.in_features,):
        return None
    weights = [linear.weight] if linear.bias is None else [linear.weight, linear.bias]
    if linear.bias is not None and not linear.bias.is_contiguous():
        return None
    if not (norm.eps > 0 and all(type(weight) is nn.Parameter for weight in weights)):
        return None
    if not all(_is_plain(tensor) for tensor in (*weights, table.parts[0])):
        return None
    numbers, ours = _layout(parts.tokens, linear.out_features, parts.grid_rows, parts.patch)
    own = parts.unpatchify(numbers.clone())[0]
    alike = own.dtype == ours.dtype and torch.equal(own.flatten(), ours)
    return FusedHead(parts, table, own.shape) if alike else None


def is_differentiating() -> bool:
    """Whether gradients are recorded, or tangents carried along, which they are under ``no_grad``, too."""
    return torch.is_grad_enabled() or forward_ad._current_level >= 0


def _is_plain(tensor: Tensor) -> bool:
    return tensor.is_cpu and tensor.dtype == torch.float32 and tensor.layout == torch.strided


@lru_cache(maxsize=16)
def _layout(tokens: int, values: int, grid_rows: int, patch: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """A row's tokens ``[1, T, O]`` of numbers that differ, of both signs; and the op's order of them."""
    count = tokens * values
    numbers = torch.arange(count, dtype=torch.float32, device="cpu").sub_(count / 2).view(1, tokens, values)
    return numbers, unpatchify(numbers, grid_rows, *patch).flatten()
