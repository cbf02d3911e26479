"""The training-free drafter."""

from __future__ import annotations

from torch import Tensor

from free_kernels.protocols import DrafterDefaults


class FrozenDrafter(DrafterDefaults):
    """Has nothing of its own to draft with: its feature is the last exact one.

    The samplers do not call it. They carry the clean samples of the target's earlier outputs along; see
    :func:`free_kernels.ops.drafting.replay_drafts`.
    """

    is_free, repeats_feature = True, True

    def __call__(self, feature: Tensor, previous: Tensor, state: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The feature itself, ``[R, T, D]``."""
        return feature
