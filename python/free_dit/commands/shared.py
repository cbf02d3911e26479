"""What several commands share: types of options, labels, titles, devices, drawing by name, output."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
from rich.console import Console
from tyro.conf import arg

from free_dit.bundled import bundled_names
from free_dit.generation import GenerateSettings
from free_dit.generation import generate as run_generate
from free_dit.loading import TargetFacts, load_drafter
from free_kernels.validation import check_int

Overrides = Annotated[tuple[str, ...], arg(name="set", metavar="KEY=VALUE ...")]
console = Console(soft_wrap=True, markup=False)


def title_of(model: str) -> str:
    """A short name of a model or drafter; for a file that of its folder, because training always names files alike."""
    return model if model in bundled_names() else Path(model).parent.name or Path(model).stem


def labels_of(count: int, classes: tuple[int, ...], num_classes: int) -> torch.Tensor:
    """int64 ``[count]`` that repeats ``classes`` in order; all classes if empty."""
    check_int("free_dit", "num", count, 1)
    chosen = torch.tensor(classes or tuple(range(num_classes)))
    return chosen[torch.arange(count) % len(chosen)]


def device_of(where: str, name: str) -> torch.device:
    """A device by name; "auto" is this rank's GPU, or the CPU where there is no GPU."""
    if name != "auto":
        try:
            return torch.device(name)
        except RuntimeError as error:
            raise ValueError(f"{where}: device must be 'auto' or a torch device, got {name!r}") from error
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def draw_set(
    folder: Path,
    model: str,
    settings: GenerateSettings,
    device: torch.device,
    facts: TargetFacts,
    *,
    progress: bool,
    wait: bool = False,
) -> tuple[list[int], list[int]]:
    """:func:`free_dit.generation.generate` with a model and a drafter by name; ``"none"`` is the ordinary sampler."""
    target, bundled = facts.load(model, device)
    if settings.drafter in ("none", None):
        settings, drafter = replace(settings, drafter=None, draft_length=1), None
    else:
        drafter = load_drafter(settings.drafter, target, bundled)
    return run_generate(folder, target, drafter, settings, model=model, progress=progress, wait=wait)
