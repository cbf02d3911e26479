"""The drafter study at toy size: variants are trained, measured, kept and not done twice."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

import free_dit
from free_dit import DiT, DiTConfig
from free_dit.configuration import load_config
from free_dit.experiments import drafter_study as study
from free_dit.experiments.drafter_study import VARIANTS, render_study, run_study
from free_dit.loading import load_pair
from free_dit.train_drafter import DrafterTrainConfig
from free_kernels import DiTTarget

SETTINGS = (
    "num_steps=14",
    "batch_size=4",
    "trajectories=3",
    "compile=false",
    "calibration_images=0",
    "loop.iterations=2",
    "drafter.width=32",
)


@pytest.fixture(scope="module")
def target():
    torch.manual_seed(0)
    return DiTTarget(DiT(DiTConfig(8, 4, 1, 32, 2, 2, 3)).eval().requires_grad_(False))


def test_study_runs_once_and_renders(target, tmp_path, monkeypatch):
    names = ("as configured", "window 2", "feature regression")
    path = run_study(target, "toy", None, SETTINGS, tmp_path, names, 3)
    report = json.loads(path.read_text())
    assert list(report["rows"]) == ["frozen", *names]
    for name, row in report["rows"].items():
        assert all(0 <= value <= 1 for value in row["by_lookahead"])
        assert all(1 <= value <= 12 and math.isfinite(value) for value in row["call_reduction"].values())
        assert (row["call_cost"] > 0) == (name != "frozen")
    assert render_study(report).count("\n| ") == 1 + len(report["rows"])

    trained = []
    original = study.train_drafter
    monkeypatch.setattr(study, "train_drafter", lambda *given: trained.append(given[2].name) or original(*given))
    run_study(target, "toy", None, SETTINGS, tmp_path, (*names, "unroll 1"), 3)
    assert trained == ["unroll_1"]
    assert list(json.loads(path.read_text())["rows"]) == ["frozen", *names, "unroll 1"]
    with pytest.raises(ValueError, match="^study: out must be a folder of the study"):
        run_study(target, "toy", None, SETTINGS, tmp_path, names, 4)
    # The same folder and overrides, but another file.
    config = tmp_path / "other.toml"
    config.write_text("late = 0.5\n")
    with pytest.raises(ValueError, match="^study: out must be a folder of the study"):
        run_study(target, "toy", config, SETTINGS, tmp_path, names, 3)
    torch.manual_seed(1)
    others = DiTTarget(DiT(target.module.config).eval().requires_grad_(False))
    with pytest.raises(ValueError, match="^study: out must be a folder of the study"):
        run_study(others, "toy", None, SETTINGS, tmp_path, names, 3)


def test_noised_digits_are_left_out_where_they_do_not_fit(target):
    flow = load_pair("digits_sit", "none")[0]
    wide = DiTTarget(DiT(DiTConfig(16, 4, 1, 32, 2, 2, 10)).eval())
    few = DiTTarget(DiT(DiTConfig(8, 4, 1, 32, 2, 2, 9)).eval())
    for one in (flow, wide, few):
        assert set(VARIANTS) - set(study._fitting(one)) == {"forward-noised data"}
    assert study._fitting(load_pair("digits", "none")[0]) == list(VARIANTS)


def test_wrong_arguments_are_named(target, tmp_path):
    with pytest.raises(ValueError, match="^study: variants must be among .*, got 'depth 9'"):
        run_study(target, "toy", None, SETTINGS, tmp_path, ("depth 9",), 3)
    with pytest.raises(ValueError, match="^study: images must be"):
        run_study(target, "toy", None, SETTINGS, tmp_path, (), 1)
    assert not any(tmp_path.iterdir())


def test_every_variant_differs_from_the_configuration_under_study():
    path = Path(free_dit.__file__).parent / "configs" / "study_drafter.toml"
    plain = load_config(DrafterTrainConfig, path)
    for overrides in VARIANTS.values():
        assert (load_config(DrafterTrainConfig, path, overrides) != plain) == bool(overrides)
