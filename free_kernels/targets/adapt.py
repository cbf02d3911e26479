"""From a network to its target: which adapter takes it, and whether that computes what the network computes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from free_kernels.protocols import Target, TargetDefaults
from free_kernels.targets.adaln import AdaLNTarget
from free_kernels.targets.check import TargetCheck, compare_batches, difference, probe_rows
from free_kernels.targets.diffusers import DiffusersDiTTarget, is_diffusers_dit
from free_kernels.targets.dit import DiTTarget, is_dit_module
from free_kernels.targets.hook import HookTarget
from free_kernels.targets.inspection import refuse_unsafe
from free_kernels.targets.sit import SiTTarget
from free_kernels.targets.text import TEXT_TARGETS, TextTarget, text_target_class
from free_kernels.validation import check_int, check_sizes, fail
from free_kernels.wrappers import kind_of, see_through


def as_target(where: str, target: object) -> Target:
    """A target as it is, or the adapter that recognises a module, which may be wrapped.

    A target that an adapter made is compared again with its module's own call where the module has changed.

    Raises:
        TypeError: neither.
        ValueError: a module that cannot be sampled; the message says why.
    """
    if isinstance(target, AdaLNTarget | HookTarget | TextTarget):
        target.recheck(where)
        return target  # type: ignore[return-value]
    module = see_through(where, target).module if isinstance(target, nn.Module) else target
    if is_dit_module(module):
        kind = SiTTarget if TargetDefaults.read(module, "family") == "flow" else DiTTarget
        return kind(target)  # type: ignore[arg-type]
    if is_diffusers_dit(module):
        return DiffusersDiTTarget(target)  # type: ignore[arg-type]
    text_target = text_target_class(module)
    if text_target is not None:
        return text_target(target)  # type: ignore[return-value]
    if isinstance(target, nn.Module) and not isinstance(target, Target):
        fail(
            where,
            "target",
            "a Target (HookTarget makes one of any module), a diffusers DiTTransformer2DModel"
            f"{''.join(f', {kind.module_class}' for kind in TEXT_TARGETS)}, "
            "or a DiT module with x_embedder, t_embedder, y_embedder, blocks and final_layer",
            kind_of(target),
            TypeError,
        )
    missing = [
        name
        for name in ("latent_shape", "feature_shape", "num_classes", "learns_variance", "features", "head")
        if not hasattr(target, name)
    ]
    if missing:
        found = f"{type(target).__name__} without {', '.join(missing)}"
        fail(where, "target", "a Target or a DiT module", found, TypeError)
    _check_members(where, target)  # type: ignore[arg-type]
    return target  # type: ignore[return-value]


def _check_members(where: str, target: Target) -> None:
    """Raise TypeError or ValueError unless a target of a user's own declares shapes and numbers."""
    check_sizes(where, "target.latent_shape", target.latent_shape)
    check_sizes(where, "target.feature_shape", target.feature_shape, "(T, D)")
    # One that takes conditions has a number once it is bound to some.
    if TargetDefaults.read(target, "conditioned") is None or target.num_classes is not None:
        check_int(where, "target.num_classes", target.num_classes, 0)
    if not isinstance(target.learns_variance, bool | np.bool_):
        fail(where, "target.learns_variance", "a bool", repr(target.learns_variance), TypeError)


@torch.no_grad()
def check_target(target: object, expected: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None) -> TargetCheck:
    """Compare ``head(features(x, t, y), t, y)`` with the network's own call on random rows: for the owner of a fork.

    The samplers do this by themselves, once for a module and its weights, for every module that they recognise. Here it
    is done anew, and for any target: a :class:`HookTarget`'s head is compared with its module's call, and a target of
    one's own with ``expected``.

    Args:
        target: a target, or a module that an adapter recognises.
        expected: what the target should give, ``expected(x, t, y) -> [R, C or 2C, H, W]`` for states ``[R, C, H, W]``,
            timesteps and labels int64 ``[R]``. None: the module's own call; for a target without a module nothing, and
            two batches are compared with each other only.

    Returns:
        The way taken, the largest difference found, relative to the output's size, and what rounding explains.

    Raises:
        TypeError: neither a target nor a module that is recognised.
        ValueError: the two differ, by more than rounding, whichever way the blocks are run; or the call is not one
            function of its inputs: a sub-module in training mode, offload hooks, hooks of diffusers, a cache of earlier
            steps, weights sharded over processes, outputs that depend on earlier calls or on the batch.

    Example:
        A fork of a DiT, with the result of a network that is split exactly::

            free_kernels.check_target(dit)
            # TargetCheck(path='hoisted', difference=4.1e-07, tolerance=3.1e-05, network_rows=2)
    """
    where = "check_target"
    adapted = as_target(where, target)
    if isinstance(adapted, AdaLNTarget | TextTarget):
        found = adapted.compare(where)
        return found if expected is None else _compared(where, adapted, expected, found)
    module = getattr(adapted, "module", None)
    if isinstance(module, nn.Module):
        refuse_unsafe(where, module)
    else:
        module = None
    found = compare_batches(where, "target", adapted, module, probe_rows(adapted))
    if expected is None and isinstance(adapted, HookTarget):
        expected = adapted.own
    return found if expected is None else _compared(where, adapted, expected, found)


def _compared(
    where: str, target: Target, expected: Callable[[Tensor, Tensor, Tensor], Tensor], found: TargetCheck
) -> TargetCheck:
    """The largest of the differences; raises ValueError where one is more than rounding."""
    rows = probe_rows(target)
    gap = difference(target.head(target.features(*rows), rows.t, rows.y), expected(*rows))
    if gap > found.tolerance:
        fail(
            where,
            "target",
            "one whose head(features(x, t, y), t, y) is the network's own call, or `expected`",
            f"a difference of {gap:.2g} of its size (rounding explains {found.tolerance:.1e})",
        )
    return found._replace(difference=max(gap, found.difference), network_rows=found.network_rows + 4)
