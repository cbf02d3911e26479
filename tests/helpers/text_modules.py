"""Small random transformers of diffusers' text-to-image families, and conditions with ragged masks for them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from free_kernels import Conditions, DDPMSchedule, FlowSDESchedule, FluxTarget, PixArtTarget, SanaTarget, SD3Target
from free_kernels.targets.check import rounding_tolerance

TOKENS, WIDTH, POOLED = 7, 32, 12


def randomised(module: nn.Module) -> Any:
    """Every weight random, so that no initial zero hides a mistake; in evaluation mode."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in module.parameters():
            scale = 0.3 if weight.ndim < 2 else weight[0].numel() ** -0.5
            weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
    return module.eval().requires_grad_(False)


def pixart(**changes: Any) -> Any:
    """Two blocks of width 24, latents 4 x 8 x 8, a learned variance."""
    from diffusers import PixArtTransformer2DModel

    settings = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 2,
        "cross_attention_dim": 24,
        "sample_size": 8,
        "patch_size": 2,
        "caption_channels": WIDTH,
    }
    return randomised(PixArtTransformer2DModel(**settings | changes))


def sana(**changes: Any) -> Any:
    """Two blocks of width 24, latents 4 x 8 x 8."""
    from diffusers import SanaTransformer2DModel

    settings = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 4,
        "attention_head_dim": 6,
        "num_layers": 2,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 12,
        "cross_attention_dim": 24,
        "caption_channels": WIDTH,
        "sample_size": 8,
        "timestep_scale": 0.001,
    }
    return randomised(SanaTransformer2DModel(**settings | changes))


def sd3(**changes: Any) -> Any:
    """Three blocks of width 16, one with a second attention, latents 4 x 8 x 8."""
    from diffusers import SD3Transformer2DModel

    settings = {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 3,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": WIDTH,
        "caption_projection_dim": 16,
        "pooled_projection_dim": POOLED,
        "pos_embed_max_size": 12,
        "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
    }
    return randomised(SD3Transformer2DModel(**settings | changes))


def flux(**changes: Any) -> Any:
    """Two double and two single blocks of width 24, packed latents of 4 channels."""
    from diffusers import FluxTransformer2DModel

    settings = {
        "in_channels": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 12,
        "num_attention_heads": 2,
        "joint_attention_dim": WIDTH,
        "pooled_projection_dim": POOLED,
        "axes_dims_rope": (4, 4, 4),
    }
    return randomised(FluxTransformer2DModel(**settings | changes))


# By name: a target, made anew.
TARGETS = {
    "pixart": lambda: PixArtTarget(pixart()),
    "pixart, no variance, sizes": lambda: PixArtTarget(
        pixart(out_channels=4, use_additional_conditions=True), latent_shape=(4, 12, 8)
    ),
    "pixart, texts kept raw": lambda: PixArtTarget(pixart(caption_channels=20)),
    "sd3": lambda: SD3Target(sd3()),
    "sd3, another size": lambda: SD3Target(sd3(dual_attention_layers=(), qk_norm=None), latent_shape=(4, 12, 16)),
    "sd3, texts kept raw": lambda: SD3Target(sd3(joint_attention_dim=8)),
    "flux": lambda: FluxTarget(flux(), latent_shape=(4, 8, 12)),
    "flux, told its guidance": lambda: FluxTarget(flux(guidance_embeds=True), latent_shape=(4, 8, 8), guidance=3.5),
    "flux, guidance of each image": lambda: FluxTarget(flux(guidance_embeds=True), latent_shape=(4, 8, 8)),
    "sana": lambda: SanaTarget(sana()),
    "sana, patches and norms": lambda: SanaTarget(
        sana(qk_norm="rms_norm_across_heads", patch_size=2, interpolation_scale=1), latent_shape=(4, 8, 12)
    ),
}


def some_texts(target: Any, count: int, tokens: int = TOKENS, seed: int = 0) -> dict[str, Tensor]:
    """Random conditions of ``count`` images: ragged masks, some with holes, the last image's with nothing kept."""
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for name, form in target.forms.items():
        shape = count, *(tokens if size == "T" else size for size in form.shape)
        values[name] = _mask(shape, generator) if form.mask else torch.randn(shape, generator=generator)
        if name == "guidance":
            values[name] = values[name].abs() + 1
    return values


