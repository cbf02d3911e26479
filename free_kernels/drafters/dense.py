"""The parts of a learned drafter whose blocks mix few tokens by dense layers instead of attention."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Shift, scale and gate of a block; shift and scale before the output.
DENSE_BLOCK_ROWS, DENSE_LAST_ROWS = 3, 2


class DenseBlock(nn.Module):
    """Weights of an MLP over all tokens side by side; :class:`DenseFolded` is its arithmetic."""

    def __init__(self, tokens: int, width: int, mlp_ratio: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(tokens * width, int(tokens * width * mlp_ratio))
        self.fc2 = nn.Linear(int(tokens * width * mlp_ratio), tokens * width)

    def weights(self) -> tuple[Tensor, ...]:
        """Weight and bias of each layer in order."""
        return self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias


class DenseFolded(NamedTuple):
    """A drafter's weights with scales folded in, as plain tensors; attributes as of the one with attention.

    Nothing is normalised: the inputs have scales of their own, and the residual stream is a linear path from them to
    the output, whose gain depends on (t, y).
    """

    enter: Tensor
    enter_bias: Tensor
    blocks: tuple[tuple[Tensor, ...], ...]
    leave: Tensor
    leave_bias: Tensor

    def __call__(self, feature: Tensor, tokens: Tensor, modulations: Tensor, memory: None = None) -> Tensor:
        """Feature ``[R, T, D]`` from the parent feature, this beside patches, and modulations ``[R, K, 1, width]``."""
        rows = modulations.unbind(1)
        x = F.linear(tokens, self.enter).add_(self.enter_bias)
        for index, (fc1, fc1_bias, fc2, fc2_bias) in enumerate(self.blocks):
            shift, scale, gate = rows[DENSE_BLOCK_ROWS * index : DENSE_BLOCK_ROWS * (index + 1)]
            hidden = F.gelu(F.linear(torch.addcmul(shift, x, scale).flatten(1), fc1, fc1_bias))
            x = torch.addcmul(x, gate, F.linear(hidden, fc2, fc2_bias).view_as(x))
        shift, scale = rows[DENSE_BLOCK_ROWS * len(self.blocks) :]
        return feature + F.linear(torch.addcmul(shift, x, scale), self.leave, self.leave_bias)
