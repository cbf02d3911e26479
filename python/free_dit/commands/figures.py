"""The command ``figures``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from tyro.conf import OmitArgPrefixes

from free_dit.bundled import bundled_names
from free_dit.commands.shared import console, title_of
from free_dit.devices import resolve_device
from free_dit.experiments.analysis import Settings, Subject
from free_dit.experiments.model_card import EVALUATION_SEED
from free_dit.loading import TargetFacts, is_original, load_pair
from free_kernels.sampling.options import fitting_length


def figures(
    out: Path,
    model: tuple[str, ...] = ("digits",),
    drafter: tuple[str, ...] = (),
    num: int = Settings.num,
    steps: int = Settings.steps,
    draft_length: int | None = None,
    guidance: tuple[float, ...] = Settings.guidance,
    seed: int = EVALUATION_SEED,
    facts: Annotated[TargetFacts, OmitArgPrefixes] = TargetFacts(),
    device: str = "auto",
) -> None:
    """Analysis figures: temporal similarity, layer change, uncertainty, reflection coupling, timeline of rounds.

    Each is a PNG with its numbers as JSON beside it. All but the uncertainty is about the first model.

    Args:
        out: folder of the figures.
        model: bundled models' names, checkpoints, or folders of diffusers.
        drafter: for each model "bundled", "frozen", or a drafter.safetensors; none given takes the bundled ones.
        num: images of every run.
        steps: sampling steps K.
        draft_length: rows of a round for one image; None takes 6, or the number of steps where that is smaller.
        guidance: classifier-free guidance scales of the uncertainty figure.
        seed: seed of all noise.
        facts: what files of the original's format may not say of themselves, the same for all of them.
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1" ...
    """
    from free_dit.experiments.analysis_plots import write_figures

    if drafter and len(drafter) != len(model):
        raise ValueError(f"figures: drafter must be one for each of {len(model)} models, got {len(drafter)}")
    place = resolve_device("figures", device)
    length = fitting_length(steps) if draft_length is None else draft_length
    subjects: list[Subject] = []
    for number, name in enumerate(model):
        choice = drafter[number] if drafter else "bundled" if name in bundled_names() else "frozen"
        target, chosen = load_pair(name, choice, facts if is_original(name) else TargetFacts(), place)
        title = title_of(name)
        taken = any(one.name == title for one in subjects)
        learned = None if isinstance(chosen, str) else chosen
        subjects.append(Subject(f"{title} ({number + 1})" if taken else title, target, learned))
    paths = write_figures(out, subjects, Settings(num, steps, length, guidance, seed))
    console.print("wrote " + ", ".join(map(str, paths)) + " and a JSON file beside each")
