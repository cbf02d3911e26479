"""The public ops."""

from free_kernels.ops.coupling import Coupling, couple, gaussian_transition
from free_kernels.ops.packing import commit_drafts, pack_drafts
from free_kernels.ops.random import philox_normal, philox_uniform

__all__ = [
    "Coupling",
    "commit_drafts",
    "couple",
    "gaussian_transition",
    "pack_drafts",
    "philox_normal",
    "philox_uniform",
]
