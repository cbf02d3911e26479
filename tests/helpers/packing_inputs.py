"""Inputs of the packing ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def make_pack(seed: int, slots: int, draft_length: int, latent: tuple[int, ...], padding: int) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, draft_length + 1, (slots,), generator=g)
    num_steps = draft_length + 3
    steps = torch.randint(0, 4, (slots,), generator=g)
    return {
        "states": torch.randn(slots, draft_length, *latent, generator=g),
        "lengths": lengths,
        "steps": steps,
        "labels": torch.randint(0, 10, (slots,), generator=g),
        "timesteps": torch.arange(num_steps).flip(0) * 7,
        "num_rows": int(lengths.sum()) + padding,
    }


def make_commit(seed: int, slots: int, draft_length: int, latent: tuple[int, ...], branches: int) -> dict[str, Any]:
    """Slots in every condition: idle, holding, advancing and finishing, with few or many images waiting."""
    g = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, count: int) -> Tensor:
        return torch.randint(low, high, (count,), generator=g)

    lengths = integers(1, draft_length + 1, slots)
    committed = torch.minimum(integers(0, draft_length + 1, slots), lengths)
    num_steps = draft_length + 3
    finishing = integers(0, 2, slots).bool()
    steps = torch.where(finishing, num_steps - committed, integers(0, 3, slots))
    waiting = int(integers(0, slots + 2, 1))
    num_images = slots + waiting
    images = torch.randperm(slots, generator=g)
    images[integers(0, 4, slots) == 0] = -1
    row_offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    rows = int(row_offsets[-1]) + 2
    return {
        "committed": committed,
        "next_states": torch.randn(slots, *latent, generator=g),
        "draft_states": torch.randn(slots, draft_length, *latent, generator=g),
        "features": torch.randn(branches * rows, 3, 5, generator=g),
        "row_offsets": row_offsets,
        "state": torch.randn(slots, *latent, generator=g),
        "previous": torch.randn(slots, *latent, generator=g),
        "parent": torch.randn(branches, slots, 3, 5, generator=g),
        "steps": steps,
        "images": images,
        "labels": integers(0, 10, slots),
        "samples": torch.randn(num_images, *latent, generator=g),
        "all_labels": integers(0, 10, num_images),
        "queue": torch.tensor([slots]),
        "num_steps": num_steps,
    }
