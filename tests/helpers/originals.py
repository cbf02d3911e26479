"""A DiT laid out as the published code lays it out: timm-style parts, float32 sinusoids, guidance inside a forward."""

from __future__ import annotations

import math

import torch
from torch import nn


class PatchEmbed(nn.Module):
    """Patches through a convolution, flattened; a norm that does nothing, as timm's has."""

    def __init__(self, side: int, patch: int, channels: int, width: int) -> None:
        super().__init__()
        self.img_size, self.num_patches, self.flatten = (side, side), (side // patch) ** 2, True
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)
        self.norm = nn.Identity()

    def forward(self, x):
        return self.norm(self.proj(x).flatten(2).transpose(1, 2))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm, self.k_norm = nn.Identity(), nn.Identity()
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        rows, tokens, width = x.shape
        qkv = self.qkv(x).reshape(rows, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = self.q_norm(qkv[0]), self.k_norm(qkv[1]), qkv[2]
        weights = self.attn_drop((q * self.head_dim**-0.5 @ k.transpose(-2, -1)).softmax(-1))
        return self.proj_drop(self.proj((weights @ v).transpose(1, 2).reshape(rows, tokens, width)))


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.act, self.drop1 = nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Dropout(0.0)
        self.fc2, self.drop2 = nn.Linear(4 * width, width), nn.Dropout(0.0)

    def forward(self, x):
        return self.drop2(self.fc2(self.drop1(self.act(self.fc1(x)))))


def shifted(x, shift, scale):
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):
        a, b, gate1, d, e, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attn(shifted(self.norm1(x), a, b))
        return x + gate2.unsqueeze(1) * self.mlp(shifted(self.norm2(x), d, e))


class ExtraBlock(Block):
    """A block that the original does not have: its own forward is the only right way to run it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads)
        self.extra = nn.Linear(width, width)

    def forward(self, x, c):
        return super().forward(x, c) + self.extra(x)


class TimestepEmbedder(nn.Module):
    def __init__(self, width: int, frequency_embedding_size: int = 256) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(frequency_embedding_size, width), nn.SiLU(), nn.Linear(width, width))
        self.frequency_embedding_size = frequency_embedding_size

    @staticmethod
    def timestep_embedding(t, dim, max_period=10000):
        frequencies = torch.exp(-math.log(max_period) / (dim // 2) * torch.arange(dim // 2, device=t.device))
        angles = t[:, None].float() * frequencies
        return torch.cat([angles.cos(), angles.sin()], dim=-1)

    def forward(self, t):
        return self.mlp(self.timestep_embedding(t, self.frequency_embedding_size))


class LabelEmbedder(nn.Module):
    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)
        self.num_classes, self.dropout_prob = num_classes, 0.1

    def forward(self, labels, train, force_drop_ids=None):
        assert not train
        assert force_drop_ids is None
        return self.embedding_table(labels)


class FinalLayer(nn.Module):
    def __init__(self, width: int, patch: int, channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, patch * patch * channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, c):
        return self.linear(shifted(self.norm_final(x), *self.adaLN_modulation(c).chunk(2, dim=1)))


class OriginalDiT(nn.Module):
    """``(x, t, y)`` with a learned variance, and ``forward_with_cfg`` on doubled batches."""

    def __init__(self, side=8, patch=2, channels=4, width=48, depth=3, heads=4, num_classes=5, block=Block) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.patch_size = channels, 2 * channels, patch
        self.x_embedder = PatchEmbed(side, patch, channels, width)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(num_classes, width)
        self.pos_embed = nn.Parameter(torch.zeros(1, (side // patch) ** 2, width), requires_grad=False)
        self.blocks = nn.ModuleList([block(width, heads) for _ in range(depth)])
        self.final_layer = FinalLayer(width, patch, self.out_channels)

    def unpatchify(self, x):
        side = math.isqrt(x.shape[1])
        x = x.reshape(len(x), side, side, self.patch_size, self.patch_size, self.out_channels)
        return torch.einsum("nhwpqc->nchpwq", x).reshape(len(x), self.out_channels, side * self.patch_size, -1)

    def forward(self, x, t, y):
        x = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y, self.training)
        for block in self.blocks:
            x = block(x, c)
        return self.unpatchify(self.final_layer(x, c))

    def forward_with_cfg(self, x, t, y, cfg_scale):
        half = x[: len(x) // 2]
        output = self.forward(torch.cat([half, half]), t, y)
        eps, rest = output[:, :3], output[:, 3:]
        conditional, unconditional = eps.chunk(2)
        mixed = unconditional + cfg_scale * (conditional - unconditional)
        return torch.cat([torch.cat([mixed, mixed]), rest], dim=1)


def randomised(module: nn.Module, seed: int = 0, scale: float = 0.2) -> nn.Module:
    """Every weight random, in evaluation mode: adaLN-Zero's zeros would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return module.eval().requires_grad_(False)


def random_inputs(channels: int, side: int, num_classes: int, rows: int = 6):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, channels, side, side, generator=generator)
    return x, torch.arange(rows) * 150 + 3, torch.arange(rows) % (num_classes + 1)


def relative_error(output, expected) -> float:
    return float((output.float() - expected.float()).abs().max() / expected.float().abs().max())
