"""Conditions of any kind: a tensor, or a nested dict of tensors, with one entry for each image."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NoReturn, TypeAlias

import torch
from torch import Tensor

from free_kernels.protocols import Target, TargetDefaults
from free_kernels.validation import check_labels, describe, fail

# A tensor or a dict of such: of all images with ``[N, ...]`` tensors, of one image with ``[...]``.
Condition: TypeAlias = "Tensor | Mapping[str, Condition]"


class Conditions:
    """Conditions of N images, each stored once, and perhaps the null condition of classifier-free guidance.

    A row of a network call names its image's condition by its place: 0 ... N - 1, and N for the null condition. This
    place is what a target finds where class labels would be, so rows of one image share one condition.

    Args:
        values: ``[N, ...]`` tensors: one, or a nested dict of them.
        null: one condition, ``[...]`` or ``[1, ...]`` tensors in the same dicts; None: there is none.
        device: where the tensors go; None: where the first one is.
        where: name of the public function, which begins error messages.

    Raises:
        TypeError: a leaf that is no tensor, or a name that is no string.
        ValueError: no tensors, tensors of different N, or a null condition of another form.
    """

    def __init__(
        self, values: Condition, null: Condition | None = None, device: torch.device | None = None, where: str = ""
    ) -> None:
        where = where or "Conditions"
        leaves = list(_leaves(where, "conditions", values))
        if not leaves:
            fail(where, "conditions", "a tensor [N, ...] or a dict of them", "an empty dict")
        first, count = leaves[0][0], 0
        for name, leaf in leaves:
            if leaf.ndim < 1 or not len(leaf):
                fail(where, name, "[N, ...] with N >= 1", leaf)
            count = count or len(leaf)
            if len(leaf) != count:
                fail(where, name, f"[N, ...] with N = {count} as {first}", leaf)
        self._count = count
        place = leaves[0][1].device if device is None else device
        self.values = _map(values, lambda leaf: leaf.to(place))
        self.null = None if null is None else _null(where, "null_condition", null, self.values)

    def __len__(self) -> int:
        return self._count

    @property
    def leaves(self) -> list[Tensor]:
        """The tensors ``[N, ...]``, in order."""
        return [leaf for _, leaf in _leaves("Conditions", "values", self.values)]

    def map(self, function: Callable[[Tensor], Tensor]) -> Conditions:
        """The same with every tensor ``[M, ...]`` mapped, the null condition's with M = 1."""
        clone = object.__new__(Conditions)
        clone._count, clone.values, clone.null = self._count, _map(self.values, function), None
        if self.null is not None:
            clone.null = _map(self.null, lambda leaf: function(leaf.unsqueeze(0)).squeeze(0))
        return clone

    def or_null(self, where: str, null: Condition | None) -> Conditions:
        """The same with a null condition where there is none yet.

        Raises:
            ValueError, TypeError: it has another form than the conditions.
        """
        if self.null is not None or null is None:
            return self
        clone = self.map(lambda leaf: leaf)
        clone.null = _null(where, "null_condition", null, self.values)
        return clone

    def vectors(self, function: Callable[[Condition], Tensor]) -> Tensor:
        """``function`` of all conditions, ``[N or N + 1, P]``, the null condition last."""
        vectors = function(self.values)
        if self.null is not None:
            vectors = torch.cat([vectors, function(_map(self.null, lambda leaf: leaf.unsqueeze(0)))])
        return vectors

    def cast(self, dtype: torch.dtype) -> Conditions:
        """The same with floating-point tensors of a dtype."""
        return self.map(lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf)

    def at(self, place: int) -> Condition:
        """One condition, ``[...]`` tensors that share the memory of all; ``place`` N is the null condition."""
        return self.null if place == self._count else _map(self.values, lambda leaf: leaf[place])

    def rows(self, places: Tensor) -> Condition:
        """Conditions ``[R, ...]`` of rows ``[R]``.

        A copy for each row; on the CPU, or without a null condition, rows that all have the only one are views of it.
        """
        is_null = None if self.null is None else places == self._count
        if is_null is None or (self._count == 1 and places.is_cpu and not bool(is_null.any())):
            return _map(self.values, lambda leaf: _taken(leaf, places))
        inside = places.clamp(max=self._count - 1)
        return _merge(self.values, self.null, lambda leaf, null: _chosen(is_null, null, _taken(leaf, inside)))


