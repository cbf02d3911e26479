"""Adapter for diffusers' ``PixArtTransformer2DModel``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from free_kernels.conditions import Condition
from free_kernels.targets.text.conditions import EMBEDS, MASK, Form, GroupText
from free_kernels.targets.text.cross import CrossTarget, cross_attention
from free_kernels.validation import fail


class PixArtTarget(CrossTarget):
    """A ``diffusers.PixArtTransformer2DModel`` (PixArt-alpha, PixArt-sigma) as a target.

    Conditions: ``prompt_embeds [N, T, W]`` and ``prompt_attention_mask [N, T]`` as the pipeline's ``encode_prompt``
    gives them, and for a module with additional conditions (1024 x 1024 of PixArt-alpha) ``resolution [N, 2]`` and
    ``aspect_ratio [N, 1]``, height and width in pixels and their ratio, as the pipeline gives them in
    ``added_cond_kwargs``.

    It predicts noise. A module with twice the output channels has learned a variance, which ``DDPMSchedule``'s
    ``"auto"`` takes; the pipelines drop that half, as any fixed variance does. Guidance mixes all C channels.

    Args:
        module: the transformer, in evaluation mode.
        latent_shape: (C, H, W), multiples of the patch; None: the square of ``config.sample_size``.
        null_condition: as in :class:`TextTarget`.

    Raises:
        TypeError, ValueError: as :class:`TextTarget`.
    """

    family = "diffusion"
    module_class = "PixArtTransformer2DModel"
    processor = "AttnProcessor2_0"

    def __init__(
        self, module: Any, latent_shape: Sequence[int] | None = None, null_condition: Condition | None = None
    ) -> None:
        super().__init__(module, latent_shape, null_condition)
        channels, outputs = self.latent_shape[0], self.module.out_channels
        if outputs not in (channels, 2 * channels):
            fail(self._name, "module", f"one with {channels} or {2 * channels} output channels", outputs)
        if self.module.caption_projection is None:
            fail(self._name, "module", "one with a caption projection (caption_channels)", "one without")
        self.learns_variance = outputs == 2 * channels
        self.recheck(self._name)

    @property
    def _entering(self) -> Tensor:
        return self.module.pos_embed.proj.weight

    @property
    def forms(self) -> Mapping[str, Form]:
        """Text and mask, and the picture's size where the module asks for it."""
        forms = dict(super().forms)
        if self.module.use_additional_conditions:
            forms |= {"resolution": Form((2,)), "aspect_ratio": Form((1,))}
        return forms

    def _project(self, text: Tensor) -> Tensor:
        return self.module.caption_projection(text)

    def _time_embedder(self, shown: Tensor) -> Tensor:
        embedder = self.module.adaln_single.emb
        return embedder.timestep_embedder(embedder.time_proj(shown).to(self.dtype))

    def _condition_vectors(self, values: Mapping[str, Tensor]) -> Tensor | None:
        if not self.module.use_additional_conditions:
            return None
        emb = self.module.adaln_single.emb
        sizes = []
        for name, embedder in (("resolution", emb.resolution_embedder), ("aspect_ratio", emb.aspect_ratio_embedder)):
            waves = emb.additional_condition_proj(values[name].flatten()).to(self.dtype)
            sizes.append(embedder(waves).reshape(len(values[name]), -1))
        return torch.cat(sizes, 1)

    def _call(self, x: Tensor, t: Tensor, values: Mapping[str, Tensor]) -> object:
        sizes = {name: values.get(name) for name in ("resolution", "aspect_ratio")}
        return self._whole(
            x,
            encoder_hidden_states=values[EMBEDS],
            timestep=t,
            added_cond_kwargs=sizes,
            encoder_attention_mask=values.get(MASK),
        )

    def _modulations(self, conditioning: Tensor) -> Tensor:
        single = self.module.adaln_single
        return single.linear(single.silu(conditioning))

    def _embed(self, x: Tensor) -> Tensor:
        return self.module.pos_embed(x)

    def _plain_block(self, block: Any, h: Tensor, six: Tensor, text: Tensor, bias: Tensor | None) -> Tensor:
        return block(h, encoder_hidden_states=text, encoder_attention_mask=bias, timestep=six)

    def _left_out(self) -> list[nn.Module] | None:
        left = super()._left_out()
        if left is None or any(block._chunk_size is not None for block in self.module.transformer_blocks):
            return None
        attentions = [block.attn2 for block in self.module.transformer_blocks]
        if any(one.norm_q is not None or one.norm_k is not None or one.residual_connection for one in attentions):
            return None
        return left

    def _block(self, block: Any, h: Tensor, six: Sequence[Tensor], texts: list[GroupText]) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = six
        h = gate1 * block.attn1(block.norm1(h) * (1 + scale1) + shift1) + h
        h = cross_attention(block.attn2, h, texts) + h
        return gate2 * block.ff(block.norm2(h) * (1 + scale2) + shift2) + h

    def head(self, h: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Noise, and where it is learned the variance: ``[R, C or 2C, H, W]``."""
        module = self.module
        own = module.scale_shift_table[None] + self._conditioning(t, y)[:, None]
        shift, scale = own.chunk(2, 1)
        tokens = module.proj_out(module.norm_out(h.to(self.dtype)) * (1 + scale) + shift)
        return self._unpatched(tokens, module.out_channels)
