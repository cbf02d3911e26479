"""The command ``train``."""

from __future__ import annotations

from pathlib import Path

from free_dit.commands.shared import Overrides, console
from free_dit.configuration import CONFIGS, load_config
from free_dit.devices import resolve_device
from free_dit.training.train_dit import TrainConfig
from free_dit.training.train_dit import train as run_train


def train(out: Path, config: Path = CONFIGS / "digits.toml", set_: Overrides = (), device: str = "auto") -> None:
    """Train a DiT; writes OUT/model.safetensors. Interrupt it at will: the same command goes on where it stopped.

    Args:
        out: folder of checkpoint, log and result.
        config: TOML file with the keys of TrainConfig.
        set_: overrides such as loop.iterations=2000 model.depth=4.
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1" ...
    """
    place = resolve_device("train", device)
    console.print(f"wrote {run_train(load_config(TrainConfig, config, set_), out, place)}")
