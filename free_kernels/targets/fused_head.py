"""Heads of layer norm, modulation, linear layer and unpatchify, as one call on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from free_kernels.conditioning import ConditioningTable
from free_kernels.ops.final_layer import FinalLayerArguments, final_layer
from free_kernels.ops.final_layer.reference import unpatchify
from free_kernels.targets.inspection import is_abstract, is_replaced


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
    """A head in one call of :func:`~free_kernels.ops.final_layer.final_layer`.

    Args:
        parts: of which :func:`fused_head` says that this is the same.
        table: modulations ``[N, 2, 1, D]``.
        shape: of the output of a row.
    """

    def __init__(self, parts: HeadParts, table: ConditioningTable, shape: torch.Size) -> None:
        self._linear, self._table, self._shape = parts.linear, table.parts, shape
        self._settings = parts.norm.eps, parts.grid_rows, *parts.patch

    def __call__(self, h: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The output of features ``[R, T, D]``."""
        given = h.contiguous(), *self._table, t.contiguous(), y.contiguous()
        output = final_layer(FinalLayerArguments(*given, self._linear.weight, self._linear.bias, *self._settings))
        return output if len(self._shape) == 3 else output.view(-1, *self._shape)


def fused_head(parts: HeadParts, table: ConditioningTable) -> FusedHead | None:
    """The head in one call, where that computes what its parts do.

    That is: they are PyTorch's own modules with nothing attached, of float32 on the CPU, the norm has no weights, and
    tokens are laid out as the op does it.
    """
    norm, linear = parts.norm, parts.linear
    if type(norm) is not nn.LayerNorm or type(linear) is not nn.Linear:
        return None
    if is_replaced(norm) or is_replaced(linear) or is_abstract([norm, linear]):
        return None
    weights = [linear.weight] if linear.bias is None else [linear.weight, linear.bias]
    if norm.weight is not None or norm.normalized_shape != (linear.in_features,):
        return None
    if not all(type(w) is nn.Parameter and w.is_cpu and w.dtype == torch.float32 for w in weights):
        return None
    shape = _shape_of_output(parts, linear.out_features)
    return None if shape is None else FusedHead(parts, table, shape)


# By function, as long as it lives, and what it is called with. Whatever else it depends on, the comparison with the
# module's own call sees.
_SHAPES: WeakKeyDictionary[object, dict[tuple[object, ...], torch.Size | None]] = WeakKeyDictionary()


def _shape_of_output(parts: HeadParts, values: int) -> torch.Size | None:
    """Shape of a row's output, if tokens of so many values are laid out as the op does it; else None."""
    key = parts.tokens, parts.grid_rows, parts.patch, values
    known = _SHAPES.setdefault(getattr(parts.unpatchify, "__func__", parts.unpatchify), {})
    if key not in known:
        numbers = torch.arange(parts.tokens * values, dtype=torch.float32, device="cpu").view(1, parts.tokens, values)
        own, ours = parts.unpatchify(numbers)[0], unpatchify(numbers, parts.grid_rows, *parts.patch)
        known[key] = own.shape if torch.equal(own.flatten(), ours.flatten()) else None
    return known[key]
