"""Drafters: predictors of the target's next top-block feature."""

from __future__ import annotations

from free_kernels.drafters.feature import DrafterConfig, FeatureDrafter
from free_kernels.drafters.frozen import FrozenDrafter
from free_kernels.protocols import Drafter, DrafterDefaults, Target
from free_kernels.validation import fail

__all__ = ["DrafterConfig", "FeatureDrafter", "FrozenDrafter", "as_drafter"]


def as_drafter(where: str, drafter: object, target: Target) -> Drafter:
    """A sampler's ``drafter`` argument as a drafter that fits the target.

    Raises:
        ValueError: an unknown name, or a drafter made for a target of other shapes.
        TypeError: not callable.
    """
    if isinstance(drafter, str):
        if drafter != "frozen":
            fail(where, "drafter", "'frozen' or a drafter", drafter)
        return FrozenDrafter()
    if not callable(drafter) or isinstance(drafter, type):
        fail(where, "drafter", "'frozen' or a callable drafter", drafter, TypeError)
    DrafterDefaults.read(drafter, "check_target")(target, where)
    return drafter