def _taken(leaf: Tensor, places: Tensor) -> Tensor:
    """``leaf[places]``; a view where it has one entry."""
    return leaf.expand(len(places), *leaf.shape[1:]) if len(leaf) == 1 else leaf.index_select(0, places)


def _chosen(is_null: Tensor, null: Tensor, rows: Tensor) -> Tensor:
    return torch.where(is_null.view(-1, *[1] * null.ndim), null, rows)


def bind(
    where: str,
    target: Target,
    conditions: Condition | None,
    class_labels: Tensor | None = None,
    null_condition: Condition | None = None,
) -> tuple[Target, Tensor]:
    """The target and class labels of a sampler's call.

    Class labels go with the target as it is. Conditions go to ``target.conditioned``, and the labels are the places of
    the conditions. A target without it has class labels only, which may be given as conditions.

    Returns:
        The target and int64 ``[N]``.

    Raises:
        ValueError, TypeError: not one of the two, or they do not fit the target; the message names the argument.
    """
    if (conditions is None) == (class_labels is None):
        fail(where, "conditions or class_labels", "given, one of them", "neither" if conditions is None else "both")
    conditioned = TargetDefaults.read(target, "conditioned")
    if class_labels is None and conditioned is not None:
        device = TargetDefaults.read(target, "device")
        known = Conditions(conditions, null_condition, None if device is None else torch.device(device), where)
        bound = conditioned(known)
        return bound, torch.arange(len(known), device=known.leaves[0].device)
    if null_condition is not None:
        fail(where, "null_condition", "None without conditions", describe(null_condition))
    if isinstance(conditions, Mapping):
        fail(where, "conditions", f"class labels, which {type(target).__name__} takes", "a dict", TypeError)
    if conditioned is not None and target.num_classes < 1:
        fail(where, "class_labels", f"None for {type(target).__name__}, which takes conditions", class_labels)
    return target, check_labels(where, conditions if class_labels is None else class_labels, target.num_classes)


def _leaves(where: str, name: str, value: object) -> Iterator[tuple[str, Tensor]]:
    """Tensors with what they are called."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            if not isinstance(key, str):
                fail(where, name, "a dict with strings as names", repr(key), TypeError)
            yield from _leaves(where, f"{name}[{key!r}]", part)
    else:
        fail(where, name, "a tensor [N, ...] or a dict of them", describe(value), TypeError)


def _map(value: Condition, function: Callable[[Tensor], Tensor]) -> Condition:
    if isinstance(value, Tensor):
        return function(value)
    return {key: _map(part, function) for key, part in value.items()}


def _merge(value: Condition, other: Condition, function: Callable[[Tensor, Tensor], Tensor]) -> Condition:
    if isinstance(value, Tensor):
        return function(value, other)
    return {key: _merge(part, other[key], function) for key, part in value.items()}


def _null(where: str, name: str, null: object, values: Condition) -> Condition:
    """A null condition in the form of ``values``, without the dimension of images."""

    def refuse(expectation: str, error: type[Exception] = ValueError) -> NoReturn:
        fail(where, name, expectation, describe(sorted(null) if isinstance(null, Mapping) else null), error)

    if isinstance(values, Tensor):
        shape = values.shape[1:]
        if not isinstance(null, Tensor):
            refuse(f"a tensor {list(shape)}", TypeError)
        if null.shape not in (shape, (1, *shape)) or null.is_floating_point() != values.is_floating_point():
            refuse(f"{str(values.dtype).removeprefix('torch.')} {list(shape)}")
        return null.reshape(shape).to(values)
    if not isinstance(null, Mapping) or null.keys() != values.keys():
        refuse(f"a dict with {', '.join(map(repr, values))}", ValueError if isinstance(null, Mapping) else TypeError)
    return {key: _null(where, f"{name}[{key!r}]", null[key], part) for key, part in values.items()}
