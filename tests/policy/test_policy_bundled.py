"""The shipped policy and its drafter: their files, what they reach, and the law of their actions."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import mutations
import numpy as np
import pytest
import torch
from call_by_call import play_call_by_call

import free_kernels.sampling.round
from free_dit.bundled import bundled_names
from free_dit.policy import load_bundled_policy, task
from free_dit.policy.distances import energy_distance
from free_dit.policy.evaluate import EvaluationSettings
from free_dit.policy.methods import Method, chunks, decider
from free_dit.policy.page import render
from free_dit.policy.pair import FOLDER
from free_dit.policy.rollout import roll_out
from free_dit.policy.world import random_scenes

DOCS = Path(__file__).parents[2] / "docs"
# Scenes that neither training nor the evaluation has seen.
NEW_SEED = 1 << 22
LOSSLESS = Method("lossless", draft_length=EvaluationSettings.draft_length)


@pytest.fixture(scope="module")
def pair():
    return load_bundled_policy()


def first_observations(count: int) -> torch.Tensor:
    """What is seen before the first step, where both sides are open."""
    return task.first_observations(random_scenes(count, NEW_SEED))


def test_the_files_are_those_of_the_card():
    card, size = (FOLDER / "MODEL_CARD.md").read_text(), 0
    for name in ("policy.safetensors", "drafter.safetensors"):
        data = (FOLDER / name).read_bytes()
        assert f"| `{name}` | {len(data)} | `{hashlib.sha256(data).hexdigest()}` |" in card
        size += len(data)
    assert size < 4_000_000
    assert "policy" not in bundled_names(), "it is no DiT of images"


def test_shapes(pair):
    target, drafter = pair
    assert target.latent_shape == drafter.latent_shape == (16, 2)
    assert target.module.config.depth == 12
    assert drafter.condition_width == target.module.config.condition_size
    # A small drafter costs far less than the target.
    sizes = [sum(p.numel() for p in module.parameters()) for module in (target.module, drafter)]
    assert sizes[1] < sizes[0] / 5


@pytest.mark.slow
def test_it_reaches_the_goal_on_both_sides(pair):
    episodes = roll_out(random_scenes(40, NEW_SEED), decider(LOSSLESS, *pair), 7)
    # The evaluation's 500 episodes say more; with a rate of 0.9, 30 of 40 are missed with a chance of 0.2 %.
    assert episodes.reached.sum() >= 30
    assert 8 <= (episodes.side == 1).sum() <= 32
    # Negative control: an agent that does not look gets nowhere.
    blind = roll_out(random_scenes(10, NEW_SEED), lambda o, n: decider(Method("ddim", 4), *pair)(0 * o, n), 7)
    assert blind.reached.mean() < 0.5


@pytest.mark.slow
def test_one_scene_has_both_answers(pair):
    """From one observation chunks leave to the left and to the right: the modes have the middle between them."""
    seen = first_observations(6)
    left = []
    for one in seen:
        drawn, _ = chunks(decider(LOSSLESS, *pair), one.expand(24, -1, -1), 3, torch.arange(24))
        left.append(float((drawn[:, -1, 1] > 0).float().mean()))
    assert np.mean([0.1 < share < 0.9 for share in left]) >= 0.5


@pytest.mark.slow
def test_lossless_actions_have_the_ordinary_law(pair, monkeypatch):
    """Chunk by chunk at eight observations, with a sampler that keeps every draft as the negative control."""
    observations, keys = first_observations(8), torch.arange(30)

    def drawn(method, drafter, seed):
        decide = decider(method, pair[0], drafter)
        return np.stack(
            [
                chunks(decide, one.expand(len(keys), -1, -1), seed + place, keys)[0].numpy()
                for place, one in enumerate(observations)
            ]
        )

    ordinary = drawn(Method(), "frozen", 100)
    assert energy_distance(ordinary, drawn(LOSSLESS, pair[1], 200), permutations=999)[1] > 2e-3
    assert energy_distance(ordinary, drawn(LOSSLESS, "frozen", 300), permutations=999)[1] > 2e-3
    play_call_by_call(monkeypatch)
    monkeypatch.setattr(free_kernels.sampling.round, "couple", mutations.always_accept)
    # Of a drafter whose drafts are seldom right.
    assert energy_distance(ordinary, drawn(LOSSLESS, lambda feature, *_: feature, 300), permutations=999)[1] <= 2e-3


@pytest.mark.slow
def test_call_reduction(pair):
    observations = first_observations(24)
    decide = {
        name: decider(LOSSLESS, pair[0], drafter) for name, drafter in (("learned", pair[1]), ("frozen", "frozen"))
    }
    reduction = {
        name: chunks(one, observations, 11, torch.arange(24))[1].stats.call_reduction for name, one in decide.items()
    }
    assert reduction["learned"] > reduction["frozen"] > 8


@pytest.mark.skipif(not DOCS.exists(), reason="needs the source checkout")
def test_the_page_is_made_of_the_evaluation():
    report = json.loads((DOCS / "policy" / "evaluation.json").read_text())
    assert render(report).strip() in (DOCS / "policies.md").read_text()
    assert report["settings"]["episodes"] == 500
    policy = hashlib.sha256((FOLDER / "policy.safetensors").read_bytes()).hexdigest()
    assert report["identity"] == {"model": policy, "drafter": "frozen"}
