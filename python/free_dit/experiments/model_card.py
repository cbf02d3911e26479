"""Measurements of a model card: acceptance by look-ahead and by fifth of the chain, call reduction, image quality."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from free_dit.bundled import MODELS, load_bundled
from free_dit.data import load_digits
from free_dit.experiments.wall_clock import machine
from free_dit.files import sha256_of, write_json
from free_dit.generation import ChainSettings, sampler_for
from free_dit.markdown import decimals, fill_page, table
from free_dit.networks.families import device_of, schedule_for
from free_dit.training.acceptance import acceptance_by_lookahead, by_fifth
from free_dit.training.trajectories import collect
from free_kernels import FrozenDrafter
from free_kernels.protocols import Drafter, Target

# No seed of drafter training (those begin at loop.seed * 2**20): the drafter was not trained on this noise.
EVALUATION_SEED = 2**63 + 7


def measure(target: Target, drafter: Drafter, images: int = 64, num_steps: int = 250) -> dict[str, Any]:
    """Everything that a card reports; a few minutes on two cores."""
    schedule = schedule_for(target, num_steps)
    labels = torch.arange(images) % target.num_classes
    drafters: dict[str, Drafter] = {"frozen": FrozenDrafter(), "learned": drafter}
    card: dict[str, Any] = {"images": images, "num_steps": num_steps, "machine": machine(device_of(target))}
    card["transitions"] = "learned variance" if target.learns_variance else type(schedule).__name__
    card["acceptance"] = {}
    for scale in (1.0, 2.0):
        data = collect(
            target,
            schedule,
            labels,
            torch.full((images,), scale, device=labels.device),
            seed=EVALUATION_SEED,
            progress=True,
        )
        for name, one in drafters.items():
            table = acceptance_by_lookahead(target, one, schedule, data)
            card["acceptance"][f"{name}, guidance {scale:g}"] = {
                "by_lookahead": table.nanmean(1).tolist(),
                "by_fifth": by_fifth(table).tolist(),
            }
    card["call_reduction"] = []
    runs = [(name, scale, length) for scale in (1.0, 2.0) for name in drafters for length in (4, 6, 8, 12)]
    for name, scale, length in tqdm(runs, desc="call reduction", unit="run"):
        draw = sampler_for(target, drafters[name], ChainSettings(num_steps, length, scale))
        stats = draw(labels, seed=EVALUATION_SEED).stats
        card["call_reduction"].append(
            {
                "drafter": name,
                "guidance": scale,
                "draft_length": length,
                "call_reduction": stats.call_reduction,
                "acceptance": stats.acceptance,
            }
        )
    return card


def other_step_counts(target: Target, drafter: Drafter, images: int = 16) -> dict[str, Any]:
    """Call reduction at draft length 6 for chains that the drafter was not trained on."""
    labels = torch.arange(images) % target.num_classes
    drafters = {"frozen": "frozen", "learned": drafter}

    def reduction(one: Drafter | str, steps: int) -> float:
        return sampler_for(target, one, ChainSettings(steps))(labels, seed=EVALUATION_SEED).stats.call_reduction

    rows = {steps: {name: reduction(one, steps) for name, one in drafters.items()} for steps in (50, 100, 250, 1000)}
    return {"images": images, "draft_length": 6, "rows": rows}


def nearest_neighbour_quality(target: Target, images: int = 500) -> dict[str, Any]:
    """Class accuracy of ordinary samples by nearest neighbours, and distances to the nearest training images."""
    from sklearn.neighbors import KNeighborsClassifier

    train, test = load_digits("train"), load_digits("test")
    reader = KNeighborsClassifier(3).fit(train.images.flatten(1), train.labels)
    labels = torch.arange(images) % target.num_classes

    def describe(pictures: torch.Tensor, truth: torch.Tensor) -> dict[str, float]:
        nearest = torch.cdist(pictures.flatten(1), train.images.flatten(1)).min(1).values
        return {
            "accuracy": float(reader.score(pictures.flatten(1), truth)),
            "nearest_training_image": float(nearest.mean()),
        }

    rows = {"held-out real digits": describe(test.images, test.labels)}
    for scale in (1.0, 2.0):
        draw = sampler_for(target, None, ChainSettings(guidance=scale))
        result = draw(labels, seed=3, max_slots=128, progress=True)
        rows[f"samples, guidance {scale:g}"] = describe(result.samples.cpu(), labels)
    return {"images": images, "rows": rows}


def render(card: dict[str, Any]) -> str:
    """The card's tables as Markdown."""
    facts, steps, quality = card["machine"], card["steps"], card["quality"]
    acceptance = card["acceptance"].items()
    grouped: dict[tuple[str, float], list[float]] = {}
    for run in card["call_reduction"]:
        grouped.setdefault((run["drafter"], run["guidance"]), []).append(run["call_reduction"])
    lines = [
        f"Measured with `python -m free_dit card` on {facts['cpu']} ({facts['threads']} threads, torch "
        f"{facts['torch']}); {card['images']} images, {card['num_steps']} steps, "
        f"{card.get('transitions', 'learned variance')}, lossless.",
        "",
        "Acceptance probability of a draft so many steps past the last exact feature (frozen: made of that feature; "
        '`sample` with `drafter="frozen"` carries the clean sample along instead):',
        "",
        *table(["drafter", *"12345"], ([name, *decimals(entry["by_lookahead"], 3)] for name, entry in acceptance)),
        "The same by fifth of the chain (first is noisiest), one and five steps ahead:",
        "",
        *table(
            ["drafter", "ahead", "first", "second", "third", "fourth", "last"],
            (
                [name, str(ahead), *decimals(entry["by_fifth"][ahead - 1], 3)]
                for name, entry in acceptance
                for ahead in (1, 5)
            ),
        ),
        "Call reduction of `sample` (steps committed per round) by draft length:",
        "",
        *table(
            ["drafter", "guidance", "4", "6", "8", "12"],
            ([drafter, f"{scale:g}", *decimals(values, 2)] for (drafter, scale), values in grouped.items()),
        ),
        f"Call reduction at draft length {steps['draft_length']} for other step counts, {steps['images']} images:",
        "",
        *table(
            ["drafter", *(f"{count} steps" for count in steps["rows"])],
            (
                [drafter, *decimals([row[drafter] for row in steps["rows"].values()], 2)]
                for drafter in ("frozen", "learned")
            ),
        ),
        f"Quality of {quality['images']} ordinary samples, 250 steps, read by a 3-nearest-neighbour "
        "classifier trained on the training split; distances are Euclidean over the 64 pixels:",
        "",
        *table(
            ["images", "class accuracy", "distance to the nearest training image"],
            (
                [name, f"{row['accuracy']:.3f}", f"{row['nearest_training_image']:.2f}"]
                for name, row in quality["rows"].items()
            ),
        ),
        *table(
            ["file", "bytes", "SHA-256"],
            ([f"`{name}`", str(size), f"`{digest}`"] for name, (size, digest) in card["files"].items()),
        ),
    ]
    return "\n".join(lines)


def write_card(name: str, device: torch.device | str = "cpu") -> Path:
    """Measure a bundled pair and renew ``evaluation.json`` and the tables of its ``MODEL_CARD.md``."""
    folder = MODELS / name
    target, drafter = load_bundled(name, device)
    card = measure(target, drafter)
    card["steps"] = other_step_counts(target, drafter)
    card["quality"] = nearest_neighbour_quality(target)
    files = [folder / "model.safetensors", folder / "drafter.safetensors"]
    card["files"] = {path.name: (path.stat().st_size, sha256_of(path)) for path in files}
    write_json(folder / "evaluation.json", card)
    fill_page(folder / "MODEL_CARD.md", "figures", render(json.loads((folder / "evaluation.json").read_text())))
    return folder / "MODEL_CARD.md"
