"""Adapter for diffusers' ``SanaTransformer2DModel``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from free_kernels.conditions import Condition
from free_kernels.targets.text.conditions import EMBEDS, MASK, GroupText
from free_kernels.targets.text.cross import CrossTarget, cross_attention
from free_kernels.validation import fail


class SanaTarget(CrossTarget):
    """A ``diffusers.SanaTransformer2DModel`` as a target of flow schedules.

    Conditions: ``prompt_embeds [N, T, W]`` and ``prompt_attention_mask [N, T]`` as the pipeline's ``encode_prompt``
    gives them. The module is shown the noise level of a tick times 1000 and ``config.timestep_scale``, as in
    ``SanaPipeline``, and predicts noise minus data. The modules of Sana-Sprint (``guidance_embeds``), which follow
    another path from noise to data, are refused.

    Args:
        module: the transformer, in evaluation mode.
        latent_shape: (C, H, W), multiples of the patch; None: the square of ``config.sample_size``.
        null_condition: as in :class:`TextTarget`.

    Raises:
        TypeError, ValueError: as :class:`TextTarget`.
    """

    module_class = "SanaTransformer2DModel"
    processor = "SanaAttnProcessor2_0"

    def __init__(
        self, module: Any, latent_shape: Sequence[int] | None = None, null_condition: Condition | None = None
    ) -> None:
        super().__init__(module, latent_shape, null_condition)
        if self.module.config.guidance_embeds:
            wanted = "one without guidance_embeds: Sana-Sprint's path from noise to data is no linear one"
            fail(self._name, "module", wanted, "one with")
        self.recheck(self._name)

    @property
    def _entering(self) -> Tensor:
        return self.module.patch_embed.proj.weight

    def _project(self, text: Tensor) -> Tensor:
        return self.module.caption_norm(self.module.caption_projection(text))

    def _shown(self, t: Tensor) -> Tensor:
        return super()._shown(t) * self.module.config.timestep_scale

    def _time_embedder(self, shown: Tensor) -> Tensor:
        embedder = self.module.time_embed.emb
        return embedder.timestep_embedder(embedder.time_proj(shown).to(self.dtype))

    def _call(self, x: Tensor, t: Tensor, values: Mapping[str, Tensor]) -> object:
        return self._whole(x, values[EMBEDS], t, encoder_attention_mask=values.get(MASK))

    def _modulations(self, conditioning: Tensor) -> Tensor:
        return self.module.time_embed.linear(self.module.time_embed.silu(conditioning))

    def _embed(self, x: Tensor) -> Tensor:
        return self.module.patch_embed(x)

    def _plain_block(self, block: Any, h: Tensor, six: Tensor, text: Tensor, bias: Tensor | None) -> Tensor:
        return block(h, None, text, bias, six, *self._grid)

    def _block(self, block: Any, h: Tensor, six: Sequence[Tensor], texts: list[GroupText]) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = six
        h = h + gate1 * block.attn1(block.norm1(h) * (1 + scale1) + shift1)
        h = cross_attention(block.attn2, h, texts, _normed) + h
        image = (block.norm2(h) * (1 + scale2) + shift2).unflatten(1, self._grid).permute(0, 3, 1, 2)
        return h + gate2 * block.ff(image).flatten(2, 3).permute(0, 2, 1)

    def head(self, h: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Velocity towards the data ``[R, C, H, W]``."""
        module = self.module
        tokens = module.norm_out(h.to(self.dtype), self._conditioning(t, y), module.scale_shift_table)
        return self._as_output(self._unpatched(module.proj_out(tokens), module.config.out_channels))


def _normed(norm: nn.Module | None, value: Tensor) -> Tensor:
    return value if norm is None else norm(value)
