"""Calls of every public op, for any number of rows, slots or keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from packing_inputs import make_commit, make_pack
from torch import Tensor

from free_kernels import ops

LENGTH, LATENT = 4, (2, 4, 4)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def uniform(seed: int, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 0.98 + 0.01


def transition(size: int, outputs: int, guidance: float) -> tuple[list[Any], dict[str, Any]]:
    channels, *sides = LATENT
    output = normal(3, size if guidance == 1.0 else 2 * size, outputs * channels, *sides)
    given = [normal(1, size, *LATENT), output, 0.1 * normal(4, size, 8)]
    return given, {"clip": 1.0, "guidance_scale": guidance}


def round_of(size: int, outputs: int, guidance: float, keyed: bool) -> tuple[list[Any], dict[str, Any]]:
    channels, *sides = LATENT
    rows, drafts = (size, LENGTH, *LATENT), (size, LENGTH - 1, *LATENT)
    made = [normal(1, *rows), normal(2, *drafts), uniform(3, *drafts) + 0.5]
    images, steps = torch.arange(size), torch.arange(LENGTH).repeat(size, 1)
    if keyed:
        made += [77, images, steps]
    else:
        made += [normal(4, *rows), normal(5, *rows) if outputs == 2 else None, uniform(6, size, LENGTH)]
    branches = 1 if guidance == 1.0 else 2
    output = normal(7, branches * size * LENGTH, outputs * channels, *sides)
    offsets = torch.arange(0, size * LENGTH + 1, LENGTH)
    names = {"guidance_scale": guidance} | ({"rounds": torch.arange(size) + 5} if keyed else {})
    return [*made, output, offsets, 0.1 * normal(8, size, LENGTH, 8)], names


def attention(size: int, capacity: int) -> tuple[list[Any], dict[str, Any]]:
    tokens = [normal(seed, size, 4, 2, 8) for seed in (1, 2, 3)]
    if not capacity:
        return tokens, {}
    ring = [normal(seed, size, capacity, 4, 2, 8) for seed in (4, 5)]
    return [*tokens, *ring, torch.arange(size) % (capacity + 1), torch.arange(size) % capacity], {}


def appended(size: int) -> tuple[list[Any], dict[str, Any]]:
    own, ring = [normal(seed, size, 4, 2, 8) for seed in (1, 2)], [normal(seed, size, 3, 4, 2, 8) for seed in (4, 5)]
    return [*ring, *own, torch.arange(size) % 4, torch.arange(size) % 3], {}


def rewound(size: int) -> tuple[list[Any], dict[str, Any]]:
    return [torch.arange(size) % 4, torch.arange(size) % 3, torch.arange(size) % 2, 3], {}


def packed(size: int) -> tuple[list[Any], dict[str, Any]]:
    made = make_pack(size, size, LENGTH, LATENT, 0)
    return [], made | {"num_rows": 8 * size + 37}


def committed(size: int) -> tuple[list[Any], dict[str, Any]]:
    return [], make_commit(size, size, LENGTH, LATENT, 2)


def numbers(size: int) -> tuple[list[Any], dict[str, Any]]:
    return [2**64 - 3, torch.arange(size), torch.arange(size) * 3, 1, 7], {}


CASES: dict[str, tuple[Callable[..., Any], Callable[[int], tuple[list[Any], dict[str, Any]]]]] = {
    "gaussian_transition": (ops.gaussian_transition, lambda size: transition(size, 1, 1.0)),
    "gaussian_transition, learned": (ops.gaussian_transition, lambda size: transition(size, 2, 3.0)),
    "feature_attention": (ops.feature_attention, lambda size: attention(size, 0)),
    "feature_attention, ring": (ops.feature_attention, lambda size: attention(size, 3)),
    "append_features": (ops.append_features, appended),
    "rewind_features": (ops.rewind_features, rewound),
    "pack_drafts": (ops.pack_drafts, packed),
    "commit_drafts": (ops.commit_drafts, committed),
    "philox_normal": (ops.philox_normal, numbers),
    "philox_uniform": (ops.philox_uniform, numbers),
}
for name in ("couple", "couple_block", "couple_philox", "couple_block_philox"):
    for outputs in (1, 2):
        for guidance in (1.0, 3.0):
            CASES[f"{name}, {outputs} C, guidance {guidance:g}"] = (
                getattr(ops, name),
                lambda size, name=name, outputs=outputs, guidance=guidance: round_of(
                    size, outputs, guidance, name.endswith("philox")
                ),
            )
