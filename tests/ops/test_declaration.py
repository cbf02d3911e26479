"""Ops and the named tuples of their arguments agree, whether a schema is made in Python or in C++."""

from __future__ import annotations

import re
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from free_kernels import extension
from free_kernels.ops.attention import api as attention
from free_kernels.ops.coupling import dispatch
from free_kernels.ops.declaration import Op, schema_of
from free_kernels.ops.drafting import api as drafting
from free_kernels.ops.fields import Written
from free_kernels.ops.final_layer import api as final_layer
from free_kernels.ops.network import api as network
from free_kernels.ops.norms import api as norms
from free_kernels.ops.packing import api as packing
from free_kernels.ops.random import api as random
from free_kernels.ops.rounds import api as rounds
from free_kernels.ops.tables import api as tables
from free_kernels.ops.tokens import api as tokens

OPS = [
    *dispatch.OPS.values(),
    *dispatch.COMPILED.values(),
    attention.OP,
    packing.PACK,
    packing.COMMIT,
    random.UNIFORM,
    random.NORMAL,
    random.FILL,
    random.ROUND,
    network.OP,
    final_layer.OP,
    *rounds.OPS,
    *(op for both in (*drafting.OPS, norms.OP, tables.OP, tokens.OP) for op in (both.triton, both.compiled)),
]


def fields_of(op: Op) -> list[tuple[str, str]]:
    """Names and types of a registered op's arguments."""
    schema = getattr(torch.ops.free_kernels, op.name).default._schema
    # As a string the type of a SymInt is "int".
    kinds = (
        (argument.name, "SymInt" if argument.real_type.kind() == "SymIntType" else str(argument.type))
        for argument in schema.arguments
    )
    return [
        (name, re.sub(r"Optional\[(.*)\]", r"\1", kind.replace("List[Tensor]", "Tensor[]"))) for name, kind in kinds
    ]


def declared(arguments: type) -> list[tuple[str, str]]:
    """The same of a named tuple."""
    return [
        (name, re.sub(r"\(\w!\)", "", kind.rstrip("?")))
        for kind, name in (field.split(" ") for field in schema_of(arguments)[1:-1].split(", "))
    ]


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_a_schema_has_the_fields_of_its_arguments(op):
    if not op.folder and not extension.has_extension():
        pytest.skip(f"no compiled extension: {extension.why_no_extension()}")
    assert fields_of(op) == declared(op.arguments)
    assert op.overload is getattr(torch.ops.free_kernels, op.name).default


def test_every_op_is_declared():
    extension.has_extension()
    names = {
        name.split("::")[1].partition(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("free_kernels::")
    }
    assert names <= {op.name for op in OPS}


def test_a_schema_from_fields():
    class Arguments(NamedTuple):
        x: Tensor
        y: Tensor | None
        state: Written
        count: int
        memory: Written | None
        limit: float | None = None
        fast: bool = False

    # The annotations name what the test has imported.
    Arguments.__annotations__ = {
        "x": Tensor,
        "y": Tensor | None,
        "state": Written,
        "count": int,
        "memory": Written | None,
        "limit": float | None,
        "fast": bool,
    }
    assert (
        schema_of(Arguments)
        == "(Tensor x, Tensor? y, Tensor(a!) state, int count, Tensor(b!)? memory, float? limit, bool fast)"
    )


def test_other_arguments_are_seen():
    """The control of the comparison: the fields of another op."""
    assert fields_of(dispatch.OPS["couple"]) != declared(dispatch.OPS["couple_philox"].arguments)
