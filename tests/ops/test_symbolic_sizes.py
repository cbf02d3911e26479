"""Every public op in a graph that is compiled once for all numbers of rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from public_ops import CASES, round_of
from torch import Tensor

from free_kernels import ops

# The first is no other tensor's size: a graph takes sizes that are equal at its first call for one. 1 is a constant.
SIZES = (11, 2, 5)


def test_every_public_op_is_here():
    assert {op for op, _ in CASES.values()} == {getattr(ops, name) for name in ops.__all__} - {ops.Coupling}


@pytest.mark.parametrize("dynamic", [True, None], ids=["dynamic", "automatic"])
@pytest.mark.parametrize("name", CASES)
def test_one_graph_serves_all_sizes(name: str, dynamic: bool | None):
    op, make = CASES[name]
    torch._dynamo.reset()
    graphs = 0

    def counted(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return graph

    compiled = torch.compile(op, fullgraph=True, dynamic=dynamic, backend=counted)
    for size in SIZES:
        (mine, my_names), (theirs, their_names) = make(size), make(size)
        got, wanted = compiled(*mine, **my_names), op(*theirs, **their_names)
        # What ops write to counts as well.
        got, wanted = (got, mine, my_names), (wanted, theirs, their_names)
        torch.testing.assert_close(got, wanted, equal_nan=True)
    # The first size is a constant where nothing says that it will change.
    assert graphs <= (1 if dynamic else 2)


def test_autograd_ahead_of_time_takes_symbolic_sizes():
    torch._dynamo.reset()
    compiled = torch.compile(ops.couple, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in SIZES:
        given, names = round_of(size, 2, 3.0, False)
        got, wanted = (op(*given, **names) for op in (compiled, ops.couple))
        torch.testing.assert_close(got, wanted)
