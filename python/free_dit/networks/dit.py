"""Diffusion Transformer with adaLN-Zero conditioning, written from Peebles & Xie 2022 (arXiv 2212.09748).

Parameter names follow the published checkpoints, so that their state dicts load with ``strict=True``.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class DiTConfig:
    """Shape of a DiT.

    Attributes:
        input_size: side of the square latent.
        patch_size: side of a square patch; divides ``input_size``.
        in_channels: latent channels C.
        hidden_size: token width D.
        depth: number of blocks.
        num_heads: attention heads; divides ``hidden_size``.
        num_classes: number of labels; label ``num_classes`` is the null label when ``class_dropout_prob > 0``.
        class_dropout_prob: probability of replacing a training label by the null label.
        learn_sigma: whether the head has C more channels for the variance.
        mlp_ratio: width of the MLP over ``hidden_size``.
    """

    input_size: int = 32
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    num_classes: int = 1000
    class_dropout_prob: float = 0.1
    learn_sigma: bool = True
    mlp_ratio: float = 4.0

    def __post_init__(self) -> None:
        for name in ("input_size", "patch_size"):
            if not isinstance(getattr(self, name), int):
                raise TypeError(f"DiTConfig: {name} must be an int, of a square, got {getattr(self, name)!r}")
        if self.num_classes < 1:
            raise ValueError(f"DiTConfig: num_classes must be at least 1, got {self.num_classes}")
        if self.patch_size < 1 or self.input_size % self.patch_size:
            raise ValueError(f"DiTConfig: patch_size must divide input_size {self.input_size}, got {self.patch_size}")
        if self.num_heads < 1 or self.hidden_size % self.num_heads or self.hidden_size % 4:
            raise ValueError(
                f"DiTConfig: hidden_size must be a multiple of 4 and of num_heads {self.num_heads}, "
                f"got {self.hidden_size}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a JSON config."""
        return asdict(self)


_SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}


def dit_config(name: str, **overrides: Any) -> DiTConfig:
    """Config of a standard size such as ``"DiT-XL/2"``: S, B, L or XL with patch size 2, 4 or 8.

    Raises:
        ValueError: the name is not one of these.
    """
    size, _, patch = name.removeprefix("DiT-").partition("/")
    if size not in _SIZES or patch not in ("2", "4", "8"):
        raise ValueError(f"dit_config: name must be DiT-{{S,B,L,XL}}/{{2,4,8}}, got {name!r}")
    hidden, depth, heads = _SIZES[size]
    settings = {"hidden_size": hidden, "depth": depth, "num_heads": heads, "patch_size": int(patch)}
    return DiTConfig(**{**settings, **overrides})


def standard_heads(hidden_size: int, depth: int) -> int | None:
    """Attention heads of the standard size of this width and depth; None if there is none."""
    return next((heads for *shape, heads in _SIZES.values() if shape == [hidden_size, depth]), None)


class PatchProjection(nn.Conv2d):
    """A convolution over disjoint patches ``[R, C, H, W] -> [R, D, H / p, W / p]``, as one matrix product."""

    def forward(self, x: Tensor) -> Tensor:
        # Without the set-up of a convolution; the result is laid out as tokens, so that making them costs no copy.
        (p, _), (rows, channels, height, width) = self.stride, x.shape
        high, wide = height // p, width // p
        patches = x.reshape(rows, channels, high, p, wide, p).permute(0, 2, 4, 1, 3, 5)
        patches = patches.reshape(rows, high * wide, channels * p * p)
        return F.linear(patches, self.weight.flatten(1), self.bias).transpose(1, 2).unflatten(2, (high, wide))


class PatchEmbed(nn.Module):
    """Non-overlapping patches to tokens: ``[R, C, H, W] -> [R, T, D]``."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = PatchProjection(in_channels, hidden_size, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """Sinusoidal features of the timestep through a two-layer MLP: ``[R] -> [R, D]``."""

    def __init__(self, hidden_size: int, frequency_embedding_size: int = 256, max_period: float = 10000.0) -> None:
        super().__init__()
        self.frequency_embedding_size = frequency_embedding_size
        self.max_period = max_period
        self.mlp = nn.Sequential(
            nn.Linear(frequency_embedding_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, t: Tensor) -> Tensor:
        half = self.frequency_embedding_size // 2
        exponents = torch.arange(half, dtype=torch.float32, device=t.device) / half
        angles = t.float().unsqueeze(-1) * torch.exp(-math.log(self.max_period) * exponents)
        features = torch.cat([angles.cos(), angles.sin()], dim=-1)
        weight = self.mlp[0].weight
        # The weights of a quantised layer, a method in some kinds, do not tell what it takes.
        floating = isinstance(weight, Tensor) and weight.is_floating_point()
        return self.mlp(features.to(weight.dtype) if floating else features)


class LabelEmbedder(nn.Module):
    """Class embedding with label dropout for classifier-free guidance: ``[R] -> [R, D]``."""

    def __init__(self, num_classes: int, hidden_size: int, dropout_prob: float) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.dropout_prob = dropout_prob
        self.embedding_table = nn.Embedding(num_classes + int(dropout_prob > 0), hidden_size)

    def forward(self, labels: Tensor, train: bool = False) -> Tensor:
        if train and self.dropout_prob > 0:
            dropped = torch.rand(labels.shape, device=labels.device) < self.dropout_prob
            labels = torch.where(dropped, self.num_classes, labels)
        return self.embedding_table(labels)


class Attention(nn.Module):
    """Multi-head self-attention: ``[R, T, D] -> [R, T, D]``."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        rows, tokens, width = x.shape
        q, k, v = self.qkv(x).view(rows, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(rows, tokens, width))


