"""Drafter study: variants of one drafter, each trained alike, with acceptance, call reduction and cost side by side."""

from __future__ import annotations

import json
import time
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from free_dit.configuration import load_config
from free_dit.data import DATASETS
from free_dit.experiments.model_card import EVALUATION_SEED
from free_dit.experiments.network_calls import NetworkCalls, timed_in_turn
from free_dit.experiments.wall_clock import machine
from free_dit.files import write_files
from free_dit.generation import ChainSettings, sampler_for
from free_dit.markdown import decimals, table
from free_dit.networks.families import device_of, schedule_for
from free_dit.training.acceptance import acceptance_by_lookahead, by_fifth
from free_dit.training.chains import images_fit
from free_dit.training.shards import target_fingerprint
from free_dit.training.train_drafter import DrafterTrainConfig, train_drafter
from free_dit.training.trajectories import Trajectories, collect
from free_kernels import FeatureDrafter, FrozenDrafter
from free_kernels.protocols import Drafter, DrafterDefaults, Target, TargetDefaults
from free_kernels.validation import check_int, check_writable, fail

NOISED = "forward-noised data"
# By name, the overrides of the configuration under study.
VARIANTS: dict[str, tuple[str, ...]] = {
    "as configured": (),
    "window 2": ("drafter.window=2",),
    "window 3": ("drafter.window=3",),
    "depth 2": ("drafter.depth=2",),
    "depth 3": ("drafter.depth=3",),
    "width 64": ("drafter.width=64",),
    "width 160": ("drafter.width=160",),
    "no skip": ("drafter.skip=false",),
    "unit change only": ("drafter.inputs=state+unit_change",),
    "no change": ("drafter.inputs=state",),
    "no late windows": ("late=0.0",),
    "no first step": ("drafter.first_step=false",),
    "unroll 1": ("unroll=1",),
    "unroll 2": ("unroll=2",),
    "unroll 4": ("unroll=4",),
    "unroll 6": ("unroll=6",),
    "AdamW": ("loop.optimizer=adamw",),
    "log1p loss": ("loss=log1p",),
    NOISED: ("forward_dataset=digits",),
    "mixed loss": ("feature_weight=1.0",),
    "feature regression": ("loss=none", "feature_weight=1.0"),
}
LOOKAHEAD, LENGTHS = 5, (6, 12)


@torch.no_grad()
def call_cost(target: Target, drafter: Drafter, repeats: int = 40) -> float:
    """Seconds of a drafter call over seconds of a target call of one row, without guidance; least of the repeats."""
    one = NetworkCalls(target, 1)
    seconds = timed_in_turn({"drafter": one.drafter(drafter), "target": one.target}, repeats, device_of(target), np.min)
    return seconds["drafter"] / seconds["target"]


def evaluate(target: Target, drafter: Drafter, data: Trajectories, num_steps: int) -> dict[str, Any]:
    """Acceptance by look-ahead and in the last fifth, call reduction of both verifications, cost of a call."""
    schedule = schedule_for(target, num_steps)
    table = acceptance_by_lookahead(target, drafter, schedule, data, LOOKAHEAD)
    reductions = {}
    for kind, length in product(("token", "block"), LENGTHS):
        draw = sampler_for(target, drafter, ChainSettings(num_steps, length), verification=kind)
        reductions[f"{kind} {length}"] = draw(data.labels, seed=EVALUATION_SEED).stats.call_reduction
    return {
        "by_lookahead": table.nanmean(1).tolist(),
        "last_fifth": by_fifth(table)[:, -1].tolist(),
        "call_reduction": reductions,
        "call_cost": 0.0 if DrafterDefaults.read(drafter, "is_free") else call_cost(target, drafter),
        "parameters": sum(p.numel() for p in drafter.parameters()) if isinstance(drafter, torch.nn.Module) else 0,
    }


