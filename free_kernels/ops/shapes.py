"""States of any shape as ``[C, H, W]``, in which the ops count: guidance and learned variances ask for C only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor


def image_shape(shape: Sequence[int]) -> tuple[int, int, int]:
    """The shape ``[C, H, W]`` for states of a shape: its first dimension, those between, its last."""
    channels, *rest = shape
    return channels, math.prod(rest[:-1]), rest[-1] if rest else 1


def as_images(tensor: Any, leading: int, *, written: bool = False) -> Any:
    """A tensor ``[*leading, *shape]`` as ``[*leading, C, H, W]``.

    One that has this form is returned as it is, and so is what has no shape left or, where the op writes to it, cannot
    be viewed: the op's checks refuse it.
    """
    if not isinstance(tensor, Tensor) or tensor.ndim == leading + 3 or tensor.ndim <= leading:
        return tensor
    if written and not tensor.is_contiguous():
        return tensor
    return tensor.reshape(*tensor.shape[:leading], *image_shape(tensor.shape[leading:]))