class Mlp(nn.Module):
    """Two linear layers with a tanh-approximated GELU."""

    def __init__(self, hidden_size: int, mlp_hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, mlp_hidden)
        self.fc2 = nn.Linear(mlp_hidden, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def modulation_layer(hidden_size: int, chunks: int, condition_size: int | None = None) -> nn.Sequential:
    """SiLU and a linear layer from the conditioning vector to ``chunks`` modulation vectors.

    The conditioning vector is as wide as a token unless ``condition_size`` says otherwise.
    """
    return nn.Sequential(nn.SiLU(), nn.Linear(condition_size or hidden_size, chunks * hidden_size))


class DiTBlock(nn.Module):
    """Transformer block with adaLN-Zero: shift, scale and gate come from the conditioning vector.

    Args:
        width: of a token, D.
        num_heads: attention heads.
        mlp_ratio: width of the MLP over D.
        condition_size: width of the conditioning vector, D if None.
    """

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, condition_size: int | None = None) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.adaLN_modulation = modulation_layer(width, 6, condition_size)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).unsqueeze(1).chunk(6, dim=-1)
        x = torch.addcmul(x, gate1, self.attn(torch.addcmul(shift1, self.norm1(x), 1 + scale1)))
        return torch.addcmul(x, gate2, self.mlp(torch.addcmul(shift2, self.norm2(x), 1 + scale2)))


class FinalLayer(nn.Module):
    """The head: adaLN, then a linear layer from tokens of width D to ``outputs`` numbers each."""

    def __init__(self, width: int, outputs: int, condition_size: int | None = None) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, outputs)
        self.adaLN_modulation = modulation_layer(width, 2, condition_size)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).unsqueeze(1).chunk(2, dim=-1)
        return self.linear(torch.addcmul(shift, self.norm_final(x), 1 + scale))


class DiT(nn.Module):
    """Diffusion Transformer: ``(x [R, C, H, W], t [R], y [R]) -> [R, C or 2C, H, W]``.

    Args:
        config: the shape.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.learn_sigma = config.learn_sigma
        self.in_channels = config.in_channels
        self.out_channels = config.in_channels * (2 if config.learn_sigma else 1)
        self.patch_size = config.patch_size
        self.num_heads = config.num_heads
        self.x_embedder = PatchEmbed(config.patch_size, config.in_channels, config.hidden_size)
        self.t_embedder = TimestepEmbedder(config.hidden_size)
        self.y_embedder = LabelEmbedder(config.num_classes, config.hidden_size, config.class_dropout_prob)
        positions = sincos_positions(config.hidden_size, config.input_size // config.patch_size)
        self.pos_embed = nn.Parameter(positions.unsqueeze(0), requires_grad=False)
        self.blocks = nn.ModuleList(
            [DiTBlock(config.hidden_size, config.num_heads, config.mlp_ratio) for _ in range(config.depth)]
        )
        self.final_layer = FinalLayer(config.hidden_size, config.patch_size**2 * self.out_channels)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Xavier for linear layers, zero for every modulation and for the output (adaLN-Zero)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        for block in self.blocks:
            nn.init.zeros_(block.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def unpatchify(self, x: Tensor) -> Tensor:
        """Tokens ``[R, T, p * p * C]`` to an image ``[R, C, H, W]``."""
        rows, tokens, _ = x.shape
        side, p = math.isqrt(tokens), self.patch_size
        x = x.view(rows, side, side, p, p, self.out_channels).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(rows, self.out_channels, side * p, side * p)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        c = self.t_embedder(t) + self.y_embedder(y, self.training)
        h = self.x_embedder(x) + self.pos_embed
        for block in self.blocks:
            h = block(h, c)
        return self.unpatchify(self.final_layer(h, c))


def sincos_positions(width: int, side: int, wide: int | None = None) -> Tensor:
    """Fixed two-dimensional sine-cosine position table ``[side * wide, width]``; the column coordinate comes first.

    Args:
        width: of a token, a multiple of 4.
        side: rows of tokens.
        wide: columns of tokens; as many as rows if None.
    """
    if torch.get_default_device().type == "meta":
        # Shapes only, as a file's are compared; arithmetic on this device starts PyTorch's compiler.
        return torch.empty(side * (side if wide is None else wide), width)
    omega = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    grid = torch.arange(side), torch.arange(side if wide is None else wide)
    rows, columns = torch.meshgrid(*grid, indexing="ij")
    parts = []
    for coordinate in (columns, rows):
        angles = coordinate.flatten().double().unsqueeze(1) * omega
        parts += [angles.sin(), angles.cos()]
    return torch.cat(parts, dim=1).float()
