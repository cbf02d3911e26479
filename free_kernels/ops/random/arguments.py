"""What the random ops take; ``free_kernels.ops.philox_uniform`` describes each argument."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from free_kernels.ops.fields import Open


class PhiloxArguments(NamedTuple):
    """Arguments of ``philox_uniform`` and ``philox_normal``."""

    seed: Open  # int64 with the 64 bits of the seed
    images: Tensor  # int64 [M]
    steps: Tensor  # int64 [M]
    purpose: int
    numel: Open
    rounds: Tensor | None = None  # int64 [M]; None: round 0


class FillArguments(NamedTuple):
    """Arguments of ``philox_fill``: those of :class:`PhiloxArguments`, and the law of the numbers."""

    seed: Open
    images: Tensor
    steps: Tensor
    purpose: int
    numel: Open
    rounds: Tensor | None
    normal: bool  # standard normals, else uniforms


class RoundArguments(NamedTuple):
    """Arguments of ``philox_round``: S images, L steps of each."""

    seed: Open
    images: Tensor  # int64 [S]
    steps: Tensor  # int64 [S, L]
    numel: Open
    slack: bool  # draw slack noise, too
    rounds: Tensor | None = None  # int64 [S]; None: round 0