def _read_study(path: Path) -> dict[str, Any]:
    """The results of an earlier run, if they are complete enough to be rendered and continued.

    Raises:
        ValueError: not a study; the message names the file.
    """
    try:
        report = json.loads(path.read_text())
        render_study(report)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        found = f"{type(error).__name__}: {error}"
        raise ValueError(f"study: {path} must hold a study, got {found}; remove it to have it made again") from error
    return report


def _fitting(target: Target) -> list[str]:
    """Names of the variants that the target can be trained with: no images of other shapes, and no noised ones for a
    flow model."""
    flow = TargetDefaults.read(target, "family") == "flow"
    left_out = flow or not images_fit(target, DATASETS["digits"]("train"))
    if left_out:
        tqdm.write(f"study: without {NOISED!r}, as digits do not fit the model")
    return [name for name in VARIANTS if not (left_out and name == NOISED)]


def run_study(
    target: Target, model: str, config: Path, overrides: tuple[str, ...], out: Path, names: tuple[str, ...], images: int
) -> Path:
    """Train and evaluate the named variants (all if none is named) that ``out`` does not hold yet.

    Every variant has a folder of its own, with its training checkpoint: an interrupted study goes on where it stopped.

    Raises:
        ValueError: an unknown variant, or a folder of another configuration.
    """
    check_int("study", "images", images, 2)
    for name in names:
        if name not in VARIANTS:
            fail("study", "variants", f"among {', '.join(VARIANTS)}", repr(name))
    result = check_writable("study", "out", Path(out) / "study.json")
    base = load_config(DrafterTrainConfig, config, overrides)
    labels, schedule = torch.arange(images) % target.num_classes, schedule_for(target, base.num_steps)
    data: Trajectories | None = None
    known = _read_study(result) if result.exists() else {}
    frame = {"model": model, "overrides": list(overrides), "images": images, "num_steps": base.num_steps}
    frame |= {"target_fingerprint": target_fingerprint(target), "config": base.identity()}
    if known and known["frame"] != frame:
        fail("study", "out", f"a folder of the study {frame}", str(known["frame"]))
    rows = known.get("rows", {})
    for name in tqdm(("frozen", *(names or _fitting(target))), desc="study", unit="variant"):
        if name in rows:
            continue
        folder = Path(out) / name.replace(" ", "_")
        drafter: Drafter = FrozenDrafter()
        seconds = 0.0
        if name != "frozen":
            began = time.monotonic()
            wanted = load_config(DrafterTrainConfig, config, (*overrides, *VARIANTS[name]))
            drafter = FeatureDrafter.load(train_drafter(target, wanted, folder, model), target)
            seconds = time.monotonic() - began
        if data is None:
            data = collect(target, schedule, labels, torch.ones(images), EVALUATION_SEED)
        rows[name] = evaluate(target, drafter, data, base.num_steps) | {"train_s": seconds}
        report = {"frame": frame, "machine": machine(device_of(target)), "rows": rows}
        write_files({result: (json.dumps(report, indent=1) + "\n").encode()})
    return result


def render_study(report: dict[str, Any]) -> str:
    """The study as a Markdown table."""
    frame, facts = report["frame"], report["machine"]
    lines = [
        f"Model {frame['model']}, {frame['num_steps']} steps, {frame['images']} images, no guidance, "
        f"settings {' '.join(frame['overrides']) or 'as in the file'}; {facts['cpu']}, {facts['threads']} threads, "
        f"torch {facts['torch']}.",
        "",
    ]
    headings = ["drafter", "1 ahead", "2", "3", "4", "5", "last fifth, 1 ahead", "5 ahead"]
    headings += ["L = 6", "L = 12", "block 6", "block 12", "call", "parameters"]
    rows = [
        [
            name,
            *decimals([*row["by_lookahead"], row["last_fifth"][0], row["last_fifth"][-1]], 3),
            *decimals([row["call_reduction"][f"{kind} {n}"] for kind in ("token", "block") for n in LENGTHS], 2),
            f"{row['call_cost']:.2f}",
            f"{row['parameters'] / 1e3:.0f} k",
        ]
        for name, row in report["rows"].items()
    ]
    return "\n".join([*lines, *table(headings, rows)])
