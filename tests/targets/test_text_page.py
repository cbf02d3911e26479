"""The examples of docs/text-to-image.md run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).resolve().parents[2] / "docs" / "text-to-image.md"

pytest.importorskip("diffusers")


@pytest.mark.skipif(not PAGE.exists(), reason="needs the source checkout")
def test_examples_run():
    """In one namespace, in order; each ends with images of its family."""
    torch.manual_seed(0)
    names: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    shapes = []
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
        shapes.append(tuple(names["result"].samples.shape))
        assert bool(names["result"].samples.isfinite().all())
    assert shapes[:4] == [(3, 4, 8, 8), (2, 4, 8, 8), (2, 4, 8, 12), (2, 4, 8, 8)]
    assert names["mix_grpo"].window == (2, 6)
