"""Adapter for any network whose top-block feature is the output of one of its sub-modules."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from free_kernels.conditioning import ShowsTimesteps
from free_kernels.conditions import Condition, Conditions
from free_kernels.protocols import TargetDefaults
from free_kernels.targets.check import Known, TargetCheck, checked, compare_batches, probe_rows
from free_kernels.targets.inspection import Reached, StopHere, refuse_unsafe
from free_kernels.validation import check_int, describe, fail
from free_kernels.wrappers import first_output, see_through

# What stands for conditions is the labels ``[R]`` of a network of class labels, else tensors ``[R, ...]``.
Call = Callable[[nn.Module, Tensor, Tensor, Any], object]
Head = Callable[[Tensor, Tensor, Any], Tensor]


def _plain_call(module: nn.Module, x: Tensor, t: Tensor, y: Tensor) -> object:
    return module(x, t, y)


class HookTarget(ShowsTimesteps, TargetDefaults):
    """Any network as a :class:`free_kernels.protocols.Target`, by a forward hook.

    ``features`` runs the module's forward up to the output of ``feature_layer`` and stops there, so that what follows
    is not computed; ``head`` computes what follows. ``head(feature, t, y)`` has to be all that the module does after
    that layer. Nothing is hoisted, and leaving a forward by an exception is for eager mode: use it neither with
    ``cuda_graphs=True`` nor on a compiled module.

    A network of other conditions than class labels has ``num_classes`` None: ``call`` and ``head`` are then given the
    conditions of the rows, ``[R, ...]`` tensors in the dicts that the sampler was given. That is a copy of an image's
    condition for each of its rows, except where one image is sampled without guidance; adapters of a family do better.

    Args:
        module: the network, in evaluation mode.
        feature_layer: name of the sub-module, as in ``module.get_submodule``, whose output is the feature.
        head: maps features ``[R, T, D]``, int64 timesteps and labels ``[R]`` to the output ``[R, C or 2C, H, W]``.
        latent_shape: (C, H, W), or the shape of a state of another kind.
        feature_shape: (T, D).
        num_classes: number of labels; label ``num_classes`` is the null label. None: conditions of any kind.
        learns_variance: whether the output has 2C channels.
        call: how the module is called, ``call(module, x, t, y)``; ``module(x, t, y)`` if None. States come in the
            dtype of the module's first floating-point parameter.
        guidance_channels: leading channels that guidance mixes; C if None.
        has_null_label: False where the network knows no null label and cannot be guided.
        null_condition: the condition of the unconditional branch, in the form of one image's, unless the sampler is
            given another; with ``num_classes`` None only.
        pooled: for drafters: ``pooled(conditions) -> [M, P]``, a vector for each of M conditions ``[M, ...]``.

    Raises:
        TypeError: the module is no nn.Module, or head or call cannot be called.
        ValueError: a module that cannot be sampled (:func:`free_kernels.check_target` has the reasons), no such
            sub-module, or an impossible shape.
    """

    def __init__(
        self,
        module: nn.Module,
        feature_layer: str,
        head: Head,
        *,
        latent_shape: tuple[int, ...],
        feature_shape: tuple[int, int],
        num_classes: int | None,
        learns_variance: bool,
        call: Call | None = None,
        guidance_channels: int | None = None,
        has_null_label: bool = True,
        null_condition: Condition | None = None,
        pooled: Callable[[Any], Tensor] | None = None,
    ) -> None:
        where = "HookTarget"
        if not isinstance(module, nn.Module):
            fail(where, "module", "an nn.Module", describe(module), TypeError)
        seen = see_through(where, module)
        # A forward is left by an exception, which a compiled one cannot be: what was compiled runs as written.
        module = seen.module if seen.compiler is not None else seen.whole
        refuse_unsafe(where, module)
        layers = dict(seen.module.named_modules())
        if not isinstance(feature_layer, str) or feature_layer not in layers:
            fail(
                where, "feature_layer", f"the name of a sub-module of {type(module).__name__}", describe(feature_layer)
            )
        for name, function in (("head", head), ("call", call), ("pooled", pooled)):
            if not callable(function) and (name == "head" or function is not None):
                fail(where, name, "callable", describe(function), TypeError)
        self.module = module
        self.feature_layer = feature_layer
        self.latent_shape = _shape("latent_shape", latent_shape)
        self.feature_shape = _shape("feature_shape", feature_shape, 2)
        self.num_classes = 0 if num_classes is None else check_int(where, "num_classes", num_classes, 1)
        self.learns_variance = bool(learns_variance)
        self.has_null_label = bool(has_null_label)
        if num_classes is not None and (null_condition is not None or pooled is not None):
            fail(where, "null_condition and pooled", "None for a network of class labels", "one that is given")
        if num_classes is None:
            self.conditioned = self._conditioned
        self._null, self._pooled, self._conditions = null_condition, pooled, None
        channels = self.latent_shape[0]
        guided = channels if guidance_channels is None else guidance_channels
        self.guidance_channels = check_int(where, "guidance_channels", guided, 1, channels)
        self._layer = layers[feature_layer]
        self._head = head
        self._call = call or _plain_call
        # What was compared, of this target and its copies: a head mostly holds the module itself.
        self._known = Known()

    def _conditioned(self, conditions: Conditions) -> HookTarget:
        """A copy whose labels are places among conditions."""
        known = conditions.or_null("HookTarget", self._null).cast(self.dtype)
        clone = copy.copy(self)
        clone._conditions, clone.num_classes, clone.has_null_label = known, len(known), known.null is not None
        if self._pooled is not None:
            clone.pooled = known.vectors(self._pooled)
        return clone

    def _condition(self, y: Tensor) -> Any:
        """What the module is given of labels ``[R]``."""
        if self._conditions is None and not self.num_classes:
            fail("HookTarget", "conditions", "given: target.conditioned(Conditions(...))", "labels only")
        return y if self._conditions is None else self._conditions.rows(y)

    def recheck(self, where: str) -> None:
        """Refuse a module that can no longer be sampled.

        Raises:
            ValueError: as :func:`free_kernels.check_target`.
        """
        refuse_unsafe(where, self.module)

    def compare(self, where: str, timesteps: Tensor | None = None, labels: Tensor | None = None) -> TargetCheck:
        """Whether features and head are one function of their inputs, at timesteps that the module knows."""
        return compare_batches(where, "module", self, self.module, probe_rows(self, timesteps, labels))

    def hoisted(self, timesteps: Tensor, labels: Tensor) -> HookTarget:
        """The target itself; its calls are compared once for a module and its weights.

        Raises:
            ValueError: they depend on earlier calls or on the batch.
        """
        where = "HookTarget"
        walked = refuse_unsafe(where, self.module)
        checked((), self, self.module, walked, lambda: self.compare(where, timesteps, labels), self._known)
        return self

    def own(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Output of the module's own call: itself, the first of several, or the ``sample`` of diffusers."""
        return first_output(self._call(self.module, x.to(self.dtype), self._timestep(t), self._condition(y)))

    def paths(self) -> list[str]:
        """There is one way: the module's own forward."""
        return ["features"]

    @property
    def _weight(self) -> Tensor | None:
        return next((p for p in self.module.parameters() if p.is_floating_point()), None)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the module's weights."""
        return torch.float32 if self._weight is None else self._weight.dtype

    @property
    def device(self) -> torch.device:
        """The module's device."""
        return torch.device("cpu") if self._weight is None else self._weight.device

    def features(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Feature ``[R, T, D]``.

        Raises:
            RuntimeError: the module's forward never runs the feature layer.
            ValueError: the layer's output is not ``[R, T, D]``.
        """
        handle = self._layer.register_forward_hook(StopHere())
        try:
            self._call(self.module, x.to(self.dtype), self._timestep(t), self._condition(y))
        except Reached as reached:
            feature = reached.feature
        else:
            fail("HookTarget", "feature_layer", "run by the module's forward", repr(self.feature_layer), RuntimeError)
        finally:
            handle.remove()
        expected = [len(x), *self.feature_shape]
        if not isinstance(feature, Tensor) or list(feature.shape) != expected:
            fail("HookTarget", f"the output of {self.feature_layer!r}", f"a tensor {expected}", describe(feature))
        return feature

    def head(self, h: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Network output ``[R, C or 2C, ...]``."""
        return self._head(h.to(self.dtype), self._timestep(t), self._condition(y))


def _shape(name: str, shape: object, length: int | None = None) -> tuple[int, ...]:
    """A tuple of positive ints, of a given length or of one at least."""
    if not isinstance(shape, tuple | list) or not shape or len(shape) != (length or len(shape)):
        fail("HookTarget", name, f"{length or 'some'} positive ints", describe(shape))
    return tuple(check_int("HookTarget", name, size, 1) for size in shape)
