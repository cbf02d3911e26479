"""The command ``study``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from tyro.conf import OmitArgPrefixes

from free_dit.commands.shared import Overrides, console
from free_dit.configuration import CONFIGS
from free_dit.devices import resolve_device
from free_dit.experiments.drafter_study import render_study, run_study
from free_dit.loading import TargetFacts, load_pair


def study(
    out: Path,
    model: str = "digits",
    config: Path = CONFIGS / "study_drafter.toml",
    variants: tuple[str, ...] = (),
    images: int = 32,
    set_: Overrides = (),
    facts: Annotated[TargetFacts, OmitArgPrefixes] = TargetFacts(),
    device: str = "auto",
) -> None:
    """Train variants of a drafter alike and put acceptance, call reduction and cost side by side. Resumable.

    Args:
        out: folder of the runs, study.json and study.md.
        model: a bundled model's name, a checkpoint, or a folder of diffusers.
        config: TOML file of the drafter under study.
        variants: names of the variants to run; all if empty.
        images: images of the evaluation.
        set_: overrides for every variant, such as loop.iterations=1000.
        facts: what the model's file may not say of itself.
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1" ...
    """
    target, _ = load_pair(model, "none", facts, resolve_device("study", device))
    result = run_study(target, model, config, set_, out, variants, images)
    table = out / "study.md"
    table.write_text(render_study(json.loads(result.read_text())))
    console.print(f"wrote {result} and {table}")
