"""Velocity models of both conventions: time from noise or from data, tuples as outputs, and the wrong one refused."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from originals import relative_error
from torch import nn

import free_dit
import free_kernels
from free_kernels import DiTTarget, FlowSDESchedule, SiTTarget

LABELS = torch.arange(4)


class Embedder(nn.Module):
    """REPA's: sinusoids in the time's own dtype, under another name that its first call adds."""

    def __init__(self, mlp):
        super().__init__()
        self.mlp, self.frequency_embedding_size = mlp, 256

    @staticmethod
    def positional_embedding(t, dim, max_period=10000):
        half = dim // 2
        angles = t[:, None].float() * torch.exp(-math.log(max_period) * torch.arange(half) / half)
        return torch.cat([angles.cos(), angles.sin()], dim=-1)

    def forward(self, t):
        self.timestep_embedding = self.positional_embedding
        return self.mlp(self.timestep_embedding(1 - t, self.frequency_embedding_size).to(t.dtype))


class Reversed(nn.Module):
    """A trained SiT as REPA would have it: time 1 at noise, the velocity towards noise, projections beside it."""

    def __init__(self, sit):
        super().__init__()
        for name, part in copy.deepcopy(sit).named_children():
            setattr(self, name, part)
        self.pos_embed = nn.Parameter(sit.pos_embed.clone(), requires_grad=False)
        self.t_embedder = Embedder(self.t_embedder.mlp)
        for parameter in self.final_layer.linear.parameters():
            parameter.requires_grad_(False).neg_()
        self.unpatchify, self.projectors = sit.unpatchify, nn.ModuleList([nn.Linear(4, 4)])
        self.eval().requires_grad_(False)

    def forward(self, x, t, y):
        h, c = self.x_embedder(x) + self.pos_embed, self.t_embedder(t) + self.y_embedder(y, False)
        for block in self.blocks:
            h = block(h, c)
        return self.unpatchify(self.final_layer(h, c))[:, : x.shape[1]], [h]


@pytest.fixture(scope="module")
def sit():
    return free_dit.load_bundled("digits_sit")[0].module


def test_the_other_convention_gives_the_same_images(sit):
    settings = {"schedule": FlowSDESchedule(20), "seed": 1}
    expected = free_kernels.ancestral_sample(SiTTarget(sit), LABELS, **settings).samples
    target = SiTTarget(Reversed(sit), noise_time=1)
    assert target.blocks is not None
    found = free_kernels.ancestral_sample(target, LABELS, **settings).samples
    assert relative_error(found, expected) < 1e-3
    assert free_kernels.check_target(target).path == "hoisted"


def test_the_wrong_convention_is_refused(sit):
    with pytest.raises(ValueError, match="^SiTTarget: noise_time must be 1 for a velocity that runs the other way"):
        SiTTarget(Reversed(sit))
    with pytest.raises(ValueError, match="^SiTTarget: noise_time must be 0 for a velocity that runs the other way"):
        SiTTarget(sit, noise_time=1)
    with pytest.raises(ValueError, match="^SiTTarget: noise_time must be .*or the module is a DiT, which predicts noi"):
        SiTTarget(free_dit.load_bundled("digits")[0].module)
    with pytest.raises(ValueError, match=r"^DiTTarget: module must be a network that predicts noise \(SiTTarget takes"):
        DiTTarget(sit)
    with pytest.raises(ValueError, match="^SiTTarget: noise_time must be an int"):
        SiTTarget(sit, noise_time=2)


def test_narrow_dtypes(sit):
    module = Reversed(sit)
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    t, y = torch.tensor([10, 300, 600, 900]) * SiTTarget(sit).num_train_steps // 1000, LABELS
    exact = SiTTarget(module, noise_time=1)
    expected = exact.head(exact.features(x, t, y), t, y)
    half = SiTTarget(module.to(torch.bfloat16), noise_time=1)
    assert relative_error(half.head(half.features(x, t, y), t, y), expected) < 4e-2
