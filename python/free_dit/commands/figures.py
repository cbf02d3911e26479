"""The command ``figures``."""

from __future__ import annotations

from pathlib import Path

from free_dit.commands.shared import console, title_of
from free_dit.experiments.analysis import Settings, Subject
from free_dit.experiments.analysis_plots import write_figures
from free_dit.experiments.model_card import EVALUATION_SEED
from free_dit.loading import load_drafter, load_target


def figures(
    out: Path,
    model: tuple[str, ...] = ("digits",),
    drafter: tuple[str, ...] = (),
    num: int = Settings.num,
    steps: int = Settings.steps,
    draft_length: int = Settings.draft_length,
    guidance: tuple[float, ...] = Settings.guidance,
    seed: int = EVALUATION_SEED,
) -> None:
    """Analysis figures: temporal similarity, layer change, uncertainty, reflection coupling, timeline of rounds.

    Each is a PNG with its numbers as JSON beside it. All but the uncertainty is about the first model.

    Args:
        out: folder of the figures.
        model: bundled models' names, checkpoints, or folders of diffusers.
        drafter: for each model "bundled", "frozen", or a drafter.safetensors; none given takes the bundled ones.
        num: images of every run.
        steps: sampling steps K.
        draft_length: rows of a round for one image.
        guidance: classifier-free guidance scales of the uncertainty figure.
        seed: seed of all noise.
    """
    if drafter and len(drafter) != len(model):
        raise ValueError(f"figures: drafter must be one for each of {len(model)} models, got {len(drafter)}")
    subjects: list[Subject] = []
    for number, name in enumerate(model):
        target, bundled = load_target(name)
        choice = drafter[number] if drafter else "frozen" if bundled is None else "bundled"
        chosen = load_drafter(choice, target, bundled)
        title = title_of(name)
        taken = any(one.name == title for one in subjects)
        learned = None if isinstance(chosen, str) else chosen
        subjects.append(Subject(f"{title} ({number + 1})" if taken else title, target, learned))
    paths = write_figures(out, subjects, Settings(num, steps, draft_length, guidance, seed))
    console.print("wrote " + ", ".join(map(str, paths)) + " and a JSON file beside each")
