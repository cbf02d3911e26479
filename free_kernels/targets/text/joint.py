"""Transformers in which text and image are two streams of one attention (Stable Diffusion 3, Flux)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from free_kernels.conditions import Condition, Conditions
from free_kernels.targets.text.base import TextTarget
from free_kernels.targets.text.conditions import EMBEDS, POOLED, Form
from free_kernels.validation import check_float, fail

# Pixels of a token of Flux in its latent, along a side, which the pipeline packs into channels.
_PACKED = 2


class JointTarget(TextTarget):
    """Base of :class:`SD3Target` and :class:`FluxTarget`.

    From the first block on the text of a row depends on the row's state, so that a row needs a stream of its own: what
    rows of one image share is the embedded text and the embedded pooled text, which are stored once for an image; a
    call begins with a copy of the text for each row (with one image, a view of it). Blocks are called as they are.
    """

    @property
    def forms(self) -> Mapping[str, Form]:
        """Embeddings of the prompt's tokens, and of the prompt as a whole."""
        width, whole = self.module.context_embedder.in_features, self.module.config.pooled_projection_dim
        return {EMBEDS: Form(("T", width)), POOLED: Form((whole,))}

    def _project(self, text: Tensor) -> Tensor:
        return self.module.context_embedder(text)

    def _pooled(self, conditions: Conditions) -> Tensor:
        return conditions.vectors(lambda given: given[POOLED].to(self.device, torch.float32))

    def _time_embedder(self, shown: Tensor) -> Tensor:
        embedder = self.module.time_text_embed
        return embedder.timestep_embedder(embedder.time_proj(shown).to(self.dtype))

    def _condition_vectors(self, values: Mapping[str, Tensor]) -> Tensor | None:
        return self.module.time_text_embed.text_embedder(values[POOLED])

    def _text_of_rows(self, y: Tensor) -> Tensor:
        """Embedded text ``[R, T, D]``."""
        embeds = self.texts.embeds
        text = embeds.expand(len(y), -1, -1) if len(embeds) == 1 else embeds.index_select(0, y)
        return text if self.texts.is_projected else self._project(text)

    def _normed_out(self, h: Tensor, t: Tensor, y: Tensor) -> Tensor:
        module = self.module
        return module.proj_out(module.norm_out(h.to(self.dtype), self._conditioning(t, y)))


