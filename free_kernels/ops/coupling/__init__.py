"""Coupling of drafts and target: draft by draft or all drafts of a round together; noise given or made from keys."""

from free_kernels.ops.coupling.api import (
    Coupling,
    couple,
    couple_block,
    couple_block_philox,
    couple_philox,
    gaussian_transition,
)

__all__ = ["Coupling", "couple", "couple_block", "couple_block_philox", "couple_philox", "gaussian_transition"]
