"""Transformers whose image tokens attend to the text (PixArt, Sana): its keys and values are made once an image."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from free_kernels.conditions import Condition, Conditions
from free_kernels.targets.text.base import TextTarget
from free_kernels.targets.text.conditions import EMBEDS, MASK, Form, GroupText, group_rows, text_of_group
from free_kernels.validation import fail


class CrossTarget(TextTarget):
    """Base of :class:`PixArtTarget` and :class:`SanaTarget`.

    In a packed call the rows of one image are neighbours. A block makes keys and values of an image's text once, and
    the tokens of all of its rows are queries of one attention: there is no copy of a text, key or value for a row.
    On a GPU, images with as many rows are one attention, and a text is copied once a call and image unless the images
    are neighbours in the conditions too. Which rows are whose is read by the host, once a call: such a target cannot be
    captured in a CUDA graph, and says so.

    Where a block is not what diffusers defines (another attention processor, hooks, a compiled block), blocks are
    called as they are, with a copy of its text for every row.
    """

    # Class of the processor whose cross-attention is computed here.
    processor: ClassVar[str]
    # Whether images with as many rows are one attention; None: on a GPU.
    merge: bool | None = None

    @property
    def forms(self) -> Mapping[str, Form]:
        """Embeddings of the prompt's tokens, and which of them are kept."""
        width = self.module.caption_projection.linear_1.in_features
        return {EMBEDS: Form(("T", width)), MASK: Form(("T",), optional=True, mask=True)}

    def _pooled(self, conditions: Conditions) -> Tensor:
        places = range(len(self.texts.lengths) if self._texts else 0)
        return torch.stack([self.texts.mean(place, self._project) for place in places])

    def _left_out(self) -> list[nn.Module] | None:
        left = []
        for block in self.module.transformer_blocks:
            attention = getattr(block, "attn2", None)
            kind = type(getattr(attention, "processor", None))
            if kind.__name__ != self.processor or kind.__module__.partition(".")[0] != "diffusers":
                return None
            if attention.norm_cross or attention.group_norm is not None or attention.spatial_norm is not None:
                return None
            left += [block, attention]
        return left

    def features(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Tokens of the image ``[R, T, D]`` after the last block.

        Raises:
            ValueError: within the capture of a CUDA graph.
        """
        h, six = self._embed(x.to(self.dtype)), self._six(t, y)
        if self._path == "blocks":
            text, bias = self._text_of_rows(y)
            for block in self.module.transformer_blocks:
                h = self._plain_block(block, h, six, text, bias)
            return h
        texts = self._grouped(y)
        six = six.unflatten(1, (6, -1))
        for block in self.module.transformer_blocks:
            h = self._block(block, h, (block.scale_shift_table[None] + six).chunk(6, 1), texts)
        return h

    def _grouped(self, y: Tensor) -> list[GroupText]:
        """Texts of a call's rows, one for neighbours of one image."""
        if y.is_cuda and torch.cuda.is_current_stream_capturing():
            wanted = f"False for {self._name}, whose rows the host groups by image"
            fail(self._name, "cuda_graphs", wanted, "True")
        merge = y.is_cuda if self.merge is None else self.merge
        return [text_of_group(self.texts, group, self._project) for group in group_rows(y.tolist(), merge)]

    def _text_of_rows(self, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """Projected text ``[R, T, D]`` and bias ``[R, 1, T]``, a copy for every row."""
        text = self.texts.embeds.index_select(0, y)
        bias = None if self.texts.bias is None else self.texts.bias.index_select(0, y).unsqueeze(1)
        return text if self.texts.is_projected else self._project(text), bias

    def _six(self, t: Tensor, y: Tensor) -> Tensor:
        """Shift, scale and gate of attention and of the MLP, ``[R, 6 D]``, before a block's own are added."""
        raise NotImplementedError

    def _embed(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _plain_block(self, block: Any, h: Tensor, six: Tensor, text: Tensor, bias: Tensor | None) -> Tensor:
        """A block called as it is."""
        raise NotImplementedError

    def _block(self, block: Any, h: Tensor, six: Sequence[Tensor], texts: list[GroupText]) -> Tensor:
        """A block by its parts."""
        raise NotImplementedError


def cross_attention(
    attention: Any, h: Tensor, texts: list[GroupText], normed: Callable[[Any, Tensor], Tensor] | None = None
) -> Tensor:
    """Attention of tokens ``[R, T, D]`` to texts, as diffusers' processors compute it, one call for each group.

    Args:
        attention: a diffusers ``Attention``.
        h: tokens.
        texts: of all rows.
        normed: normalises queries or keys ``[..., D]`` with ``attention.norm_q`` or ``norm_k``; None: no norm.
    """
    query = attention.to_q(h)
    if normed is not None:
        query = normed(attention.norm_q, query)
    out = torch.empty_like(query)
    for group, text, bias in texts:
        count, rows = len(group.images), group.rows
        key, value = attention.to_k(text), attention.to_v(text)
        if normed is not None:
            key = normed(attention.norm_k, key)
        part = slice(group.first, group.first + count * rows)
        asked, key, value = (
            one.reshape(count, -1, attention.heads, one.shape[-1] // attention.heads).transpose(1, 2)
            for one in (query[part], key, value)
        )
        answer = F.scaled_dot_product_attention(asked, key, value, attn_mask=bias)
        out[part] = answer.transpose(1, 2).reshape(count * rows, -1, out.shape[2])
    for layer in attention.to_out:
        out = layer(out)
    return out / attention.rescale_output_factor if attention.rescale_output_factor != 1 else out


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
    def dtype(self) -> torch.dtype:
        """The module's dtype."""
        return self.module.pos_embed.proj.weight.dtype

    @property
    def device(self) -> torch.device:
        """The module's device."""
        return self.module.pos_embed.proj.weight.device

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

    def _six(self, t: Tensor, y: Tensor) -> Tensor:
        single = self.module.adaln_single
        return single.linear(single.silu(self._conditioning(t, y)))

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
    def dtype(self) -> torch.dtype:
        """The module's dtype."""
        return self.module.patch_embed.proj.weight.dtype

    @property
    def device(self) -> torch.device:
        """The module's device."""
        return self.module.patch_embed.proj.weight.device

    def _project(self, text: Tensor) -> Tensor:
        return self.module.caption_norm(self.module.caption_projection(text))

    def _shown(self, t: Tensor) -> Tensor:
        return super()._shown(t) * self.module.config.timestep_scale

    def _time_embedder(self, shown: Tensor) -> Tensor:
        embedder = self.module.time_embed.emb
        return embedder.timestep_embedder(embedder.time_proj(shown).to(self.dtype))

    def _call(self, x: Tensor, t: Tensor, values: Mapping[str, Tensor]) -> object:
        return self._whole(x, values[EMBEDS], t, encoder_attention_mask=values.get(MASK))

    def _six(self, t: Tensor, y: Tensor) -> Tensor:
        return self.module.time_embed.linear(self.module.time_embed.silu(self._conditioning(t, y)))

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
