"""A target's blocks on what their parts gave within the module's own call: compared without another pass through them.

Nearly all of a network's arithmetic is in the attention and the MLP of its blocks. The call that a target is compared
with computes them anyway, so what goes into every one of them and what comes out is recorded there. The target's blocks
then run with the recorded outputs in the place of these parts: embedding, modulations, norms, sums and head are the
target's own, and what it would hand to each part is compared with what the module did. That a part gives a row the same
outside of the call's batch is seen on one part of every kind.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import BuiltinFunctionType, FunctionType
from typing import Any, NamedTuple

from torch import Tensor, nn

# What every module has of its own accord.
_OF_ANY_MODULE = frozenset(vars(nn.Module()))
_PLAIN_VALUES = (bool, int, float, str, type(None))


class Passed(NamedTuple):
    """What went into a part and what came out, of one row, ``[1, T, D]`` each."""

    given: Tensor
    made: Tensor


class Recording:
    """Calls of parts within a call of the network; unusable where a part was called otherwise than the target does.

    It holds ``4 depth T D`` numbers: 63 MiB for the shapes of DiT-XL/2 at 256 x 256 in bfloat16.

    Args:
        parts: attention and MLP of every block.
        rows: of the network's call.
    """

    def __init__(self, parts: Sequence[nn.Module], rows: int) -> None:
        self.parts, self._rows = parts, rows
        self.calls: list[list[Passed | None]] = [[] for _ in parts]

    def take(self, index: int, given: tuple[Any, ...], keywords: dict[str, Any], made: object) -> None:
        """Note one call."""
        plain = len(given) == 1 and isinstance(given[0], Tensor) and isinstance(made, Tensor)
        # A keyword of nothing, as diffusers hands on, changes nothing.
        usable = plain and given[0].shape == made.shape and not any(value is not None for value in keywords.values())
        usable = usable and len(made) == self._rows
        # Copies, so that the other rows are not held.
        self.calls[index].append(Passed(given[0][-1:].clone(), made[-1:].clone()) if usable else None)

    @property
    def last_row(self) -> list[Passed] | None:
        """What each part was given and made of the last row; None unless each was called once, as the target does."""
        once = [calls[0] if len(calls) == 1 else None for calls in self.calls]
        return None if any(passed is None for passed in once) else once


@contextmanager
def recording(parts: Sequence[nn.Module], rows: int) -> Iterator[Recording]:
    """Record the calls of parts of a network on so many rows as long as this lasts."""
    record = Recording(parts, rows)

    def hook(index: int) -> Any:
        return lambda _, given, keywords, made: record.take(index, given, keywords, made)

    handles = [part.register_forward_hook(hook(i), with_kwargs=True) for i, part in enumerate(parts)]
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()


class Replayed:
    """In the place of a part: gives what was recorded, and keeps what it was given."""

    def __init__(self, passed: Passed) -> None:
        self.passed = passed
        self.given: list[Tensor] = []

    def __call__(self, h: Tensor) -> Tensor:
        """What the part made of the row."""
        self.given.append(h)
        return self.passed.made


def kind_of_part(part: nn.Module) -> tuple[Any, ...]:
    """Equal for parts that run the same code: classes, settings and shapes, whatever the weights."""
    return tuple(
        (
            name,
            type(module),
            tuple(sorted((key, _said(value)) for key, value in vars(module).items() if key not in _OF_ANY_MODULE)),
            tuple((key, tuple(weight.shape)) for key, weight in module.named_parameters(recurse=False)),
            tuple((key, tuple(weight.shape)) for key, weight in module.named_buffers(recurse=False)),
        )
        for name, module in part.named_modules()
    )


def _said(value: object) -> str:
    """A setting in words; one that may hold anything is like no other."""
    if isinstance(value, _PLAIN_VALUES):
        return repr(value)
    if isinstance(value, tuple) and all(isinstance(one, _PLAIN_VALUES) for one in value):
        return repr(value)
    held = getattr(value, "__dict__", None)
    code = isinstance(value, FunctionType | BuiltinFunctionType | type)
    if held is None or code or isinstance(value, Tensor):
        return f"{type(value).__qualname__} {id(value)}"
    inner = sorted((key, repr(one) if isinstance(one, _PLAIN_VALUES) else id(one)) for key, one in held.items())
    return f"{type(value).__module__} {type(value).__qualname__} {inner}"


def one_of_each_kind(parts: Sequence[nn.Module]) -> list[int]:
    """The first part of every kind."""
    first: dict[tuple[Any, ...], int] = {}
    for index, part in enumerate(parts):
        first.setdefault(kind_of_part(part), index)
    return list(first.values())
