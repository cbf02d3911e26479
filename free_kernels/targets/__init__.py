"""Adapters that split a network at its top block."""

from __future__ import annotations

from torch import nn

from free_kernels.protocols import Target, TargetDefaults
from free_kernels.targets.diffusers import DiffusersDiTTarget, is_diffusers_dit
from free_kernels.targets.dit import DiTTarget, is_dit_module
from free_kernels.targets.hook import HookTarget
from free_kernels.targets.sit import SiTTarget
from free_kernels.validation import fail

__all__ = [
    "DiTTarget",
    "DiffusersDiTTarget",
    "HookTarget",
    "SiTTarget",
    "as_target",
    "is_diffusers_dit",
    "is_dit_module",
]


def as_target(where: str, target: object) -> Target:
    """A target as it is, or the adapter that recognises a module.

    Raises:
        TypeError: neither.
    """
    if is_dit_module(target):
        kind = SiTTarget if TargetDefaults.read(target, "family") == "flow" else DiTTarget
        return kind(target)  # type: ignore[arg-type]
    if is_diffusers_dit(target):
        return DiffusersDiTTarget(target)  # type: ignore[arg-type]
    if isinstance(target, nn.Module) and not isinstance(target, Target):
        fail(
            where,
            "target",
            "a Target (HookTarget makes one of any module), a diffusers DiTTransformer2DModel, "
            "or a DiT module with x_embedder, t_embedder, y_embedder, blocks and final_layer",
            type(target).__name__,
            TypeError,
        )
    missing = [
        name
        for name in ("latent_shape", "feature_shape", "num_classes", "learns_variance", "features", "head")
        if not hasattr(target, name)
    ]
    if missing:
        found = f"{type(target).__name__} without {', '.join(missing)}"
        fail(where, "target", "a Target or a DiT module", found, TypeError)
    return target  # type: ignore[return-value]
