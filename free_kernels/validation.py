"""Checks of user arguments. Every message reads ``function: argument must be X, got Y``."""

from __future__ import annotations

import math
import numbers
import os
from pathlib import Path
from typing import NoReturn

import torch


def describe(value: object) -> str:
    """One short phrase for a value in an error message."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def fail(where: str, argument: str, expectation: str, value: object, error: type[Exception] = ValueError) -> NoReturn:
    """Raise ``error`` with the library's message format."""
    shown = value if isinstance(value, str) else describe(value)
    raise error(f"{where}: {argument} must be {expectation}, got {shown}")


def check_int(where: str, argument: str, value: object, low: int, high: int | None = None) -> int:
    """An int (bools refused) in ``[low, high]``; one that is still a symbol is bounded by a check of its graph."""
    if isinstance(value, torch.SymInt):
        torch._check(value >= low)
        torch._check(high is None or value <= high)
        return value  # type: ignore[return-value]
    expectation = f"an int in [{low}, {'inf)' if high is None else f'{high}]'}"
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        fail(where, argument, expectation, describe(value), TypeError)
    if value < low or (high is not None and value > high):
        fail(where, argument, expectation, value)
    return int(value)


def check_float(where: str, argument: str, value: object, low: float, high: float = math.inf) -> float:
    """A finite real number in ``[low, high]``."""
    expectation = f"a finite number in [{low:g}, {'inf)' if math.isinf(high) else f'{high:g}]'}"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        fail(where, argument, expectation, describe(value), TypeError)
    if not math.isfinite(value) or not low <= value <= high:
        fail(where, argument, expectation, value)
    return float(value)


def check_sizes(where: str, argument: str, value: object, names: str = "") -> tuple[int, ...]:
    """Sizes of dimensions: ints of at least 1, as many as ``names`` has, such as ``"(T, D)"``; one or more without."""
    expectation = "ints of at least 1, " + (names or "one or more")
    if not isinstance(value, tuple | list) or not all(isinstance(size, numbers.Integral) for size in value):
        fail(where, argument, expectation, repr(value), TypeError)
    if not value or min(value) < 1 or (names and len(value) != names.count(",") + 1):
        fail(where, argument, expectation, repr(value))
    return tuple(map(int, value))


def check_choice(where: str, argument: str, value: object, choices: tuple[str, ...]) -> str:
    """One of a few strings."""
    if not isinstance(value, str) or value not in choices:
        fail(where, argument, "one of " + ", ".join(map(repr, choices)), describe(value))
    return value


def check_labels(where: str, labels: object, num_classes: int) -> torch.Tensor:
    """Class labels: int64 ``[N]``, ``N >= 1``, each in ``[0, num_classes)``."""
    expectation = f"int64 [N] in [0, {num_classes})"
    if not isinstance(labels, torch.Tensor):
        fail(where, "class_labels", expectation, type(labels).__name__, TypeError)
    if labels.dtype != torch.int64:
        fail(where, "class_labels", expectation, labels, TypeError)
    if labels.ndim != 1 or labels.numel() == 0:
        fail(where, "class_labels", expectation + " with N >= 1", labels)
    if labels.is_meta:
        fail(where, "class_labels", expectation, "labels on the meta device, which have no values")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        fail(where, "class_labels", expectation, f"values in [{low}, {high}]")
    return labels


def check_writable(where: str, argument: str, path: str | os.PathLike[str]) -> Path:
    """A file path that can be written: its parent exists (or can be made) and accepts files."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(where, argument, "a writable file path", f"{path} ({error.strerror})", type(error))
    if path.is_dir():
        fail(where, argument, "a writable file path", f"{path} (a directory)", IsADirectoryError)
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        fail(where, argument, "a writable file path", f"{path} (permission denied)", PermissionError)
    return path
