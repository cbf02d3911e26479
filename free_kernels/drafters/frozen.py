"""The training-free drafter."""

from __future__ import annotations

from torch import Tensor

from free_kernels.protocols import DrafterDefaults


class FrozenDrafter(DrafterDefaults):
    """Drafts with the last exact feature: the top block's output changes little from step to step."""

    is_free, repeats_feature = True, True

    def __call__(self, feature: Tensor, previous: Tensor, state: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The feature itself, ``[R, T, D]``."""
        return feature
