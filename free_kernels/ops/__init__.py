"""The public ops.

Each is one node of a graph that ``torch.compile`` makes, once for all sizes and seeds. Kernels have no gradient: where
autograd records a call, ``backend="auto"`` takes the reference in plain PyTorch, and a kernel's name is refused.
"""

from free_kernels.ops.attention import append_features, feature_attention, rewind_features
from free_kernels.ops.coupling import (
    Coupling,
    couple,
    couple_block,
    couple_block_philox,
    couple_philox,
    gaussian_transition,
)
from free_kernels.ops.packing import commit_drafts, pack_drafts
from free_kernels.ops.random import philox_normal, philox_uniform

__all__ = [
    "Coupling",
    "append_features",
    "commit_drafts",
    "couple",
    "couple_block",
    "couple_block_philox",
    "couple_philox",
    "feature_attention",
    "gaussian_transition",
    "pack_drafts",
    "philox_normal",
    "philox_uniform",
    "rewind_features",
]