def _mask(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    count, tokens = shape
    kept = torch.randint(1, tokens + 1, (count, 1), generator=generator)
    mask = (torch.arange(tokens) < kept).long()
    # Its first token is not kept where there is another.
    mask[1::3, 0] = (kept[1::3, 0] == 1).long()
    mask[-1] = 0
    return mask


def call(target: Any, x: Tensor, t: Tensor, values: dict[str, Tensor]) -> Tensor:
    """The module's own forward as its pipeline calls it, with a copy of its text for every row; what it predicts.

    Args:
        target: whose module it is.
        x: states ``[R, C, H, W]``.
        t: timesteps or ticks ``[R]``.
        values: conditions of the rows ``[R, ...]``.
    """
    module, kind = target.module, type(target)
    text, sigma = values["prompt_embeds"], 1 - t / 100_000
    if kind is PixArtTarget:
        sizes = {name: values.get(name) for name in ("resolution", "aspect_ratio")}
        mask = values.get("prompt_attention_mask")
        return module(
            x, encoder_hidden_states=text, timestep=t, added_cond_kwargs=sizes, encoder_attention_mask=mask
        ).sample
    if kind is SanaTarget:
        shown = sigma * 1000 * module.config.timestep_scale
        return -module(x, text, shown, encoder_attention_mask=values.get("prompt_attention_mask")).sample
    pooled = values["pooled_prompt_embeds"]
    if kind is SD3Target:
        return -module(x, encoder_hidden_states=text, pooled_projections=pooled, timestep=sigma * 1000).sample
    rows, _, height, width = x.shape
    guidance = values.get("guidance")
    if module.config.guidance_embeds and guidance is None:
        guidance = torch.full((rows,), target.guidance)
    # As FluxPipeline packs latents and numbers their places.
    places = torch.zeros(height // 2, width // 2, 3)
    places[..., 1], places[..., 2] = torch.arange(height // 2)[:, None], torch.arange(width // 2)
    packed = module(
        F.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2),
        encoder_hidden_states=text,
        pooled_projections=pooled,
        timestep=sigma,
        img_ids=places.flatten(0, 1),
        txt_ids=torch.zeros(text.shape[1], 3),
        guidance=guidance,
    ).sample
    return -F.pixel_shuffle(packed.transpose(1, 2).unflatten(2, (height // 2, width // 2)), 2)


# Rows of a packed call: images in another order than stored, with one, two and three rows, and the null condition's.
PLACES = torch.tensor([2, 2, 0, 1, 1, 1, 4, 4, 3])
IMAGES = 4


def bound(target: Any, seed: int = 0) -> tuple[dict[str, Tensor], Any]:
    """Conditions ``[IMAGES + 1, ...]``, the last of which is the null condition, and the target with them."""
    values = some_texts(target, IMAGES + 1, seed=seed)
    null = {name: leaf[-1] for name, leaf in values.items()}
    given = {name: leaf[:-1] for name, leaf in values.items()}
    return values, target.conditioned(Conditions(given, null))


def rows_of(target: Any, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Random states and timesteps or ticks of a packed call, and whose they are."""
    generator = torch.Generator().manual_seed(seed)
    span = 100_000 if target.family == "flow" else 1000
    x = torch.randn(len(PLACES), *target.latent_shape, generator=generator)
    return x, torch.randint(0, span, (len(PLACES),), generator=generator), PLACES


def schedule_for(target: Any, num_steps: int = 10) -> DDPMSchedule | FlowSDESchedule:
    """A schedule of its family."""
    return FlowSDESchedule(num_steps, shift=3.0) if target.family == "flow" else DDPMSchedule(num_steps)


def bound_of(target: Any, samples: Tensor, steps: int) -> float:
    """How far two chains may be apart by rounding: each step adds what explains two calls, of a state's size."""
    return steps * rounding_tolerance(target.module, samples.device) * float(samples.abs().max())
