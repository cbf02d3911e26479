"""Texts of 300 tokens of width 1,152 for 64 images: stored once, and never copied for a row; counted."""

from __future__ import annotations

import pytest
import torch
from text_modules import pixart
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.sampler.live_bytes import LiveBytes
from free_kernels import DDPMSchedule, PixArtTarget, sample

pytest.importorskip("diffusers")

IMAGES, TOKENS, WIDTH, LENGTH = 64, 300, 1152, 6
# Of the network, and so of the texts that are stored.
INNER = 288


class BytesMade(LiveBytes):
    """Bytes alive besides tensors that were there before, of which operations return views."""

    def __init__(self, before: list[torch.Tensor]) -> None:
        super().__init__()
        self._before = {tensor.untyped_storage()._cdata for tensor in before}

    def _count(self, storage) -> None:
        if storage._cdata not in self._before:
            super()._count(storage)


class Largest(TorchDispatchMode):
    """The most elements of a tensor that an operation returns and that has a dimension of text tokens.

    Attributes:
        elements: of the largest.
        calls: how many such tensors there were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.elements = self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run an operation and look at what it returns; views of one tensor for all rows count with all rows."""
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and TOKENS in tensor.shape:
                self.calls += 1
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.fixture(scope="module")
def target():
    """One block, one token an image, so that a run is little but its texts."""
    return PixArtTarget(
        pixart(
            num_attention_heads=16,
            attention_head_dim=INNER // 16,
            num_layers=1,
            cross_attention_dim=INNER,
            caption_channels=WIDTH,
            sample_size=2,
        )
    )


def texts(tokens: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    kept = torch.randint(1, tokens + 1, (IMAGES, 1), generator=generator)
    kept[-1] = tokens
    embeds = torch.randn(IMAGES, tokens, WIDTH, generator=generator)
    return {"prompt_embeds": embeds, "prompt_attention_mask": (torch.arange(tokens) < kept).long()}


def run(target, conditions) -> tuple[int, int, int]:
    """Peak bytes of a run of six rows an image; the most elements of a tensor of texts, and how many there were."""
    largest, before = Largest(), [*target.module.parameters(), *target.module.buffers(), *conditions.values()]
    with BytesMade(before) as live, largest:
        result = sample(target, conditions, schedule=DDPMSchedule(7), draft_length=LENGTH, seed=1)
    assert result.stats.target_rows > 3 * IMAGES, "rounds have several rows an image"
    return live.peak, largest.elements, largest.calls


def test_texts_are_stored_once(target):
    """At most 1.1 times a run of texts of one token and, once, what the texts of 300 take."""
    assert target._path == "hoisted"
    without, _, _ = run(target, texts(1))
    peak, elements, calls = run(target, texts(TOKENS))
    once = IMAGES * TOKENS * INNER * 4
    assert once > 0.5 * without, "the texts are much of it"
    assert peak <= 1.1 * (without + once)
    assert calls
    # The store itself is the largest tensor of texts: none is of more than an image's text for every image.
    assert elements == IMAGES * TOKENS * INNER


def test_copies_for_rows_are_found(target):
    """Negative control: blocks called as they are, with a text for every row."""
    target._path = "blocks"
    known = target.recheck
    target.recheck = lambda where: None
    try:
        without, _, _ = run(target, texts(1))
        peak, elements, _ = run(target, texts(TOKENS))
    finally:
        target._path = "hoisted"
        target.recheck = known
    assert peak > 1.1 * (without + IMAGES * TOKENS * INNER * 4)
    assert elements > 3 * IMAGES * TOKENS * INNER
