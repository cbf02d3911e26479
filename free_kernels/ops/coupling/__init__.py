"""The coupling of drafts and target, draft by draft or a round together, with noise from memory or by keys."""

from free_kernels.ops.coupling.api import Coupling, couple, couple_philox, gaussian_transition
from free_kernels.ops.coupling.api_block import couple_block, couple_block_philox

__all__ = ["Coupling", "couple", "couple_block", "couple_block_philox", "couple_philox", "gaussian_transition"]
