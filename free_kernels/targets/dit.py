"""Adapter for DiT modules of the original's shape: x_embedder, t_embedder, y_embedder, blocks, final_layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from free_kernels.targets.adaln import HEAD_CHUNKS, AdaLNTarget, BlockParts, stack_block_modulations
from free_kernels.targets.check import Rows, alignment
from free_kernels.targets.fused_head import HeadParts
from free_kernels.validation import fail
from free_kernels.wrappers import first_output, kind_of, see_through

_PARTS = ("x_embedder", "t_embedder", "y_embedder", "pos_embed", "blocks", "final_layer", "unpatchify")
_BLOCK_PARTS = ("norm1", "attn", "norm2", "mlp", "adaLN_modulation")


def is_dit_module(module: object) -> bool:
    """Whether a module has the parts of an original-style DiT."""
    return isinstance(module, nn.Module) and all(hasattr(module, part) for part in _PARTS)


class DiTTarget(AdaLNTarget):
    """An original-style DiT (Peebles & Xie 2022) as a :class:`free_kernels.protocols.Target`.

    ``head(features(x, t, y), t, y)`` equals ``module(x, t, y)`` to rounding. Inputs are cast to the module's dtype.

    Args:
        module: the DiT, in evaluation mode. Blocks with exactly the original's parts (norm1, attn, norm2, mlp,
            adaLN_modulation) are taken to combine them as the original does; others are called as they are. The grid
            of tokens is a square, or ``x_embedder.grid_size``, rows and columns.
        compile: run blocks and head through ``torch.compile``.

    Raises:
        TypeError: the module lacks a part.
        ValueError: the module is in training mode, where label dropout would make it random; or ``compile`` is asked
            of blocks with other parts.
    """

    def __init__(self, module: nn.Module, compile: bool = False) -> None:
        where = type(self).__name__
        seen = see_through(where, module)
        if not is_dit_module(seen.module):
            fail(where, "module", f"a DiT with {', '.join(_PARTS)}", kind_of(seen.module), TypeError)
        super().__init__(where, seen, _split(seen.module.blocks), compile)
        channels, *patch = map(int, self.module.x_embedder.proj.weight.shape[1:])
        tokens, width = self.module.pos_embed.shape[-2:]
        self._grid, self._patch = _grid(where, self.module, tokens), (patch[0], patch[1])
        height, wide = (count * side for count, side in zip(self._grid, patch, strict=True))
        linear = self.module.final_layer.linear
        if not hasattr(linear, "out_features"):
            wanted = "a linear layer, with its out_features"
            fail(where, "module.final_layer.linear", wanted, kind_of(linear), TypeError)
        outputs = int(linear.out_features) // math.prod(patch)
        embedded = len(self.module.y_embedder.embedding_table.weight)
        self.latent_shape = (channels, height, wide)
        self.feature_shape = (int(tokens), int(width))
        self.learns_variance = outputs == 2 * channels
        self.num_classes = int(self.module.y_embedder.num_classes)
        self.has_null_label = embedded > self.num_classes
        # The original DiT guides the first three of its four channels.
        self.guidance_channels = 3 if channels == 4 else channels
        self.recheck(where)

    @property
    def dtype(self) -> torch.dtype:
        """The module's dtype."""
        return self.module.x_embedder.proj.weight.dtype

    @property
    def device(self) -> torch.device:
        """The module's device."""
        return self.module.x_embedder.proj.weight.device

    def _embed(self, x: Tensor) -> Tensor:
        return self.module.x_embedder(x) + self.module.pos_embed

    def _block_inputs(self, t: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return (self._conditioning(t, y),)

    def _plain_blocks(self, h: Tensor, *inputs: Tensor) -> Tensor:
        for block in self.module.blocks:
            h = block(h, *inputs)
        return h

    def _plain_head(self, h: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.module.unpatchify(self.module.final_layer(h, self._conditioning(t, y)))

    def _left_out(self) -> list[nn.Module]:
        return [*self.module.blocks, self.module.final_layer]

    def check_convention(self, where: str, rows: Rows, own: Tensor) -> None:
        """Raise ValueError where the output near pure noise points against the noise: a velocity towards the data."""
        if alignment(own[0], rows.x[0]) < -0.5:
            wanted = "a network that predicts noise (SiTTarget takes one that predicts a velocity)"
            fail(where, "module", wanted, f"{type(self.module).__name__}, whose output at pure noise is against it")

    def own(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Output of the module's own call, ``[R, C or 2C, H, W]``."""
        with self._cast_sinusoids():
            return first_output(self._whole(x.to(self.dtype), t, y))

    @contextmanager
    def _cast_sinusoids(self) -> Iterator[None]:
        """The original's embedder hands float32 sinusoids to its MLP, which fails in any other dtype: cast between."""
        mlp = getattr(self.module.t_embedder, "mlp", None)
        if self.dtype == torch.float32 or not isinstance(mlp, nn.Module):
            yield
            return
        handle = mlp.register_forward_pre_hook(lambda _, inputs: (inputs[0].to(self.dtype), *inputs[1:]))
        try:
            yield
        finally:
            handle.remove()

    def _modulated_head(self, h: Tensor, modulations: Tensor) -> Tensor:
        final = self.module.final_layer
        shift, scale = modulations.unbind(1)
        return self.module.unpatchify(final.linear(torch.addcmul(shift, final.norm_final(h), scale)))

    def _head_parts(self) -> HeadParts:
        final, tokens = self.module.final_layer, self.feature_shape[0]
        return HeadParts(final.norm_final, final.linear, self.module.unpatchify, tokens, self._grid[0], self._patch)

    def _conditioning(self, t: Tensor, y: Tensor) -> Tensor:
        return self._time_embedding(0, t) + self.module.y_embedder(y, False)

    def _time_embedders(self) -> list[Callable[[Tensor], Tensor]]:
        return [self._embed_timesteps]

    def _embed_timesteps(self, t: Tensor) -> Tensor:
        with self._cast_sinusoids():
            return self.module.t_embedder(t)

    def _block_modulations(self, t: Tensor, y: Tensor) -> Tensor:
        c = self._conditioning(t, y)
        return stack_block_modulations([block.adaLN_modulation(c) for block in self.module.blocks])

    def _final_modulations(self, t: Tensor, y: Tensor) -> Tensor:
        rows = self.module.final_layer.adaLN_modulation(self._conditioning(t, y)).unflatten(1, (HEAD_CHUNKS, 1, -1))
        rows[:, 1] += 1
        return rows


def _grid(where: str, module: nn.Module, tokens: int) -> tuple[int, int]:
    """Rows and columns of tokens: those that the embedder names (``grid_size``, as timm's does), else a square's.

    Raises:
        ValueError: neither.
    """
    named = getattr(module.x_embedder, "grid_size", None)
    if isinstance(named, tuple | list) and len(named) == 2 and math.prod(named) == tokens:
        return int(named[0]), int(named[1])
    side = math.isqrt(tokens)
    if side**2 != tokens:
        wanted = (
            "of a square grid of tokens, or with x_embedder.grid_size = (rows, columns) and an unpatchify of that "
            "(HookTarget takes any latent_shape)"
        )
        fail(where, "module", wanted, f"{type(module).__name__} with {tokens} tokens")
    return side, side


def _split(blocks: nn.ModuleList) -> list[BlockParts] | None:
    """The parts of every block, or None if a block has others than the original's."""
    if any({name for name, _ in block.named_children()} != set(_BLOCK_PARTS) for block in blocks):
        return None
    return [BlockParts(block.norm1, block.attn, block.norm2, block.mlp) for block in blocks]
