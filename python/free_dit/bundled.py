"""The trained pairs of DiT and drafter that ship with the package."""

from __future__ import annotations

from pathlib import Path

import torch

from free_dit.networks.families import load_model
from free_kernels.drafters import FeatureDrafter
from free_kernels.targets import DiTTarget, as_target
from free_kernels.validation import check_choice

MODELS = Path(__file__).parent / "models"


def bundled_names() -> tuple[str, ...]:
    """Names that :func:`load_bundled` takes."""
    return tuple(sorted(folder.name for folder in MODELS.iterdir() if (folder / "model.safetensors").is_file()))


def load_bundled(name: str, device: torch.device | str = "cpu") -> tuple[DiTTarget, FeatureDrafter]:
    """A shipped target and its learned drafter, ready for ``sample(target, labels, drafter=drafter)``.

    A flow model (a :class:`free_kernels.SiTTarget`) also needs ``schedule=FlowSDESchedule()``.

    Raises:
        ValueError: no bundled model of this name.
    """
    check_choice("load_bundled", "name", name, bundled_names())
    target = as_target("load_bundled", load_model(MODELS / name / "model.safetensors").to(device))
    return target, FeatureDrafter.load(MODELS / name / "drafter.safetensors", target)
