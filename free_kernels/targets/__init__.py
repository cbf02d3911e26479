"""Adapters that split a network at its top block."""

from __future__ import annotations

from free_kernels.targets.adapt import as_target, check_target
from free_kernels.targets.check import TargetCheck
from free_kernels.targets.diffusers import DiffusersDiTTarget, DiffusersFlowTarget, is_diffusers_dit
from free_kernels.targets.dit import DiTTarget, is_dit_module
from free_kernels.targets.hook import HookTarget
from free_kernels.targets.sit import SiTTarget
from free_kernels.targets.text import FluxTarget, PixArtTarget, SanaTarget, SD3Target

__all__ = [
    "DiTTarget",
    "DiffusersDiTTarget",
    "DiffusersFlowTarget",
    "FluxTarget",
    "HookTarget",
    "PixArtTarget",
    "SD3Target",
    "SanaTarget",
    "SiTTarget",
    "TargetCheck",
    "as_target",
    "check_target",
    "is_diffusers_dit",
    "is_dit_module",
]
