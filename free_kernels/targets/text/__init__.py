"""Adapters for text-to-image transformers of diffusers; they need nothing of it but the module that they are given."""

from __future__ import annotations

from free_kernels.targets.text.base import TextTarget, is_diffusers_class
from free_kernels.targets.text.joint import FluxTarget, SD3Target
from free_kernels.targets.text.pixart import PixArtTarget
from free_kernels.targets.text.sana import SanaTarget

TEXT_TARGETS: tuple[type[TextTarget], ...] = (PixArtTarget, SD3Target, FluxTarget, SanaTarget)


def text_target_class(module: object) -> type[TextTarget] | None:
    """The adapter of a module's class; None where it is none of theirs."""
    return next((kind for kind in TEXT_TARGETS if is_diffusers_class(module, kind.module_class)), None)


__all__ = ["TEXT_TARGETS", "FluxTarget", "PixArtTarget", "SD3Target", "SanaTarget", "TextTarget", "text_target_class"]
