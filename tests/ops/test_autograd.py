"""Public ops where autograd watches: real gradients, or none, never wrong ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from coupling_calls import ON_CPU, needs_extension
from public_ops import committed, numbers, packed, round_of

from free_kernels import ops


@pytest.mark.parametrize("op", [ops.couple, ops.couple_block])
def test_gradients_of_a_coupling_are_the_references(op):
    gradients = []
    for backend in ("auto", "reference"):
        given, names = round_of(3, 2, 3.0, False)
        for part in given[:4]:
            part.requires_grad_()
        op(*given, **names, backend=backend).next_states.sum().backward()
        gradients.append([part.grad for part in given[:4]])
    assert gradients[0][0].any()
    torch.testing.assert_close(*gradients)


def test_gradients_of_packed_states_are_the_references():
    _, names = packed(3)
    states = names["states"].requires_grad_()
    ops.pack_drafts(**names)[0].sum().backward()
    used = torch.arange(states.shape[1]) < names["lengths"].unsqueeze(1)
    assert torch.equal(states.grad, used.view(*used.shape, 1, 1, 1).expand_as(states).float())


@needs_extension
def test_an_op_without_a_gradient_is_not_taken_by_name():
    given, names = round_of(3, 2, 3.0, False)
    given[0].requires_grad_()
    with pytest.raises(RuntimeError, match="^couple: backend 'extension' cannot be used: it has no gradient"):
        ops.couple(*given, **names, backend="extension")
    with torch.no_grad():
        assert not ops.couple(*given, **names, backend="extension").next_states.requires_grad
    _, names = packed(3)
    names["states"].requires_grad_()
    with pytest.raises(RuntimeError, match="^pack_drafts: backend 'extension' cannot be used: it has no gradient"):
        ops.pack_drafts(**names, backend="extension")


@pytest.mark.parametrize("backend", ON_CPU)
def test_what_is_saved_of_a_slot_is_not_used_after_a_commit(backend):
    _, names = committed(3)
    weight = torch.ones_like(names["state"], requires_grad=True)
    product = (weight * names["state"]).sum()
    with torch.no_grad():
        ops.commit_drafts(**names, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.parametrize("backend", ["auto", *ON_CPU])
def test_a_commit_keeps_no_graph(backend):
    """Else every round would hold those before."""
    _, names = committed(3)
    names["features"].requires_grad_()
    ops.commit_drafts(**names, backend=backend)
    assert names["parent"].grad_fn is None


def test_an_unknown_backend_is_named_all_the_same():
    _, names = packed(3)
    names["states"].requires_grad_()
    with pytest.raises(ValueError, match="^pack_drafts: backend must be one of"):
        ops.pack_drafts(**names, backend="foo")


def test_channels_say_nothing_without_guidance():
    state, columns = torch.zeros(2, 1, 4, 4), torch.zeros(1, 8)
    ops.gaussian_transition(state, state, columns, guidance_channels=3)
    with pytest.raises(ValueError, match="guidance_channels must be an int in"):
        ops.gaussian_transition(state, torch.zeros(4, 1, 4, 4), columns, guidance_channels=3, guidance_scale=2.0)


def test_integers_that_are_written_have_memory_of_their_own():
    _, names = committed(3)
    for written in ("steps", "images", "labels"):
        with pytest.raises(ValueError, match="commit_drafts: .* must not share memory"):
            ops.commit_drafts(**names | {written: names["committed"]}, backend="auto")


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("kind", [np.int64, np.uint64, np.int32])
def test_integers_of_numpy(backend, kind):
    (seed, *keys), _ = numbers(3)
    wanted = ops.philox_normal(77, *keys, backend=backend)
    assert torch.equal(ops.philox_normal(kind(77), *keys, backend=backend), wanted)
    if kind is np.uint64:
        whole = ops.philox_normal(seed, *keys, backend=backend)
        assert torch.equal(ops.philox_normal(kind(seed), *keys, backend=backend), whole)
    given, names = round_of(3, 1, 1.0, True)
    given[3] = kind(77)
    ops.couple_philox(*given, **names, backend=backend)
    _, names = packed(3)
    ops.pack_drafts(**names | {"num_rows": kind(names["num_rows"])}, backend=backend)


class Numbers(torch.nn.Module):
    def forward(self, x, keys):
        return ops.philox_normal(7, keys, keys, 1, x.shape[1])


def test_a_symbolic_size_is_exported():
    x, keys = torch.zeros(3, 9), torch.arange(3)
    shapes = ({1: torch.export.Dim.AUTO}, None)
    for strict in (True, False):
        program = torch.export.export(Numbers(), (x, keys), dynamic_shapes=shapes, strict=strict).module()
        for width in (9, 4, 30):
            wider = torch.zeros(3, width)
            assert torch.equal(program(wider, keys), Numbers()(wider, keys))


def test_one_graph_serves_all_seeds():
    torch._dynamo.reset()
    graphs = 0

    def counted(graph, _):
        nonlocal graphs
        graphs += 1
        return graph

    compiled = torch.compile(ops.philox_normal, fullgraph=True, backend=counted)
    _, *keys = numbers(3)[0]
    for seed in (5, 6, 2**40, 11, 13, 17, 19, 23, 29, 31, 37):
        assert torch.equal(compiled(seed, *keys), ops.philox_normal(seed, *keys))
    assert graphs <= 3
