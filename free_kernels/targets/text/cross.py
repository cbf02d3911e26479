"""Transformers whose image tokens attend to the text (PixArt, Sana): its keys and values are made once an image."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from free_kernels.conditioning import TimestepTable
from free_kernels.conditions import Conditions
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
    _six_table: TimestepTable | None = None
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

    @property
    def is_capturable(self) -> bool:
        """Whether a call can be part of a CUDA graph: with a text for every row."""
        return self._path == "blocks"

    def _prepare(self) -> None:
        self._six_table = None

    @torch.no_grad()
    def _tabled(self, timesteps: Tensor) -> Self:
        clone = super()._tabled(timesteps)
        clone._six_table = None
        if self._vectors is None:
            # The modulations of all blocks but for each block's own table depend on the timestep only.
            clone._six_table = TimestepTable(
                lambda t: self._modulations(clone._time_embedding(t)), timesteps.to(self.device)
            )
        return clone

    def _six(self, t: Tensor, y: Tensor) -> Tensor:
        """Shift, scale and gate of attention and of the MLP, ``[R, 6 D]``, before a block's own are added."""
        return self._modulations(self._conditioning(t, y)) if self._six_table is None else self._six_table(t)

    def _modulations(self, conditioning: Tensor) -> Tensor:
        """These of embeddings ``[R, D]``."""
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
