"""Adapter for DiT modules of the original's shape: x_embedder, t_embedder, y_embedder, blocks, final_layer."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from free_kernels.hoisting import ConditioningTable, table_fits
from free_kernels.validation import fail

_PARTS = ("x_embedder", "t_embedder", "y_embedder", "pos_embed", "blocks", "final_layer", "unpatchify")


def is_dit_module(module: object) -> bool:
    """Whether a module has the parts of an original-style DiT."""
    return isinstance(module, nn.Module) and all(hasattr(module, part) for part in _PARTS)


class DiTTarget:
    """An original-style DiT (Peebles & Xie 2022) as a :class:`free_kernels.types.Target`.

    ``head(features(x, t, y), t, y)`` equals ``module(x, t, y)`` to rounding. Inputs are cast to the module's dtype.

    Args:
        module: the DiT, in evaluation mode.

    Raises:
        TypeError: the module lacks a part.
        ValueError: the module is in training mode, where label dropout would make it random.
    """

    def __init__(self, module: nn.Module) -> None:
        if not is_dit_module(module):
            fail("DiTTarget", "module", f"a DiT with {', '.join(_PARTS)}", type(module).__name__, TypeError)
        if module.training:
            fail("DiTTarget", "module", "in evaluation mode (call .eval())", "training mode")
        self.module: Any = module
        weight: Tensor = self.module.x_embedder.proj.weight
        channels, patch = int(weight.shape[1]), int(weight.shape[2])
        tokens, width = self.module.pos_embed.shape[-2:]
        side = math.isqrt(tokens) * patch
        outputs = int(self.module.final_layer.linear.out_features) // patch**2
        self.latent_shape = (channels, side, side)
        self.feature_shape = (int(tokens), int(width))
        self.learns_variance = outputs == 2 * channels
        self.num_classes = int(self.module.y_embedder.num_classes)
        self.has_null_label = self.module.y_embedder.embedding_table.num_embeddings > self.num_classes
        # The original guides its first three channels of four.
        self.guidance_channels = 3 if channels == 4 else channels
        self._block_table: ConditioningTable | None = None
        self._final_table: ConditioningTable | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The module's dtype."""
        return self.module.x_embedder.proj.weight.dtype

    @property
    def device(self) -> torch.device:
        """The module's device."""
        return self.module.x_embedder.proj.weight.device

    def features(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Top-block features ``[R, T, D]``."""
        h = self.module.x_embedder(x.to(self.dtype)) + self.module.pos_embed
        if self._block_table is not None:
            return self._hoisted_features(h, self._block_table(t, y))
        c = self._conditioning(t, y)
        for block in self.module.blocks:
            h = block(h, c)
        return h

    def head(self, h: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Network output ``[R, C or 2C, H, W]``."""
        final, h = self.module.final_layer, h.to(self.dtype)
        if self._final_table is None:
            return self.module.unpatchify(final(h, self._conditioning(t, y)))
        shift, scale = self._final_table(t, y).unbind(1)
        return self.module.unpatchify(final.linear(torch.addcmul(shift, final.norm_final(h), scale)))

    def hoisted(self, timesteps: Tensor, labels: Tensor) -> DiTTarget:
        """A copy whose adaLN modulations for these timesteps and labels are computed once; itself if too many."""
        depth, width = len(self.module.blocks), self.feature_shape[1]
        if not table_fits(timesteps, labels, (6 * depth + 2) * width * self.dtype.itemsize):
            return self
        clone = copy.copy(self)
        clone._block_table = ConditioningTable(self._block_modulations, timesteps, labels)
        clone._final_table = ConditioningTable(self._final_modulations, timesteps, labels)
        return clone

    def _conditioning(self, t: Tensor, y: Tensor) -> Tensor:
        return self.module.t_embedder(t) + self.module.y_embedder(y, False)

    def _block_modulations(self, t: Tensor, y: Tensor) -> Tensor:
        """``[M, 6 depth, 1, D]``: shift, 1 + scale, gate of attention and MLP, block by block."""
        c = self._conditioning(t, y)
        rows = torch.stack([block.adaLN_modulation(c).unflatten(1, (6, 1, -1)) for block in self.module.blocks], 1)
        rows[:, :, 1] += 1
        rows[:, :, 4] += 1
        return rows.flatten(1, 2)

    def _final_modulations(self, t: Tensor, y: Tensor) -> Tensor:
        """``[M, 2, 1, D]``: shift and 1 + scale of the head."""
        rows = self.module.final_layer.adaLN_modulation(self._conditioning(t, y)).unflatten(1, (2, 1, -1))
        rows[:, 1] += 1
        return rows

    def _hoisted_features(self, h: Tensor, modulations: Tensor) -> Tensor:
        rows = modulations.unbind(1)
        for index, block in enumerate(self.module.blocks):
            shift1, scale1, gate1, shift2, scale2, gate2 = rows[6 * index : 6 * index + 6]
            h = torch.addcmul(h, gate1, block.attn(torch.addcmul(shift1, block.norm1(h), scale1)))
            h = torch.addcmul(h, gate2, block.mlp(torch.addcmul(shift2, block.norm2(h), scale2)))
        return h
