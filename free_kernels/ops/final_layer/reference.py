"""``final_layer`` in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from free_kernels.ops.final_layer.arguments import FinalLayerArguments
from free_kernels.ops.tables.arguments import TableArguments
from free_kernels.ops.tables.reference import table_rows


def unpatchify(tokens: Tensor, grid_rows: int, patch_rows: int, patch_columns: int) -> Tensor:
    """Tokens ``[R, T, patch_rows * patch_columns * C]``, row by row of a grid, as images ``[R, C, H, W]``."""
    patches = tokens.unflatten(2, (patch_rows, patch_columns, -1)).unflatten(1, (grid_rows, -1))
    return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def final_layer(a: FinalLayerArguments) -> Tensor:
    """See ``free_kernels.ops.final_layer.api.final_layer``."""
    table = TableArguments(a.rows, a.row_of_timestep, a.row_of_label, a.t, a.y)
    shift, scale = table_rows(table).unbind(1)
    normalized = F.layer_norm(a.h, a.h.shape[-1:], eps=a.eps)
    tokens = F.linear(torch.addcmul(shift, normalized, scale), a.weight, a.bias)
    return unpatchify(tokens, a.grid_rows, a.patch_rows, a.patch_columns)
