"""Drafters: predictors of the target's next top-block feature."""

from __future__ import annotations

import copy
import inspect
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from free_kernels.drafters.feature import DrafterConfig, FeatureDrafter
from free_kernels.drafters.frozen import FrozenDrafter
from free_kernels.protocols import Drafter, DrafterDefaults, Target, TargetDefaults
from free_kernels.validation import fail
from free_kernels.wrappers import see_through

__all__ = ["DrafterConfig", "FeatureDrafter", "FrozenDrafter", "as_drafter"]

# Of drafters within torch.compile: what is called in their place, one for all runs.
_COMPILED: WeakKeyDictionary[nn.Module, FeatureDrafter] = WeakKeyDictionary()


def own_drafter(where: str, drafter: object) -> object:
    """What a ``drafter`` argument stands for: a learned drafter behind its wrappers, which may be new in each run."""
    is_other = isinstance(drafter, nn.Module) and not isinstance(drafter, FeatureDrafter)
    return _unwrapped(where, drafter) if is_other else drafter


def as_drafter(where: str, drafter: object, target: Target) -> Drafter:
    """A sampler's ``drafter`` argument as a drafter that fits the target.

    A :class:`FeatureDrafter` may be wrapped as a target's module may be; within ``torch.compile`` it stays compiled.

    Raises:
        ValueError: an unknown name, a drafter made for a target of other shapes, or sharded weights.
        TypeError: not callable.
    """
    if isinstance(drafter, str):
        if drafter != "frozen":
            fail(where, "drafter", "'frozen' or a drafter", drafter)
        return FrozenDrafter()
    if not callable(drafter) or isinstance(drafter, type):
        fail(where, "drafter", "'frozen' or a callable drafter", drafter, TypeError)
    drafter = own_drafter(where, drafter)
    if not isinstance(drafter, FeatureDrafter | FrozenDrafter):
        _check_call(where, drafter)
    pooled = TargetDefaults.read(target, "pooled")
    if pooled is not None:
        _check_pooled(where, pooled, target)
    DrafterDefaults.read(drafter, "check_target")(target, where)
    return drafter if pooled is None else DrafterDefaults.read(drafter, "conditioned")(pooled)


def _check_call(where: str, drafter: Any) -> None:
    """Raise TypeError unless a drafter can be called as :class:`free_kernels.protocols.Drafter` is."""
    try:
        signature = inspect.signature(drafter.forward if isinstance(drafter, nn.Module) else drafter)
    except ValueError:  # compiled code may have none
        return
    try:
        signature.bind("feature", "previous", "state", "t", "y")
    except TypeError:
        wanted = "callable with (feature, previous, state, t, y)"
        fail(where, "drafter", wanted, f"{type(drafter).__name__}{signature}", TypeError)


def _check_pooled(where: str, pooled: object, target: Target) -> None:
    """Raise ValueError or TypeError unless a target's condition vectors are one for each of its labels."""
    rows = target.num_classes, target.num_classes + 1
    wanted = f"floating point [{rows[0]} or {rows[1]}, P], a vector for each condition"
    if not isinstance(pooled, Tensor):
        fail(where, "target.pooled", wanted, pooled, TypeError)
    if pooled.ndim != 2 or len(pooled) not in rows or not pooled.is_floating_point():
        fail(where, "target.pooled", wanted, pooled)


def _unwrapped(where: str, drafter: nn.Module) -> nn.Module:
    """The learned drafter behind wrappers; any other module as it is."""
    seen = see_through(where, drafter)
    if not isinstance(seen.module, FeatureDrafter):
        return drafter
    if seen.compiler is None:
        return seen.module
    if drafter not in _COMPILED:
        _COMPILED[drafter] = copy.copy(seen.module)
        _COMPILED[drafter].compile_with(seen.compiler)
    # It may have been changed since.
    for name in ("frozen_share", "calibration", "target_facts"):
        setattr(_COMPILED[drafter], name, getattr(seen.module, name))
    return _COMPILED[drafter]
