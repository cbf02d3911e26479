"""The command ``info``."""

from __future__ import annotations

import json
from typing import Annotated

import torch
from tyro.conf import OmitArgPrefixes, Positional

from free_dit.bundled import bundled_names
from free_dit.commands.shared import console
from free_dit.devices import resolve_device
from free_dit.latents import draws_latents
from free_dit.loading import TargetFacts, facts_of, load_pair
from free_kernels.extension import build_config, has_extension, why_no_extension


def info(
    model: Positional[str] = "digits",
    facts: Annotated[TargetFacts, OmitArgPrefixes] = TargetFacts(),
    device: str = "auto",
) -> None:
    """Shapes and sizes of a model, and what this installation can do.

    Args:
        model: a bundled model's name, a checkpoint, or a folder of diffusers.
        facts: what the model's file may not say of itself.
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1" ...
    """
    place = resolve_device("info", device)
    target, chosen = load_pair(model, "bundled" if model in bundled_names() else "none", facts, place)
    drafter = None if isinstance(chosen, str) else chosen
    shown = {
        "bundled models": list(bundled_names()),
        "model": model,
        "latent_shape": target.latent_shape,
        "feature_shape": target.feature_shape,
        "num_classes": target.num_classes,
        "learns_variance": target.learns_variance,
        "draws": "latents" if draws_latents(target) else "pixels",
        "num_heads": facts_of(target).get("num_heads"),
        "device": str(place),
        "parameters": sum(p.numel() for p in target.module.parameters()),  # type: ignore[attr-defined]
        "drafter_parameters": sum(p.numel() for p in drafter.parameters()) if drafter is not None else None,  # type: ignore[attr-defined]
        "torch": torch.__version__,
        "cuda": torch.cuda.is_available(),
        "extension": build_config() if has_extension() else why_no_extension(),
    }
    console.print_json(json.dumps(shown, default=str))
