"""The public ops on states of any shape: bit for bit what they give for images of the same elements."""

from __future__ import annotations

import pytest
import torch
from coupling_calls import ON_CPU, call
from packing_inputs import make_commit, make_pack
from test_coupling_philox import arguments

from free_kernels.ops import (
    commit_drafts,
    couple,
    couple_block,
    couple_block_philox,
    couple_philox,
    gaussian_transition,
    pack_drafts,
)
from free_kernels.ops.coupling.dispatch import draw_noise
from free_kernels.ops.shapes import as_images, image_shape

# Of twelve elements in two channels.
SHAPES = [(2, 6), (2, 3, 1, 2), (2, 1, 3, 2, 1)]
STATES = {"draft_states": 2, "draft_mean": 2, "draft_std": 2, "noise": 2, "slack_noise": 2, "output": 1}


@pytest.mark.parametrize(
    ("shape", "image"), [((5,), (5, 1, 1)), ((5, 2), (5, 1, 2)), ((5, 2, 3), (5, 2, 3)), ((5, 2, 3, 4), (5, 6, 4))]
)
def test_the_shape_that_states_are_held_in(shape, image):
    assert image_shape(shape) == image
    held = as_images(torch.zeros(7, *shape), 1)
    assert held.shape == (7, *image)
    assert as_images(held, 1) is held


def shaped(given: dict, shape: tuple[int, ...], leading: dict[str, int]) -> dict:
    """Tensors of images with states of another shape; outputs keep their number of channels."""
    changed = {}
    for name, count in leading.items():
        if given.get(name) is not None:
            tensor = given[name]
            changed[name] = tensor.reshape(*tensor.shape[:count], tensor.shape[count], *shape[1:])
    return given | changed


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("op", [couple, couple_block, couple_philox, couple_block_philox])
def test_coupling(op, learned, shape, backend):
    keyed = arguments(learned, True)
    given = keyed if op in (couple_philox, couple_block_philox) else draw_noise(keyed)
    elements = given.draft_states[0, 0].numel()
    shape = (given.draft_states.shape[2], elements // given.draft_states.shape[2], *[1] * (len(shape) - 2))
    wanted = call(op, given, backend=backend)
    found = call(op, type(given)(**shaped(given._asdict(), shape, STATES)), backend=backend)
    assert found.next_states.shape == (len(given.draft_states), *shape)
    assert torch.equal(found.next_states.flatten(1), wanted.next_states.flatten(1))
    assert torch.equal(found.committed, wanted.committed)
    assert torch.equal(found.gap_sq, wanted.gap_sq)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("learned", [False, True])
def test_transition(shape, learned):
    generator = torch.Generator().manual_seed(0)
    state = torch.randn(3, 2, 6, 1, generator=generator)
    output = torch.randn(6, 4 if learned else 2, 6, 1, generator=generator)
    columns = torch.rand(3, 8, generator=generator)
    settings = {"guidance_scale": 1.5, "guidance_channels": 1}
    wanted = gaussian_transition(state, output, columns, **settings)
    found = gaussian_transition(state.view(3, *shape), output.view(6, -1, *shape[1:]), columns, **settings)
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == (3, *shape)
        assert torch.equal(one.flatten(1), other.expand_as(state).flatten(1))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", ON_CPU)
def test_packing(shape, backend):
    given = make_pack(3, 4, 5, (2, 6, 1), 2)
    wanted = pack_drafts(**given, backend=backend)
    found = pack_drafts(**given | {"states": given["states"].view(4, 5, *shape)}, backend=backend)
    assert found[0].shape[1:] == shape
    assert torch.equal(found[0].flatten(1), wanted[0].flatten(1))
    assert all(torch.equal(one, other) for one, other in zip(found[1:], wanted[1:], strict=True))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", ON_CPU)
def test_committing(shape, backend):
    given, other = (make_commit(5, 6, 4, latent, 2) for latent in ((2, 6, 1), shape))
    commit_drafts(**given, backend=backend)
    commit_drafts(**other, backend=backend)
    for name, value in given.items():
        assert name == "num_steps" or torch.equal(value.flatten(), other[name].flatten()), name


def test_what_an_op_writes_to_is_never_a_copy():
    given = make_commit(5, 6, 4, (2, 6), 1)
    given["state"] = given["state"].mT.contiguous().mT
    with pytest.raises(ValueError, match="^commit_drafts: state must be"):
        commit_drafts(**given)
