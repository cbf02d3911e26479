"""A learned drafter that its owner compiled, or wrapped, stays so in the samplers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.optim.swa_utils import AveragedModel

from free_dit import load_bundled
from free_kernels import DDPMSchedule, sample


class Backend:
    """A backend of ``torch.compile`` that runs graphs as they are and counts them."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, module, inputs):
        self.graphs += 1
        return module.forward


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def draw(target, drafter):
    return sample(target, torch.arange(2), schedule=DDPMSchedule(12), drafter=drafter, draft_length=4, seed=1).samples


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_compiled_drafter_stays_compiled(wrapped):
    target, drafter = load_bundled("digits")
    plain, backend = draw(target, drafter), Backend()
    if wrapped:
        compiled = torch.compile(drafter, backend=backend)
    else:
        compiled = copy.copy(drafter)
        compiled.compile(backend=backend)
    # Graphs that are run as they were written round as the code that they were read from.
    assert torch.equal(draw(target, compiled), plain)
    graphs = backend.graphs
    assert graphs > 0
    # A further run finds what the first one compiled, though each hoists a copy of its own.
    assert torch.equal(draw(target, compiled), plain)
    assert backend.graphs == graphs
    assert torch.equal(draw(target, drafter), plain)
    assert backend.graphs == graphs


def test_an_averaged_drafter_is_seen_through():
    target, drafter = load_bundled("digits")
    assert torch.equal(draw(target, AveragedModel(drafter)), draw(target, drafter))


def test_a_share_that_is_set_later_counts():
    target, drafter = load_bundled("digits")
    compiled = torch.compile(drafter, backend=Backend())
    for share in (0.0, 1.0):
        drafter.frozen_share = share
        assert torch.equal(draw(target, compiled), draw(target, drafter))
    assert torch.equal(draw(target, compiled), draw(target, "frozen"))
