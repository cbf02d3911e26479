"""Shipped weights are those of their model cards: the one defence against a changed bit that shapes do not show."""

from __future__ import annotations

import hashlib
import re

import pytest

from free_dit.bundled import MODELS, bundled_names

ROW = re.compile(r"^\| `(?P<name>[^`]+)` \| (?P<size>\d+) \| `(?P<digest>[0-9a-f]{64})` \|$", re.MULTILINE)


@pytest.mark.parametrize("model", bundled_names())
def test_weights_are_those_of_the_model_card(model):
    folder = MODELS / model
    listed = {
        row["name"]: (int(row["size"]), row["digest"]) for row in ROW.finditer((folder / "MODEL_CARD.md").read_text())
    }
    weights = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    assert listed == {name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in weights.items()}
