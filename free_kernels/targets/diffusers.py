"""Adapter for diffusers' ``DiTTransformer2DModel``; needs nothing of diffusers but the module that it is given."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from free_kernels.constants import TIME_TICKS
from free_kernels.targets.adaln import HEAD_CHUNKS, AdaLNTarget, BlockParts, stack_block_modulations
from free_kernels.targets.check import Rows, alignment
from free_kernels.targets.fused_head import HeadParts
from free_kernels.validation import check_int, fail
from free_kernels.wrappers import kind_of, see_through

_CLASS = "DiTTransformer2DModel"


def is_diffusers_dit(module: object) -> bool:
    """Whether an object is a ``diffusers.DiTTransformer2DModel``; told by its class's name, so nothing is imported."""
    bases = type(module).__mro__
    return any(base.__name__ == _CLASS and base.__module__.partition(".")[0] == "diffusers" for base in bases)


class DiffusersDiTTarget(AdaLNTarget):
    """A ``diffusers.DiTTransformer2DModel`` as a :class:`free_kernels.protocols.Target`.

    ``head(features(x, t, y), t, y)`` equals ``module(x, t, y).sample`` to rounding, in diffusers' own arithmetic: it is
    not the original DiT's with the same weights (other timestep frequencies, another epsilon in each block's second
    normalisation). Guidance mixes all C channels, as ``DiTPipeline`` does.

    Args:
        module: the transformer, in evaluation mode.
        compile: run blocks and head through ``torch.compile``.

    Raises:
        TypeError: not a ``DiTTransformer2DModel``.
        ValueError: training mode, or a head with neither C nor 2C channels.
    """

    def __init__(self, module: nn.Module, compile: bool = False) -> None:
        name = type(self).__name__
        seen = see_through(name, module)
        module = seen.module
        if not is_diffusers_dit(module):
            fail(name, "module", f"a diffusers {_CLASS}", kind_of(module), TypeError)
        super().__init__(name, seen, _split(module.transformer_blocks), compile)
        config = self.module.config
        channels, side, patch = config.in_channels, config.sample_size, config.patch_size
        if self.module.out_channels not in (channels, 2 * channels):
            fail(name, "module", f"one with {channels} or {2 * channels} output channels", self.module.out_channels)
        self.latent_shape = (channels, side, side)
        self.feature_shape = ((side // patch) ** 2, self.module.inner_dim)
        self.learns_variance = self.module.out_channels == 2 * channels
        embedder = self.module.transformer_blocks[0].norm1.emb.class_embedder
        self.num_classes = int(embedder.num_classes)
        self.has_null_label = len(embedder.embedding_table.weight) > self.num_classes
        self.guidance_channels = channels
        self.recheck(name)

    @property
    def dtype(self) -> torch.dtype:
        """The module's dtype."""
        return self.module.pos_embed.proj.weight.dtype

    @property
    def device(self) -> torch.device:
        """The module's device."""
        return self.module.pos_embed.proj.weight.device

    def _embed(self, x: Tensor) -> Tensor:
        return self.module.pos_embed(x)

    def _block_inputs(self, t: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return self._timestep(t), y

    def _plain_blocks(self, h: Tensor, *inputs: Tensor) -> Tensor:
        t, y = inputs
        for block in self.module.transformer_blocks:
            h = block(h, timestep=t, class_labels=y)
        return h

    def _plain_head(self, h: Tensor, t: Tensor, y: Tensor) -> Tensor:
        c = self.module.transformer_blocks[0].norm1.emb(self._timestep(t), y, hidden_dtype=h.dtype)
        return self._modulated_head(h, self._head_modulations(c))

    def _left_out(self) -> list[nn.Module]:
        blocks = self.module.transformer_blocks
        return [part for block in blocks for part in (block, block.norm1, block.norm1.emb)]

    def own(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Output of the module's own call, ``[R, C or 2C, H, W]``."""
        return self._whole(x.to(self.dtype), timestep=t, class_labels=y).sample

    def _modulated_head(self, h: Tensor, modulations: Tensor) -> Tensor:
        shift, scale = modulations.unbind(1)
        return self._unpatchify(self.module.proj_out_2(torch.addcmul(shift, self.module.norm_out(h), scale)))

    def _unpatchify(self, tokens: Tensor) -> Tensor:
        patch, channels = self.module.patch_size, self.module.out_channels
        side = self.latent_shape[1] // patch
        patches = tokens.reshape(-1, side, side, patch, patch, channels).permute(0, 5, 1, 3, 2, 4)
        return patches.reshape(-1, channels, *self.latent_shape[1:])

    def _head_parts(self) -> HeadParts:
        module, tokens = self.module, self.feature_shape[0]
        patch = module.patch_size
        layers = module.norm_out, module.proj_out_2, self._unpatchify
        return HeadParts(*layers, tokens, self.latent_shape[1] // patch, (patch, patch))

    def _conditioning(self, index: int, t: Tensor, y: Tensor) -> Tensor:
        embedder = self.module.transformer_blocks[index].norm1.emb
        return self._time_embedding(index, t) + embedder.class_embedder(y)

    def _time_embedders(self) -> list[Callable[[Tensor], Tensor]]:
        def of(embedder: nn.Module) -> Callable[[Tensor], Tensor]:
            return lambda t: embedder.timestep_embedder(embedder.time_proj(t).to(self.dtype))

        return [of(block.norm1.emb) for block in self.module.transformer_blocks]

    def _block_modulations(self, t: Tensor, y: Tensor) -> Tensor:
        blocks = enumerate(self.module.transformer_blocks)
        return stack_block_modulations([b.norm1.linear(b.norm1.silu(self._conditioning(i, t, y))) for i, b in blocks])

    def _final_modulations(self, t: Tensor, y: Tensor) -> Tensor:
        return self._head_modulations(self._conditioning(0, t, y))

    def _head_modulations(self, c: Tensor) -> Tensor:
        rows = self.module.proj_out_1(F.silu(c)).unflatten(1, (HEAD_CHUNKS, 1, -1))
        rows[:, 1] += 1
        return rows


class DiffusersFlowTarget(DiffusersDiTTarget):
    """A ``diffusers.DiTTransformer2DModel`` that predicts a velocity, for flow schedules.

    As diffusers' flow schedulers call it: shown ``T (1 - time)``, T at noise and 0 at data, it predicts noise minus
    data. Ticks are those of :class:`free_kernels.FlowSDESchedule`, 0 at noise. A variance is dropped.

    Args:
        module: the transformer, in evaluation mode.
        compile: as in :class:`DiffusersDiTTarget`.
        num_train_timesteps: T, of the scheduler.

    Raises:
        TypeError, ValueError: as :class:`DiffusersDiTTarget`; or the velocity runs the other way.
    """

    family = "flow"

    def __init__(self, module: nn.Module, compile: bool = False, num_train_timesteps: int = 1000) -> None:
        self.num_train_steps = TIME_TICKS
        self.num_train_timesteps = check_int(type(self).__name__, "num_train_timesteps", num_train_timesteps, 1)
        super().__init__(module, compile)
        self.learns_variance = False

    def head(self, h: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Velocity towards the data ``[R, C, H, W]``."""
        return -super().head(h, t, y)[:, : self.latent_shape[0]]

    def own(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Velocity of the module's own call, ``[R, C, H, W]``."""
        return -super().own(x, self._timestep(t), y)[:, : self.latent_shape[0]]

    def convention(self) -> tuple[int, ...]:
        """Timesteps of the scheduler."""
        return (self.num_train_timesteps,)

    def check_convention(self, where: str, rows: Rows, own: Tensor) -> None:
        """Raise ValueError where the velocity near pure noise points along the noise."""
        if alignment(own[1], rows.x[1]) > 0.5:
            wanted = "a network that predicts noise minus data, as diffusers' flow schedulers take it"
            fail(where, "module", wanted, f"{type(self.module).__name__}, whose output at pure noise is against it")

    def _timestep(self, t: Tensor) -> Tensor:
        return (1 - t.float() / TIME_TICKS) * self.num_train_timesteps


def _split(blocks: Iterable[Any]) -> list[BlockParts] | None:
    """The parts of every block; None where only the block's own forward knows how they are called."""
    if any(getattr(block, "_chunk_size", 0) is not None or not hasattr(block, "attn1") for block in blocks):
        return None
    return [BlockParts(block.norm1.norm, block.attn1, block.norm3, block.ff) for block in blocks]
