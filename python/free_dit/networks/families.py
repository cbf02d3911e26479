"""The two families of networks, a DiT that predicts noise and a SiT that predicts a velocity: files and schedules."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from free_dit.configuration import build
from free_dit.networks.dit import DiT, DiTConfig
from free_dit.networks.sit import SiT
from free_kernels.checkpoint import CheckpointError, check_depth, load_checkpoint, load_module, save_checkpoint
from free_kernels.protocols import Target, TargetDefaults
from free_kernels.schedules import DDPMSchedule, FlowSDESchedule

# What samples are.
DRAWS = ("pixels", "latents")
# The network class of each training objective.
FAMILIES: dict[str, type[DiT]] = {"noise": DiT, "velocity": SiT}


def schedule_for(target: Target, num_steps: int) -> DDPMSchedule | FlowSDESchedule:
    """The default schedule of a target's family: the SDE of a flow model, otherwise DDPM."""
    if TargetDefaults.read(target, "family") == "flow":
        return FlowSDESchedule(num_steps, num_train_steps=target.num_train_steps)  # type: ignore[attr-defined]
    return DDPMSchedule(num_steps)


def device_of(target: Target) -> torch.device:
    """``target.device``; the CPU for a target without this attribute."""
    return torch.device(TargetDefaults.read(target, "device") or "cpu")


def save_model(path: Path, model: DiT, weights: dict[str, Tensor] | None = None) -> None:
    """Write a DiT or SiT with its config; ``weights`` (of the same shape) replace its own, such as averaged ones."""
    objective = next(name for name, family in FAMILIES.items() if type(model) is family)
    metadata = {"kind": "dit", "objective": objective, "config": model.config.to_dict()}
    # What its samples are, where that is known; see free_dit.latents.
    if getattr(model, "draws", None) is not None:
        metadata["draws"] = model.draws
    save_checkpoint(path, weights if weights is not None else model.state_dict(), metadata)


def load_model(path: str | Path) -> DiT:
    """Read a DiT or SiT written by :func:`save_model`, in evaluation mode.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: broken, truncated, or not a file of :func:`save_model`.
    """
    tensors, metadata = load_checkpoint(path, "dit")
    objective = metadata.get("objective", "noise")
    if not isinstance(objective, str) or objective not in FAMILIES:
        raise CheckpointError(f"load_model: {path} must have been trained on {' or '.join(FAMILIES)}, got {objective}")

    def build_model() -> DiT:
        config = build(DiTConfig, metadata["config"], str(path))
        check_depth(config.depth, tensors)
        return FAMILIES[objective](config)

    draws = metadata.get("draws")
    if draws not in (None, *DRAWS):
        raise CheckpointError(f"load_model: {path} must draw {' or '.join(DRAWS)}, got {draws!r}")
    model = load_module(build_model, tensors, path)
    model.draws = draws
    return model.eval().requires_grad_(False)
