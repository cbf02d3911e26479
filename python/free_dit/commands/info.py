"""The command ``info``."""

from __future__ import annotations

import json

import torch
from tyro.conf import Positional

from free_dit.bundled import bundled_names
from free_dit.commands.shared import console
from free_dit.loading import load_target
from free_kernels.extension import build_config, has_extension, why_no_extension


def info(model: Positional[str] = "digits") -> None:
    """Shapes and sizes of a model, and what this installation can do.

    Args:
        model: a bundled model's name, a checkpoint, or a folder of diffusers.
    """
    target, drafter = load_target(model)
    facts = {
        "bundled models": list(bundled_names()),
        "model": model,
        "latent_shape": target.latent_shape,
        "feature_shape": target.feature_shape,
        "num_classes": target.num_classes,
        "learns_variance": target.learns_variance,
        "parameters": sum(p.numel() for p in target.module.parameters()),  # type: ignore[attr-defined]
        "drafter_parameters": sum(p.numel() for p in drafter.parameters()) if drafter is not None else None,  # type: ignore[attr-defined]
        "torch": torch.__version__,
        "cuda": torch.cuda.is_available(),
        "extension": build_config() if has_extension() else why_no_extension(),
    }
    console.print_json(json.dumps(facts, default=str))
