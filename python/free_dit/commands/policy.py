"""The commands ``policy train``, ``policy train-drafter``, ``policy run`` and ``policy evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from tyro.conf import OmitArgPrefixes
from tyro.extras import SubcommandApp

from free_dit.commands.shared import Overrides, console
from free_dit.configuration import CONFIGS, load_config
from free_dit.files import json_bytes, write_files
from free_dit.policy.evaluate import REPORT, Evaluation, EvaluationSettings
from free_dit.policy.methods import Method, decider
from free_dit.policy.page import render
from free_dit.policy.pair import BUNDLED, load_policy_pair
from free_dit.policy.rollout import roll_out
from free_dit.policy.train import PolicyTrainConfig, train_policy
from free_dit.policy.train_drafter import CONFIG, train_policy_drafter
from free_dit.policy.world import random_scenes
from free_dit.training.drafter_config import DrafterTrainConfig
from free_kernels.validation import check_int, check_writable

policy = SubcommandApp()


@policy.command
def train(out: Path, config: Path = CONFIGS / "policy.toml", set_: Overrides = ()) -> None:
    """Train a policy on demonstrations; writes OUT/model.safetensors. Interrupt it at will: the same command goes on.

    Args:
        out: folder of checkpoint, log and result.
        config: TOML file with the keys of PolicyTrainConfig.
        set_: overrides such as loop.iterations=2000 model.depth=8.
    """
    console.print(f"wrote {train_policy(load_config(PolicyTrainConfig, config, set_), out)}")


@policy.command
def train_drafter(out: Path, model: str = BUNDLED, config: Path = CONFIG, set_: Overrides = ()) -> None:
    """Train a drafter on a policy's own chains; writes OUT/drafter.safetensors. Resumable.

    Args:
        out: folder of checkpoint, log and result.
        model: "reach", the bundled policy, or a model.safetensors written by policy train.
        config: TOML file with the keys of DrafterTrainConfig.
        set_: overrides such as loop.iterations=2000 drafter.width=16.
    """
    target, _, hashes = load_policy_pair(model, "frozen")
    settings = load_config(DrafterTrainConfig, config, set_)
    console.print(f"wrote {train_policy_drafter(target, out, hashes['model'], settings)}")


@policy.command
def run(
    out: Path,
    model: str = BUNDLED,
    drafter: str = "frozen",
    method: Literal["ordinary", "lossless", "relaxed", "ddim"] = "lossless",
    scenes: int = 9,
    tries: int = 8,
    draft_length: int = EvaluationSettings.draft_length,
    relaxation: float = EvaluationSettings.relaxation,
    ddim_steps: int = 10,
    seed: int = 0,
) -> None:
    """Let a policy act; writes OUT/trajectories.png, and OUT/episodes.gif of the first scene.

    Args:
        out: folder of both.
        model: "reach", the bundled policy, or a model.safetensors written by policy train.
        drafter: "frozen", which drafts from the policy's own clean samples; "reach", the bundled learned one; or a
            drafter.safetensors.
        method: what it decides by: DDPM of 100 steps, the same speculated, with relaxation, or DDIM without noise.
        scenes: how many.
        tries: episodes in each, with noise of their own.
        draft_length: rows of a round of the speculative methods.
        relaxation: strength of the relaxed one.
        ddim_steps: steps of DDIM.
        seed: of scenes and noise.
    """
    where = "policy run"
    check_int(where, "scenes", scenes, 1)
    check_int(where, "tries", tries, 1)
    from free_dit.policy.pictures import animation, trajectory_picture

    picture, film = check_writable(where, "out", out / "trajectories.png"), out / "episodes.gif"
    target, chosen, _ = load_policy_pair(model, drafter)
    settings = {
        "ordinary": Method(),
        "lossless": Method("lossless", draft_length=draft_length),
        "relaxed": Method("relaxed", draft_length=draft_length, relaxation=relaxation),
        "ddim": Method("ddim", ddim_steps),
    }
    places = random_scenes(scenes, seed).take(np.repeat(np.arange(scenes), tries))
    episodes = roll_out(places, decider(settings[method], target, chosen), seed)
    reached, calls = int(episodes.reached.sum()), episodes.rounds.sum() / episodes.decisions.sum()
    title = f"{settings[method].name}: {reached} of {len(places)} at the goal, {calls:.1f} network calls per decision"
    trajectory_picture(picture, places, episodes, tries, title)
    animation(film, places, episodes, tries)
    console.print(title)
    console.print(f"wrote {picture} and {film}")


@policy.command
def evaluate(
    out: Path,
    model: str = BUNDLED,
    drafter: str = "frozen",
    settings: Annotated[EvaluationSettings, OmitArgPrefixes] = EvaluationSettings(),
) -> None:
    """Success, laws of actions and milliseconds per decision: ordinary, lossless, relaxed, DDIM with 10 and 16 steps.

    All methods have the same scenes and the same noise. Interrupt it at will: finished parts are kept, and the same
    command goes on; times are measured anew.

    Args:
        out: folder of evaluation.json, evaluation.md and the finished parts.
        model: "reach", the bundled policy, or a model.safetensors written by policy train.
        drafter: "frozen", which drafts from the policy's own clean samples; "reach", the bundled learned one; or a
            drafter.safetensors.
        settings: how to evaluate.
    """
    target, chosen, hashes = load_policy_pair(model, drafter)
    report = Evaluation(target, chosen, settings, out, hashes, progress=True).report()
    page = render(report)
    write_files({out / REPORT: json_bytes(report), out / "evaluation.md": page.encode()})
    console.print(page)
    console.print(f"wrote {out / REPORT} and {out / 'evaluation.md'}")
