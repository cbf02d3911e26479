"""The command ``card``."""

from __future__ import annotations

from tyro.conf import Positional

from free_dit.commands.shared import console
from free_dit.devices import resolve_device
from free_dit.experiments.model_card import write_card


def card(model: Positional[str] = "digits", device: str = "auto") -> None:
    """Measure a bundled pair again and renew the tables of its model card (some minutes; needs a source checkout).

    Args:
        model: a bundled model's name.
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1" ...
    """
    console.print(f"wrote {write_card(model, resolve_device('card', device))}")
