"""Calls of the public coupling ops with one named tuple of arguments."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from free_kernels import extension
from free_kernels.ops import Coupling, couple_block, couple_block_philox
from free_kernels.ops.coupling.arguments import CouplingArguments, KeyedCouplingArguments

needs_extension = pytest.mark.skipif(
    not extension.has_extension(), reason=f"no compiled extension: {extension.why_no_extension()}"
)
# What runs on CPU tensors, without Triton's interpreter.
ON_CPU = ["reference", pytest.param("extension", marks=needs_extension)]

# The last fields of a round without relaxation, guidance and clipping, whose states have one channel.
PLAIN = {"relaxation": None, "guidance_scale": 1.0, "guidance_channels": 1, "clip": math.inf}


def call(
    op: Callable[..., Coupling], arguments: CouplingArguments | KeyedCouplingArguments, **changes: Any
) -> Coupling:
    """``op`` with these arguments and changes of them; block verification knows no relaxation."""
    given = arguments._asdict()
    if op in (couple_block, couple_block_philox):
        del given["relaxation"]
    return op(**given | changes)
