"""Analysis figures: measurements with known answers, and the whole command on a tiny run."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
import scipy.stats
import torch
from analytic import DETECTED, FALSE_ALARM
from test_cli import run

from free_dit import DiT, DiTConfig, load_bundled
from free_dit.experiments.analysis import (
    Settings,
    Subject,
    coupling_draws,
    feature_dynamics,
    parts_of_chain,
    pooled_mean,
    timeline,
)
from free_dit.experiments.analysis_plots import NAMES, write_figures
from free_dit.files import plain
from free_dit.networks.families import save_model
from free_kernels import DDPMSchedule, DiTTarget, ancestral_sample

CONFIG = DiTConfig(input_size=4, patch_size=2, in_channels=1, hidden_size=16, depth=3, num_heads=2, num_classes=3)
STEPS = 12
LABELS = torch.arange(4) % 3


def tiny_dit(randomised: bool = True) -> DiT:
    """A DiT at initialisation, where every block is the identity, or with random weights throughout."""
    generator = torch.Generator().manual_seed(0)
    model = DiT(CONFIG).eval().requires_grad_(False)
    if randomised:
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def test_identity_blocks_change_nothing():
    dynamics = feature_dynamics(DiTTarget(tiny_dit(randomised=False)), DDPMSchedule(STEPS), LABELS, seed=0)
    assert dynamics.change.shape == dynamics.relative_change.shape == (CONFIG.depth, STEPS)
    assert not dynamics.change.any()
    assert not dynamics.relative_change.any()
    # Every block then hands on the embedded state, which does move.
    assert np.allclose(dynamics.similarity, dynamics.similarity[0])
    assert dynamics.similarity[0, 0] < 0.95


def test_constant_features_are_alike():
    """Patches embedded to zero and no timestep in the modulations: features are the positions always."""
    model = tiny_dit()
    for parameter in (*model.x_embedder.parameters(), *model.t_embedder.parameters()):
        parameter.zero_()
    dynamics = feature_dynamics(DiTTarget(model), DDPMSchedule(STEPS), LABELS, seed=0)
    assert dynamics.similarity.shape == (CONFIG.depth, STEPS - 1)
    assert np.allclose(dynamics.similarity, 1.0, atol=1e-6)
    assert np.allclose(dynamics.output_similarity, 1.0, atol=1e-6)
    assert np.allclose(dynamics.change, dynamics.change[:, :1])
    assert dynamics.relative_change.min() > 0


class ByHand(DiTTarget):
    """The blocks called one by one, everything kept."""

    def __init__(self, module: DiT) -> None:
        # Before the target is compared with the module, which calls it.
        self.inner: list[list[torch.Tensor]] = []
        self.outputs: list[torch.Tensor] = []
        super().__init__(module)

    def hoisted(self, timesteps, labels):
        return self

    def features(self, x, t, y):
        conditioning = self.module.t_embedder(t) + self.module.y_embedder(y)
        inner = [self.module.x_embedder(x) + self.module.pos_embed]
        for block in self.module.blocks:
            inner.append(block(inner[-1], conditioning))
        self.inner.append(inner)
        return inner[-1]

    def head(self, h, t, y):
        self.outputs.append(super().head(h, t, y))
        return self.outputs[-1]

    def _head_parts(self):
        """None: the head as it is called where nothing is hoisted, to the last bit."""


def test_dynamics_equal_those_of_blocks_called_by_hand():
    model, schedule = tiny_dit(), DDPMSchedule(STEPS)
    by_hand = ByHand(model)
    by_hand.inner.clear()
    by_hand.outputs.clear()
    ancestral_sample(by_hand, LABELS, schedule=schedule, seed=3)
    dynamics = feature_dynamics(DiTTarget(model), schedule, LABELS, seed=3)
    inner = np.array([[h.flatten(1).double().numpy() for h in step] for step in by_hand.inner])  # [K, B + 1, N, T D]
    norm = np.linalg.norm(inner, axis=-1)
    change = np.linalg.norm(np.diff(inner, axis=1), axis=-1)
    cosine = (inner[1:] * inner[:-1]).sum(-1) / (norm[1:] * norm[:-1])
    assert np.allclose(dynamics.change, change.mean(-1).T, rtol=1e-9)
    assert np.allclose(dynamics.relative_change, (change / norm[:, :-1]).mean(-1).T, rtol=1e-9)
    assert np.allclose(dynamics.similarity, cosine.mean(-1)[:, 1:].T, rtol=1e-9)
    noise = np.array([output[:, : CONFIG.in_channels].flatten(1).double().numpy() for output in by_hand.outputs])
    norm = np.linalg.norm(noise, axis=-1)
    cosine = (noise[1:] * noise[:-1]).sum(-1) / (norm[1:] * norm[:-1])
    assert np.allclose(dynamics.output_similarity, cosine.mean(-1), rtol=1e-9)
    assert not any(block._forward_hooks for block in model.blocks), "hooks are taken off again"


def test_dynamics_need_blocks_and_two_steps():
    with pytest.raises(TypeError, match="feature_dynamics: target must be an adapter of a DiT, with module.blocks"):
        feature_dynamics(object(), DDPMSchedule(STEPS), LABELS, seed=0)
    with pytest.raises(ValueError, match=r"num_steps must be an int in \[2, inf\), got 1"):
        feature_dynamics(DiTTarget(tiny_dit()), DDPMSchedule(1), LABELS, seed=0)


@pytest.mark.parametrize(
    ("num_steps", "share", "early", "late"), [(250, 0.2, (0, 50), (200, 250)), (3, 0.2, (0, 1), (2, 3))]
)
def test_parts_of_the_chain(num_steps, share, early, late):
    assert parts_of_chain(num_steps, share) == (slice(*early), slice(*late))


def test_pooled_means():
    values = np.array([np.nan, 1.0, 2.0, np.nan, 6.0, np.nan])
    weights = np.array([0, 1, 3, 0, 1, 0])
    pooled = pooled_mean(values, weights, 3)
    assert np.allclose(pooled, [np.nan, 7 / 4, 7 / 4, 12 / 4, 6.0, np.nan], equal_nan=True)
    assert np.allclose(pooled_mean(values, weights, 99)[1:5], 13 / 5)
    assert np.array_equal(pooled_mean(values, weights, 1), np.where(weights > 0, values, np.nan), equal_nan=True)
    assert np.isnan(pooled_mean(values, np.zeros(6, int), 3)).all()
    with pytest.raises(ValueError, match="width must be odd and positive, got 4"):
        pooled_mean(values, weights, 4)


@pytest.mark.parametrize("gap", [0.3, 1.5, 3.0])
def test_coupling_draws_have_the_target_law(gap):
    draws = coupling_draws(gap, 20_000, seed=4)
    expected = 2 * scipy.stats.norm.cdf(-gap / 2)
    assert draws.expected_acceptance == pytest.approx(expected)
    # Share within the normal bound of a binomial of this size, false alarm FALSE_ALARM.
    bound = scipy.stats.norm.isf(FALSE_ALARM / 2) * math.sqrt(expected * (1 - expected) / len(draws.drafts))
    assert abs(draws.accepted.mean() - expected) < bound
    assert scipy.stats.kstest(draws.drafts, "norm").pvalue > FALSE_ALARM
    assert scipy.stats.kstest(draws.committed, "norm", (gap, 1)).pvalue > FALSE_ALARM
    fresh = gap + np.random.default_rng(0).standard_normal(len(draws.drafts))
    spoiled = np.where(draws.accepted, draws.committed, fresh)
    assert scipy.stats.kstest(spoiled, "norm", (gap, 1)).pvalue < DETECTED, "a fresh target draw is not a reflection"
    assert np.array_equal(draws.committed[draws.accepted], draws.drafts[draws.accepted])
    refused = ~draws.accepted
    assert np.allclose(draws.committed[refused], gap - draws.drafts[refused], atol=1e-5)


def test_coupling_without_a_gap_accepts_everything():
    draws = coupling_draws(0.0, 500, seed=4)
    assert draws.accepted.all()
    assert draws.expected_acceptance == 1.0


@pytest.mark.parametrize("kind", ["frozen", "learned"])
@pytest.mark.parametrize("draft_length", [1, 4])
def test_timeline_totals_are_the_sampler_s_own(kind, draft_length):
    target, learned = load_bundled("digits")
    drafter = "frozen" if kind == "frozen" else learned
    steps = 30
    line = timeline(target, DDPMSchedule(steps), torch.arange(5), drafter, draft_length, seed=2)
    rounds = [one for image in line.images for one in image]
    assert [len(image) for image in line.images] == line.stats.rounds_per_image.tolist()
    assert sum(one.rows for one in rounds) == line.stats.target_rows
    tested, accepted = np.zeros(steps, int), np.zeros(steps, int)
    for one in rounds:
        accepted[one.first_step : one.first_step + one.accepted] += 1
        tested[one.first_step : one.first_step + one.accepted + one.refused] += 1
        assert one.accepted + one.refused + one.discarded == one.rows - 1
        assert min(one.accepted, one.refused, one.discarded) >= 0
    assert np.array_equal(tested, line.stats.tested_by_step)
    assert np.array_equal(accepted, line.stats.accepted_by_step)
    for image in line.images:
        assert [one.first_step for one in image] == np.cumsum([0] + [one.committed for one in image])[:-1].tolist()
        assert sum(one.committed for one in image) == steps
        assert [one.round for one in image] == list(range(len(image)))
    if draft_length > 1:
        assert sum(one.discarded for one in rounds) > 0


def test_plain_values():
    values = {"a": np.array([[1.0, np.nan], [np.inf, 1 / 3]]), 2: np.int64(5), "c": (True, None, "x")}
    assert plain(values) == {"a": [[1.0, None], [None, 0.333333]], "2": 5, "c": [True, None, "x"]}


def test_command_writes_every_figure_for_several_models(tmp_path):
    save_model(tmp_path / "other" / "model.safetensors", tiny_dit())
    small = ("--num", 2, "--steps", STEPS, "--draft-length", 4, "--guidance", 1, 2, "--seed", 1)
    out = tmp_path / "figures"
    result = run("figures", "--out", out, "--model", "digits", tmp_path / "other" / "model.safetensors", *small)
    assert "wrote" in result.stdout
    assert sorted(path.name for path in out.iterdir()) == sorted(f"{n}.{end}" for n in NAMES for end in ("png", "json"))
    data = {}
    for name in NAMES:
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        data[name] = json.loads((out / f"{name}.json").read_text(), parse_constant=pytest.fail)
    assert np.array(data["temporal_similarity"]["dynamics"]["similarity"]).shape == (16, STEPS - 1)
    assert len(data["layer_change"]["change"]["early"]) == 16
    runs = data["uncertainty"]["runs"]
    assert [(one["model"], one["drafter"], one["guidance_scale"]) for one in runs] == [
        *[("digits", drafter, scale) for scale in (1, 2) for drafter in ("frozen", "learned")],
        *[("other", "frozen", scale) for scale in (1, 2)],
    ]
    for one in runs:
        assert [value is None for value in one["uncertainty"]] == [count == 0 for count in one["tested"]]
    assert data["reflection_coupling"]["ks_p_value"] > FALSE_ALARM
    for line in data["timeline"]["drafters"].values():
        assert [len(image) for image in line["images"]] == line["rounds_per_image"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num": 0}, "figures: num must be an int in [1, inf), got 0"),
        ({"draft_length": 1}, "figures: draft_length must be an int in [2, inf), got 1"),
        ({"steps": 5}, "figures: steps must be an int in [6, inf), got 5"),
        ({"guidance": ()}, "figures: guidance must be some scales"),
        ({"guidance": (-1.0,)}, "guidance_scale must be a finite number in [0, inf), got -1"),
    ],
)
def test_wrong_settings(tmp_path, changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        write_figures(tmp_path, [Subject("tiny", DiTTarget(tiny_dit()))], Settings(**changes))
    with pytest.raises(ValueError, match="figures: model must be at least one, got none"):
        write_figures(tmp_path, [])


def test_a_mistake_is_one_line(tmp_path):
    result = run("figures", "--out", tmp_path, "--drafter", "frozen", "frozen", check=False)
    assert result.returncode == 2
    assert result.stderr.splitlines() == ["error: figures: drafter must be one for each of 1 models, got 2"]
