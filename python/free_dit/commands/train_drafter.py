"""The command ``train-drafter``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from free_dit.commands.shared import Overrides, console
from free_dit.configuration import CONFIGS, load_config
from free_dit.loading import load_target
from free_dit.training.distributed import Place
from free_dit.training.drafter_config import DTYPES, DrafterTrainConfig
from free_dit.training.train_drafter import train_drafter as run_train_drafter


def train_drafter(
    out: Path,
    target: Annotated[str, arg(aliases=("--model",))] = "digits",
    config: Path = CONFIGS / "digits_drafter.toml",
    set_: Overrides = (),
    device: str = "auto",
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    num_heads: int | None = None,
    family: Literal["dit", "sit"] | None = None,
    null_label: bool = True,
    draws: Literal["pixels", "latents"] | None = None,
) -> None:
    """Train a drafter on a DiT's own trajectories (no images needed); writes OUT/drafter.safetensors. Resumable.

    Under torchrun each process trains on a GPU of its own: torchrun --nproc-per-node 8 -m free_dit train-drafter ...

    Args:
        out: folder of checkpoint, log and result.
        target: a bundled model's name, a model.safetensors written by train, a DiT checkpoint in the original's format,
            or a folder of diffusers.
        config: TOML file with the keys of DrafterTrainConfig.
        set_: overrides such as loop.iterations=2000 drafter.width=64.
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1" ...
        dtype: of the frozen target; if not given, that of the file for the original's format, else float32.
        num_heads: attention heads, for checkpoints in the original's format whose width does not tell.
        family: dit or sit, for checkpoints in the original's format, which have the same tensors.
        null_label: whether such a checkpoint was trained with label dropout; set max_guidance=1 where it was not.
        draws: what the target's samples are, where its channels do not tell: 1 or 3 are taken for pixels. The drafter's
            file keeps this, the heads, the family and the label, and commands that are given it do not ask again.
    """
    settings, place = load_config(DrafterTrainConfig, config, set_), Place.from_environment()
    narrow = None if dtype is None else DTYPES[dtype]
    loaded, _ = load_target(target, place.device(device), narrow, num_heads, family, null_label, draws)
    path = run_train_drafter(loaded, settings, out, target, place)
    if place.is_first:
        console.print(f"wrote {path}")
