"""``python -m free_dit policy``: train, train a drafter, run and evaluate, on a policy of two small blocks."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from free_dit import cli
from free_dit.networks.policy import load_policy
from free_kernels import FeatureDrafter
from free_kernels.checkpoint import load_checkpoint

MODEL = ("model.depth=2", "model.hidden_size=32", "model.condition_size=16", "model.num_heads=1")
TRAIN = (*MODEL, "episodes=12", "batch_size=8", "compile=false", "loop.iterations=4", "loop.checkpoint_every=2")
DRAFTER = ("trajectories=4", "batch_size=8", "calibration_images=2", "drafter.width=8", "drafter.head_dim=8")


@pytest.fixture
def command(monkeypatch, capsys):
    def run(*arguments: object, code: int = 0) -> str:
        monkeypatch.setattr("sys.argv", ["free_dit", "policy", *map(str, arguments)])
        if code:
            with pytest.raises(SystemExit) as left:
                cli.main()
            assert left.value.code == code
        else:
            cli.main()
        shown = capsys.readouterr()
        return shown.out + shown.err

    return run


def test_train_run_and_evaluate(command, tmp_path):
    model, drafter = tmp_path / "model.safetensors", tmp_path / "drafter" / "drafter.safetensors"
    command("train", "--out", tmp_path, "--set", *TRAIN)
    policy = load_policy(model)
    assert policy.config.depth == 2
    assert next(iter(load_checkpoint(model, "policy")[0].values())).dtype == torch.float16
    # The same command again goes on from the end, and writes the same file.
    before = model.read_bytes()
    command("train", "--out", tmp_path, "--set", *TRAIN)
    assert model.read_bytes() == before
    changed = command("train", "--out", tmp_path, "--set", *TRAIN, "batch_size=9", code=2)
    assert "must be of the same configuration, got another batch_size" in changed

    command("train-drafter", "--out", tmp_path / "drafter", "--model", model, "--set", *DRAFTER, "loop.iterations=3")
    read = FeatureDrafter.load(drafter)
    assert read.condition_width == 16
    assert read.config.mixing == "dense"
    assert read.calibration is not None

    pair = ("--model", model, "--drafter", drafter)
    shown = command("run", "--out", tmp_path, *pair, "--scenes", 2, "--tries", 2, "--method", "ddim", "--ddim-steps", 3)
    assert "ddim-3: " in shown
    assert "of 4 at the goal, 3.0 network calls per decision" in shown
    # Without a drafter the policy's own clean samples draft.
    shown = command("run", "--out", tmp_path / "frozen", "--model", model, "--scenes", 1, "--tries", 1)
    assert "lossless: " in shown
    assert Image.open(tmp_path / "trajectories.png").format == "PNG"
    film = Image.open(tmp_path / "episodes.gif")
    assert film.is_animated
    assert film.n_frames > 8

    settings = ("--episodes", 2, "--draft-length", 8, "--observations", 2, "--draws", 2, "--repeats", 1, "--threads", 1)
    shown = command("evaluate", "--out", tmp_path / "evaluation", *pair, *settings)
    report = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    assert set(report["methods"]) == {"ordinary", "lossless", "relaxed", "ddim-10", "ddim-16"}
    assert (tmp_path / "evaluation" / "evaluation.md").read_text().strip() in shown


def test_errors(command, tmp_path):
    wrong = command("train", "--out", tmp_path, "--set", *TRAIN, "model.horizon=8", code=2)
    assert "error: policy train: horizon must be 16, the task's, got 8" in wrong
    assert "path must be an existing file" in command("run", "--out", tmp_path, "--model", "none", code=2)
    assert "scenes must be" in command("run", "--out", tmp_path, "--scenes", 0, code=2)


def test_training_learns(command, tmp_path):
    """The loss falls well below 1, which is that of no answer; without training it stays there."""
    settings = ("episodes=30", "batch_size=32", "loop.iterations=60", "loop.warmup=5", "loop.log_every=20")
    command("train", "--out", tmp_path, "--set", *TRAIN, *settings)
    lines = [line.split(",") for line in (tmp_path / "log.csv").read_text().splitlines()]
    losses = [float(line[lines[0].index("loss")]) for line in lines[1:]]
    assert losses[-1] < 0.5
    command("train", "--out", tmp_path / "not", "--set", *TRAIN, *settings, "loop.learning_rate=0.0")
    lines = [line.split(",") for line in (tmp_path / "not" / "log.csv").read_text().splitlines()]
    assert float(lines[-1][lines[0].index("loss")]) > 0.8