class SD3Target(JointTarget):
    """A ``diffusers.SD3Transformer2DModel`` (Stable Diffusion 3 and 3.5) as a target of flow schedules.

    Conditions: ``prompt_embeds [N, T, W]`` and ``pooled_prompt_embeds [N, P]`` as the pipeline's ``encode_prompt``
    gives them. The module is shown the noise level of a tick times 1000, as in ``StableDiffusion3Pipeline``, and
    predicts noise minus data. :class:`JointTarget` says what rows of one image share.

    Args:
        module: the transformer, in evaluation mode.
        latent_shape: (C, H, W), multiples of the patch up to ``config.pos_embed_max_size`` of them; None: the square of
            ``config.sample_size``.
        null_condition: as in :class:`TextTarget`.

    Raises:
        TypeError, ValueError: as :class:`TextTarget`.
    """

    module_class = "SD3Transformer2DModel"

    def __init__(
        self, module: Any, latent_shape: Sequence[int] | None = None, null_condition: Condition | None = None
    ) -> None:
        super().__init__(module, latent_shape, null_condition)
        most = self.module.pos_embed.pos_embed_max_size
        if most and max(self._grid) > most:
            fail(self._name, "latent_shape", f"at most {most * self.patch} elements high and wide", self.latent_shape)
        self.recheck(self._name)

    @property
    def _entering(self) -> Tensor:
        return self.module.pos_embed.proj.weight

    def _call(self, x: Tensor, t: Tensor, values: Mapping[str, Tensor]) -> object:
        return self._whole(x, encoder_hidden_states=values[EMBEDS], pooled_projections=values[POOLED], timestep=t)

    def features(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Tokens of the image ``[R, T, D]`` after the last block."""
        h, text = self.module.pos_embed(x.to(self.dtype)).contiguous(), self._text_of_rows(y)
        embedding = self._conditioning(t, y)
        for block in self.module.transformer_blocks:
            text, h = block(hidden_states=h, encoder_hidden_states=text, temb=embedding)
        return h

    def head(self, h: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Velocity towards the data ``[R, C, H, W]``."""
        return self._as_output(self._unpatched(self._normed_out(h, t, y), self.module.out_channels))


class FluxTarget(JointTarget):
    """A ``diffusers.FluxTransformer2DModel`` (FLUX.1) as a target of flow schedules.

    Conditions: ``prompt_embeds [N, T, W]`` and ``pooled_prompt_embeds [N, P]`` as the pipeline's ``encode_prompt``
    gives them. States are latents as the autoencoder has them, ``[C, H, W]``: packing 2 x 2 of them into a token, and
    the places of tokens, are the target's own. The module is shown the noise level of a tick, as in ``FluxPipeline``,
    and predicts noise minus data. :class:`JointTarget` says what rows of one image share.

    Args:
        module: the transformer, in evaluation mode.
        latent_shape: (C, H, W), even; None: 128 x 128, the pipeline's own.
        null_condition: as in :class:`TextTarget`, for guidance by two branches (the pipeline's ``true_cfg_scale``).
        guidance: the scale that a distilled module (``config.guidance_embeds``) is told, of all images; None: its
            conditions have ``guidance [N]``. It is no guidance of this library's, which has two branches.

    Raises:
        TypeError, ValueError: as :class:`TextTarget`; or ``guidance`` for a module that is told none.
    """

    module_class = "FluxTransformer2DModel"

    def __init__(
        self,
        module: Any,
        latent_shape: Sequence[int] | None = None,
        null_condition: Condition | None = None,
        guidance: float | None = None,
    ) -> None:
        self.guidance = None if guidance is None else check_float("FluxTarget", "guidance", guidance, 0.0)
        super().__init__(module, latent_shape, null_condition)
        config = self.module.config
        if guidance is not None and not config.guidance_embeds:
            fail(self._name, "guidance", "None for a module without guidance_embeds", guidance)
        if config.patch_size != 1 or self.module.out_channels != config.in_channels:
            found = f"patch_size {config.patch_size}, {self.module.out_channels} output channels"
            fail(self._name, "module", f"one of packed latents, with {config.in_channels} output channels", found)
        self._rotation: tuple[Tensor, Tensor] | None = None
        self.recheck(self._name)

    @property
    def _entering(self) -> Tensor:
        return self.module.x_embedder.weight

    @property
    def patch(self) -> int:
        """Elements of the latent along a side of a token."""
        return _PACKED

    @property
    def forms(self) -> Mapping[str, Form]:
        """Text and pooled text, and the guidance of a distilled module that has none of its own."""
        forms = dict(super().forms)
        if self.module.config.guidance_embeds and self.guidance is None:
            forms["guidance"] = Form(())
        return forms

    def convention(self) -> tuple[Any, ...]:
        """The guidance that the module is told."""
        return (self.guidance,)

    def _channels(self) -> int:
        packed = self.module.config.in_channels
        if packed % _PACKED**2:
            fail(self._name, "module", f"one with a multiple of {_PACKED**2} input channels", packed)
        return packed // _PACKED**2

    def _own_shape(self) -> tuple[int, int, int]:
        return self._channels(), 128, 128

    def _shown(self, t: Tensor) -> Tensor:
        return super()._shown(t) / 1000

    def _time_embedder(self, shown: Tensor) -> Tensor:
        return super()._time_embedder(shown.to(self.dtype) * 1000)

    def _told(self, values: Mapping[str, Tensor]) -> Tensor | None:
        """Guidance ``[M]`` of conditions, in the module's dtype; None where it is told none."""
        if not self.module.config.guidance_embeds:
            return None
        if self.guidance is None:
            return values["guidance"]
        return torch.full((len(values[POOLED]),), self.guidance, dtype=self.dtype, device=self.device)

    def _condition_vectors(self, values: Mapping[str, Tensor]) -> Tensor | None:
        vectors, told, embedder = super()._condition_vectors(values), self._told(values), self.module.time_text_embed
        if told is None:
            return vectors
        return embedder.guidance_embedder(embedder.time_proj(told * 1000).to(self.dtype)) + vectors

    def _ids(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Places of text tokens ``[T, 3]``, all the same, and of image tokens, by row and column."""
        rows, columns = (torch.arange(size, device=self.device) for size in self._grid)
        grid = torch.cartesian_prod(rows, columns)
        image = torch.cat([torch.zeros_like(grid[:, :1]), grid], 1).to(self.dtype)
        return torch.zeros(tokens, 3, dtype=self.dtype, device=self.device), image

    def _prepare(self) -> None:
        self._rotation = self.module.pos_embed(torch.cat(self._ids(self.texts.embeds.shape[1])))

    def _packed(self, x: Tensor) -> Tensor:
        """Latents ``[R, C, H, W]`` as tokens ``[R, T, 4 C]``, channels first within a token."""
        (rows, columns), patch = self._grid, _PACKED
        cells = x.reshape(-1, self.latent_shape[0], rows, patch, columns, patch)
        return cells.permute(0, 2, 4, 1, 3, 5).reshape(len(x), rows * columns, -1)

    def _unpacked(self, tokens: Tensor) -> Tensor:
        (rows, columns), patch = self._grid, _PACKED
        cells = tokens.reshape(len(tokens), rows, columns, -1, patch, patch)
        return cells.permute(0, 3, 1, 4, 2, 5).reshape(len(tokens), *self.latent_shape)

    def _call(self, x: Tensor, t: Tensor, values: Mapping[str, Tensor]) -> object:
        text, image = self._ids(values[EMBEDS].shape[1])
        made = self._whole(
            self._packed(x),
            encoder_hidden_states=values[EMBEDS],
            pooled_projections=values[POOLED],
            timestep=t,
            img_ids=image,
            txt_ids=text,
            guidance=self._told(values),
        )
        return self._unpacked(made.sample)

    def features(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Tokens of the image ``[R, T, D]`` after the last block."""
        module, text, embedding = self.module, self._text_of_rows(y), self._conditioning(t, y)
        h, rotation = module.x_embedder(self._packed(x.to(self.dtype))), self._rotation
        for block in [*module.transformer_blocks, *module.single_transformer_blocks]:
            text, h = block(hidden_states=h, encoder_hidden_states=text, temb=embedding, image_rotary_emb=rotation)
        return h

    def head(self, h: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Velocity towards the data ``[R, C, H, W]``."""
        return self._as_output(self._unpacked(self._normed_out(h, t, y)))
