"""The command line as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from free_dit import load_bundled
from free_dit.cli import main
from free_kernels import DDPMSchedule, ancestral_sample


def run(*arguments: object, check: bool = True) -> subprocess.CompletedProcess:
    # A fixed wide terminal, so that messages are not broken over lines.
    environment = {**os.environ, "COLUMNS": "200"}
    command = [sys.executable, "-m", "free_dit", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    if check:
        assert result.returncode == 0, result.stderr
    return result


def test_help_lists_the_commands():
    text = run("--help").stdout
    commands = (
        "train train-drafter sample generate compare evaluate feasibility figures sweep study scale-model info card"
    )
    for command in commands.split():
        assert command in text


def test_info():
    facts = json.loads(run("info").stdout)
    assert facts["model"] == "digits"
    assert facts["latent_shape"] == [1, 8, 8]
    assert facts["learns_variance"] is True
    assert facts["parameters"] > 1_000_000


def test_sampling_to_both_formats(tmp_path):
    common = ("--num", 6, "--steps", 20, "--seed", 3)
    run("sample", "--out", tmp_path / "a.npz", *common)
    run("sample", "--out", tmp_path / "b.npz", *common, "--drafter", "none", "--classes", 1, 7)
    run("sample", "--out", tmp_path / "c.png", *common, "--drafter", "frozen", "--guidance", 2, "--max-slots", 4)
    pixels, labels = np.load(tmp_path / "a.npz").values()
    assert pixels.dtype == np.uint8
    assert pixels.shape == (6, 8, 8, 1)
    assert labels.tolist() == [0, 1, 2, 3, 4, 5]
    pixels, labels = np.load(tmp_path / "b.npz").values()
    assert labels.tolist() == [1, 7] * 3
    target, _ = load_bundled("digits")
    expected = ancestral_sample(target, torch.from_numpy(labels), schedule=DDPMSchedule(20), seed=3).samples
    shown = ((expected.clamp(-1, 1) + 1) * 127.5).round()
    assert np.abs(pixels[..., 0] - shown[:, 0].numpy()).max() <= 1
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_comparison_writes_pictures_and_figures(tmp_path):
    text = run("compare", "--out", tmp_path, "--num", 4, "--steps", 20, "--timing-pairs", 1).stdout
    assert "learned drafter" in text
    assert "reduction" in text
    report = json.loads((tmp_path / "compare.json").read_text())
    assert report["runs"]["ordinary"]["target_calls"] == 20
    assert report["runs"]["learned drafter"]["call_reduction"] > 1
    timed = [(ratio["sampler"], ratio["batch"]) for ratio in report["wall_clock_ratios"]]
    assert timed == [("frozen drafter", 1), ("learned drafter", 1), ("learned drafter", 4)]
    for name in ("samples.png", "acceptance.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_feasibility_writes_a_table_a_plot_and_json(tmp_path):
    small = ("--steps", 20, "--lengths", 2, 4, "--positions", 2, "--timing-repeats", 2)
    check = ("--check", 4, "--check-images", 2)
    text = run("feasibility", "--out", tmp_path, "--drafter", "bundled", *small, *check).stdout
    assert "seen once" in text
    assert "steps a call" in text
    report = json.loads((tmp_path / "feasibility.json").read_text())
    assert report["verdict"] in text
    assert [one["draft_length"] for one in report["drafters"]["learned"]["lengths"]] == [2, 4]
    assert [one["drafter"] for one in report["runs"]] == ["frozen", "learned"]
    assert (tmp_path / "feasibility.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("feasibility", "--out", "x", "--model", "denoiser-65"), "model must be denoiser-SIZE with SIZE in [1, 64]"),
        (("feasibility", "--out", "x", "--check", "1"), "check must be an int in [2, 250], got 1"),
        (("sample", "--out", "x.gif"), "sample: out must end in .png or .npz, got x.gif"),
        (("sample", "--out", "/proc/none/x.png"), "sample: out must be a writable file path"),
        (("sample", "--out", "x.png", "--classes", "11"), "class_labels must be int64 [N] in [0, 10)"),
        (("sample", "--out", "x.png", "--num", "0"), "num must be an int in [1, inf), got 0"),
        (("sample", "--out", "x.png", "--model", "none.safetensors"), "path must be an existing file"),
        (("sample", "--out", "x.png", "--drafter", "none.safetensors"), "path must be an existing file"),
        (
            ("sample", "--out", "x.png", "--steps", "5", "--draft-length", "6"),
            "draft_length must be an int in [1, 5], got 6",
        ),
        (("info", "none.pt", "--num-heads", "4"), "path must be an existing file"),
        (("info", "digits", "--num-heads", "4"), "num_heads must be None for digits, which says it itself, got 4"),
        (("sweep", "--out", "x", "--device", "abacus"), "sweep: device must be 'auto' or a torch device, got 'abacus'"),
        (("train", "--out", "/proc/none/x"), "train: out must be a writable file path"),
        (("train", "--out", "x", "--set", "batch_size=0"), "batch_size must be an int in [1, inf), got 0"),
        (("train", "--out", "x", "--config", "none.toml"), "config must be an existing TOML file"),
    ],
)
def test_mistakes_are_one_line(tmp_path, arguments, message, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", ["free_dit", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert message in said[-1]
    assert said[-1].startswith("error: ")


def test_a_mistake_ends_the_process_without_a_traceback(tmp_path):
    result = run("sample", "--out", tmp_path / "x.gif", check=False)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith("error: sample: out must end in .png or .npz")
