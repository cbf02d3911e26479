"""Drafters whose blocks are dense layers over all tokens: arithmetic, training and files."""

from __future__ import annotations

import pytest
import torch

from free_kernels import DrafterConfig, FeatureDrafter
from free_kernels.drafters.dense import DENSE_BLOCK_ROWS, DENSE_LAST_ROWS
from free_kernels.ops.network import api

CONFIG = DrafterConfig(width=8, depth=2, head_dim=8, mlp_ratio=0.5, mixing="dense", num_timesteps=100)


def dense_drafter(config: DrafterConfig = CONFIG, trained: bool = True) -> FeatureDrafter:
    torch.manual_seed(0)
    drafter = FeatureDrafter((16, 2), (16, 12), 0, config, condition_width=5).eval()
    if trained:
        for parameter in drafter.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return drafter.conditioned(torch.randn(4, 5))


def inputs(rows: int = 6):
    torch.manual_seed(1)
    feature, x = torch.randn(rows, 16, 12), torch.randn(2, rows, 16, 2)
    return feature, x[0], x[1], torch.randint(100, (rows,)), torch.randint(4, (rows,))


def plainly(drafter: FeatureDrafter, feature, previous, state, t, y):
    """The same from the layers themselves, row by row and in float64."""
    change = state - previous
    unit = change / change.flatten(1).square().mean(1).sqrt().view(-1, 1, 1)
    scaled = change / drafter.change_rms[t].view(-1, 1, 1)
    rows = drafter._modulations(t, y).double()
    drafter = drafter.double()
    normal = (feature.double() - drafter.feature_mean) / drafter.feature_std
    x = drafter.from_feature(normal) + drafter.positions
    x = x + drafter.from_patches(torch.cat([state, unit, scaled], dim=-1).double())
    for index, block in enumerate(drafter.blocks):
        shift, scale, gate = rows[:, DENSE_BLOCK_ROWS * index : DENSE_BLOCK_ROWS * (index + 1)].unbind(1)
        hidden = torch.nn.functional.gelu(block.fc1((x * scale + shift).flatten(1)))
        x = x + gate * block.fc2(hidden).view_as(x)
    shift, scale = rows[:, -DENSE_LAST_ROWS:].unbind(1)
    return feature + drafter.change_std * drafter.to_feature(x * scale + shift)


@torch.no_grad()
def test_arithmetic():
    drafter, given = dense_drafter(), inputs()
    drafter.set_feature_scale(torch.randn(50, 12) * 3 + 1, torch.randn(50, 12))
    found = drafter(*given)
    hoisted = drafter.hoisted(torch.arange(100), torch.arange(4))(*given)
    torch.testing.assert_close(found, plainly(dense_copy(drafter), *given).float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(hoisted, found, rtol=1e-5, atol=1e-5)
    # Rows do not see one another, tokens do.
    alone = drafter(*(part[2:3] for part in given))
    torch.testing.assert_close(alone[0], found[2], rtol=1e-4, atol=1e-5)
    moved = [part.clone() for part in given]
    moved[0][2, 5] += 1
    after = drafter(*moved)
    assert (after[2, 9] - found[2, 9]).abs().max() > 1e-3
    assert torch.equal(after[1], found[1])


def dense_copy(drafter: FeatureDrafter) -> FeatureDrafter:
    import copy

    return copy.deepcopy(drafter)


def test_untrained_it_is_the_frozen_drafter():
    given = inputs()
    assert torch.equal(dense_drafter(trained=False)(*given), given[0])


def test_every_weight_learns():
    drafter, given = dense_drafter(), inputs()
    parent = torch.cat([drafter.initial_feature(given[1][:1]), given[0][1:]])
    drafter.requires_grad_(True)(parent, *given[1:]).square().mean().backward()
    assert all(bool(p.grad.abs().max() > 0) for name, p in drafter.named_parameters() if name != "first_bias")


def test_fewer_operations_than_attention(monkeypatch):
    """What it is for: fewer operations on data, whose time is what a small drafter costs, where these are PyTorch's."""
    monkeypatch.setattr(api, "MOST_TOKENS", 0)
    counts = {}
    for mixing in ("attention", "dense"):
        config = DrafterConfig(width=8, head_dim=8, mixing=mixing, num_timesteps=100)
        drafter = dense_drafter(config)
        given = inputs(1)
        tokens = drafter._tokens(*given[:4])
        modulations = drafter._modulations(*given[3:])
        with torch.no_grad(), torch.profiler.profile() as profile:
            drafter._fold()
        folding = _operations(profile)
        with torch.no_grad(), torch.profiler.profile() as profile:
            drafter._fold()(given[0], tokens, modulations)
        counts[mixing] = _operations(profile) - folding
    # Entering and leaving are 2 operations each; shift and scale, MLP and gate in between, and one before it leaves.
    assert counts["dense"] == 4 + 5 + 1
    assert counts["dense"] < counts["attention"]


def _operations(profile) -> int:
    views = ("view", "view_as", "t", "transpose", "unbind", "select", "as_strided", "flatten", "reshape", "detach")
    names = [event.name for event in profile.events() if event.cpu_parent is None]
    return sum(name.removeprefix("aten::") not in views for name in names if "::" in name)


def test_files(tmp_path):
    path, drafter, given = tmp_path / "drafter.safetensors", dense_drafter(), inputs()
    drafter.save(path)
    read = FeatureDrafter.load(path)
    assert read.config == CONFIG
    with torch.no_grad():
        assert torch.equal(read.conditioned(drafter._pooled)(*given), drafter(*given))


def test_errors():
    with pytest.raises(ValueError, match="^FeatureDrafter: mixing must be one of 'attention', 'dense', got 'sparse'"):
        FeatureDrafter((16, 2), (16, 12), 3, DrafterConfig(width=8, head_dim=8, mixing="sparse"))
    with pytest.raises(ValueError, match="^FeatureDrafter: window must be"):
        FeatureDrafter((16, 2), (16, 12), 3, DrafterConfig(width=8, head_dim=8, mixing="dense", window=2))
