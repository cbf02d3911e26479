"""Checks of tensor arguments against the layouts that the ops document."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

import torch
from torch import Tensor

from free_kernels.validation import describe, fail

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INT64 = (torch.int64,)


class Layouts:
    """Checks tensors of one call, whose sizes have names.

    Args:
        op: name of the op, which begins the messages.
        device: of all tensors; None is any.
        sizes: of dimensions by name. A name without a size may have any.
    """

    def __init__(self, op: str, device: torch.device | None, sizes: Mapping[str, int]) -> None:
        self.op, self.device, self.sizes = op, device, sizes

    def check(
        self, name: str, value: object, dtypes: tuple[torch.dtype, ...], layout: str, contiguous: bool = True
    ) -> None:
        """Check one tensor; ``layout`` names its dimensions, such as ``"[S, C, H, W]"``.

        Raises:
            TypeError: not a tensor, or another dtype than ``dtypes``.
            ValueError: another shape or device, or not contiguous.
        """
        shape = [self.sizes.get(dimension) for dimension in layout[1:-1].split(", ")]
        if (
            not isinstance(value, Tensor)
            or value.dtype not in dtypes
            or value.ndim != len(shape)
            or any(want is not None and want != got for want, got in zip(shape, value.shape, strict=True))
            or (self.device is not None and value.device != self.device)
            or (contiguous and not value.is_contiguous())
        ):
            self._refuse(name, value, dtypes, layout, shape, contiguous)

    def _refuse(
        self, name: str, value: object, dtypes: tuple[torch.dtype, ...], layout: str, shape: list, contiguous: bool
    ) -> NoReturn:
        exact = "" if None in shape else f" = {shape}"
        expectation = f"{' or '.join(str(dtype).removeprefix('torch.') for dtype in dtypes)} {layout}{exact}"
        if not isinstance(value, Tensor):
            fail(self.op, name, expectation, type(value).__name__, TypeError)
        if value.dtype not in dtypes:
            fail(self.op, name, expectation, value, TypeError)
        if self.device is not None and value.device != self.device:
            fail(self.op, name, f"on {self.device} like the other tensors", f"a tensor on {value.device}")
        if not contiguous or value.is_contiguous():
            fail(self.op, name, expectation, value)
        fail(self.op, name, f"{expectation} contiguous", f"{describe(value)} with strides {list(value.stride())}")
