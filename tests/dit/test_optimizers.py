"""Muon beside AdamW: which parameters each takes, and states that survive a checkpoint."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from free_dit.training.optimizers import (
    MUON_RATE,
    Together,
    hidden_matrices,
    kept_shapes,
    make_optimizer,
    orthogonalised,
)
from free_kernels import FeatureDrafter
from free_kernels.drafters import DrafterConfig


@pytest.fixture
def drafter() -> FeatureDrafter:
    torch.manual_seed(0)
    return FeatureDrafter((1, 8, 8), (16, 24), 3, DrafterConfig(width=32, depth=2))


def _train(drafter, optimizer, steps, begin=0):
    for step in range(begin, begin + steps):
        torch.manual_seed(step)
        feature, x = torch.randn(5, 16, 24), torch.randn(2, 5, 1, 8, 8)
        t, y = torch.randint(1000, (5,)), torch.randint(3, (5,))
        # One row has no parent, so that every weight is used.
        parent = torch.cat([drafter.initial_feature(x[0, :1]), feature[1:]])
        loss = (drafter(parent, x[0], x[1], t, y) - feature.roll(1, 1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def test_muon_takes_the_inner_matrices_only(drafter):
    hidden = hidden_matrices(drafter)
    names = {name for name, value in drafter.named_parameters() if value in hidden}
    inner = {f"blocks.{i}.{part}.weight" for i in (0, 1) for part in ("qkv", "proj", "fc1", "fc2")}
    assert names == inner | {"timestep_mlp.0.weight", "timestep_mlp.2.weight", "modulation.weight"}
    optimizer = make_optimizer("muon", drafter, 1e-3, 0.0)
    taken = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(taken) == len(set(taken)) == len(list(drafter.parameters()))
    assert [group.get("rate", 1.0) for group in optimizer.param_groups] == [1.0, MUON_RATE]


def test_both_learn_and_resume_bit_for_bit(drafter):
    for name in ("adamw", "muon", "muon_float32"):
        whole, parts = copy.deepcopy(drafter), copy.deepcopy(drafter)
        first = _train(whole, make_optimizer(name, whole, 2e-3, 0.0), 1)
        whole = copy.deepcopy(drafter)
        assert _train(whole, make_optimizer(name, whole, 2e-3, 0.0), 12) < 0.9 * first
        optimizer = make_optimizer(name, parts, 2e-3, 0.0)
        _train(parts, optimizer, 5)
        kept = copy.deepcopy(optimizer.state_dict()["state"])
        for number, (parameter, shapes) in enumerate(kept_shapes(optimizer)):
            assert {key: value.shape for key, value in kept[number].items()} == shapes
            assert any(parameter is one for one in parts.parameters())
        again = make_optimizer(name, parts, 2e-3, 0.0)
        again.load_state_dict({**again.state_dict(), "state": kept})
        _train(parts, again, 7, begin=5)
        for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
            assert torch.equal(a, b), name


def test_muon_in_float32_orthogonalises():
    """Its five steps leave singular values between 0.68 and 1.13 (Jordan et al. 2024) of matrices that are not flat."""
    torch.manual_seed(0)
    for rows, columns in ((24, 8), (8, 24), (16, 40)):
        values = torch.linalg.svdvals(orthogonalised(torch.randn(3, rows, columns)))
        assert values.min() > 0.3
        assert values.max() < 1.3
        # Negative control: the matrices themselves are not.
        assert torch.linalg.svdvals(torch.randn(3, rows, columns)).max() > 1.3


def test_both_precisions_of_muon_take_the_same_steps(drafter):
    """Two steps along full gradients, which are well conditioned.

    At singular values near 1 the three terms of a step, 3.44, -4.78 and 2.03, leave 0.70: their three roundings, of
    which each is 2^-8 / sqrt(12), grow by sqrt(3.44^2 + 4.78^2 + 2.03^2) / 0.70 = 8.9. The next step multiplies an
    error by -0.71, so that all of them come to 8.9 sqrt(3 / 12 / (1 - 0.71^2)) spacings, 6.3.
    """
    ends = []
    for name in ("muon", "muon_float32", "adamw"):
        trained = copy.deepcopy(drafter)
        optimizer = make_optimizer(name, trained, 1e-4, 0.01)
        for step in range(2):
            torch.manual_seed(step)
            for parameter in trained.parameters():
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
        ends.append(trained.modulation.weight - drafter.modulation.weight)
    assert (ends[1] - ends[0]).norm() / ends[0].norm() < 6.3 * 2**-8
    # Negative control: another optimizer takes other steps.
    assert (ends[2] - ends[0]).norm() / ends[0].norm() > 0.5


def test_a_lost_state_is_noticed(drafter):
    """Negative control: going on without the states ends elsewhere."""
    whole, parts = copy.deepcopy(drafter), copy.deepcopy(drafter)
    _train(whole, make_optimizer("muon", whole, 2e-3, 0.0), 12)
    _train(parts, make_optimizer("muon", parts, 2e-3, 0.0), 5)
    _train(parts, make_optimizer("muon", parts, 2e-3, 0.0), 7, begin=5)
    assert not all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))


def test_errors():
    with pytest.raises(ValueError, match="^train: optimizer must be one of"):
        make_optimizer("sgd", nn.Linear(2, 2), 1e-3, 0.0)
    with pytest.raises(ValueError, match="^train: optimizer must be 'adamw' for a Linear, got 'muon'"):
        make_optimizer("muon", nn.Linear(2, 2), 1e-3, 0.0)
    assert isinstance(make_optimizer("adamw", nn.Linear(2, 2), 1e-3, 0.0), torch.optim.AdamW)
    assert not isinstance(make_optimizer("adamw", nn.Linear(2, 2), 1e-3, 0.0), Together)
