"""Evaluation of sample sets: what survives an interrupt, what figures say, and the command as a user runs it."""

from __future__ import annotations

import hashlib
import json
import sys

import numpy as np
import pytest
import torch

from free_dit import cli, load_bundled
from free_dit.evaluation import (
    ArraySet,
    EvaluationSettings,
    Statistics,
    evaluate,
    load_extractor,
    open_images,
    open_reference,
    render,
)
from free_dit.generation import GenerateSettings
from free_dit.quality import CLASSIFIER, digit_features, digits_classifier, train_digits_classifier

QUICK = EvaluationSettings(resamples=20, permutations=40, subsets=2)


@pytest.fixture(scope="module")
def pair():
    return load_bundled("digits")


@pytest.fixture(scope="module")
def digits():
    return open_images("digits-test")


def test_the_bundled_classifier_is_the_trained_one():
    digest = hashlib.sha256(CLASSIFIER.read_bytes()).hexdigest()
    assert digest in (CLASSIFIER.parent / "CARD.md").read_text()
    trained = train_digits_classifier().state_dict()
    for name, value in digits_classifier().state_dict().items():
        # Training anew agrees to the rounding of other machines' arithmetic, grown over 440 steps.
        torch.testing.assert_close(trained[name], value, rtol=0.05, atol=0.05)


def test_a_set_against_itself_and_against_noise(digits):
    """Equal sets differ by nothing; noise differs by everything, and every figure says so."""
    real = np.concatenate(list(digits.batches(500)))
    noise = np.random.default_rng(3).integers(0, 256, real.shape).astype(np.uint8)
    sets = {"real": digits, "copy": ArraySet("copy", real, digits.labels), "noise": ArraySet("n", noise, digits.labels)}
    report = evaluate(sets, digits, load_extractor("digits_classifier"), QUICK)
    json.dumps(report, allow_nan=False)
    found = {name: one["metrics"] for name, one in report["sets"].items()}
    ending = "_digits_classifier"
    assert found["real"]["frechet" + ending]["sampled"] == pytest.approx(0, abs=1e-6)
    assert found["real"]["precision" + ending]["value"] == 1
    assert found["real"]["recall" + ending]["value"] == 1
    assert found["real"]["accuracy" + ending]["value"] > 0.97
    assert set(found["real"]["accuracy" + ending]["by_class"]) == set("0123456789")
    assert found["real"]["kernel_distance" + ending]["two_sample_test"]["p_value"] > 0.9
    assert found["noise"]["frechet" + ending]["low"] > 1
    assert found["noise"]["kernel_distance" + ending]["two_sample_test"]["p_value"] == pytest.approx(1 / 41)
    assert found["noise"]["accuracy" + ending]["high"] < 0.4
    same, other = (report["differences"][name] for name in ("copy", "noise"))
    for name in found["real"]:
        assert same[name]["low"] <= 0 <= same[name]["high"], name
    for name in ("precision", "recall", "accuracy", "score"):
        assert other[name + ending]["high"] < 0, name
    for name in ("frechet", "kernel_distance"):
        assert other[name + ending]["low"] > 0, name
    text = render(report)
    assert "`frechet_digits_classifier`" in text
    assert "FID" not in text
    assert "FID" not in json.dumps(report)
    assert evaluate(sets, digits, load_extractor("digits_classifier"), QUICK) == report
    paired = evaluate(sets, digits, load_extractor("digits_classifier"), EvaluationSettings(resamples=20, paired=True))
    assert paired["differences"]["copy"]["frechet" + ending]["high"] == pytest.approx(0, abs=1e-9)
    assert paired["differences"]["copy"]["two_sample_test"] is None


def test_statistics_as_a_reference(tmp_path, digits):
    features = digit_features(torch.from_numpy(next(digits.batches(360)).copy()).permute(0, 3, 1, 2) / 127.5 - 1)
    np.savez(tmp_path / "s.npz", mu=features.mean(0), sigma=np.cov(features.T))
    statistics = open_reference(tmp_path / "s.npz")
    assert isinstance(statistics, Statistics)
    report = evaluate({"real": digits}, statistics, load_extractor("digits_classifier"), QUICK)
    metrics = report["sets"]["real"]["metrics"]
    assert set(metrics) == {f"{name}_digits_classifier" for name in ("frechet", "score", "accuracy")}
    assert metrics["frechet_digits_classifier"]["sampled"] == pytest.approx(0, abs=1e-4)
    with pytest.raises(ValueError, match="must be statistics of 16 features, got 3"):
        evaluate({"real": digits}, Statistics("s", np.zeros(3), np.eye(3)), load_extractor("digits_classifier"), QUICK)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d, e: evaluate({}, d, e), "evaluate: sets must be one or more, got none"),
        (
            lambda d, e: evaluate({"a": ArraySet("a", np.zeros((9, 4, 4, 3), np.uint8))}, d, e),
            r"\[N, 8, 8, 1\] for the",
        ),
        (
            lambda d, e: evaluate({"a": ArraySet("a", np.zeros((4, 8, 8, 1), np.uint8))}, d, e),
            "a must be 5 images or more",
        ),
        (
            lambda d, e: evaluate(
                {"a": d, "b": ArraySet("b", np.zeros((9, 8, 8, 1), np.uint8))}, d, e, EvaluationSettings(paired=True)
            ),
            "paired must be False for sets of different sizes or labels",
        ),
        (lambda d, e: EvaluationSettings(level=1.0), r"level must be in \(0, 1\)"),
        (lambda d, e: EvaluationSettings(resamples=1), r"resamples must be an int in \[2, inf\), got 1"),
        (lambda d, e: GenerateSettings(shard=0), r"shard must be an int in \[1, inf\), got 0"),
        (lambda d, e: load_extractor("vgg"), "extractor must be one of 'digits_classifier', 'inception_v3'"),
        (
            lambda d, e: load_extractor("inception_v3"),
            "weights must be torch-fidelity's Inception weights, a local file",
        ),
    ],
)
def test_wrong_arguments_are_named(digits, call, message):
    with pytest.raises(ValueError, match=message):
        call(digits, load_extractor("digits_classifier"))


@pytest.fixture
def command(monkeypatch):
    """The command in this process, on a rank of two."""

    def run(*arguments: object, rank: int = 0, ranks: int = 1) -> None:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(ranks))
        monkeypatch.setattr(sys, "argv", ["free_dit", "evaluate", *map(str, arguments)])
        cli.main()

    return run


def test_the_command_draws_on_two_ranks_and_compares(tmp_path, command, capsys):
    quick = ("--resamples", 20, "--permutations", 20, "--subsets", 2)
    drawn = ("--steps", 4, "--draft-length", 2, "--shard", 4, "--generate", 12, "--out", tmp_path / "a", *quick)
    command(*drawn, rank=0, ranks=2)
    assert "others lack 1 of 3 shards" in capsys.readouterr().out
    assert not (tmp_path / "a" / "evaluation.json").exists()
    # The rank that ends last evaluates; where all was there already, rank 0 does.
    command(*drawn, rank=1, ranks=2)
    report = json.loads((tmp_path / "a" / "evaluation.json").read_text())
    assert report["sets"]["samples"]["images"] == 12
    assert report["sets"]["samples"]["sampling"]["call_reduction"] >= 1
    assert (tmp_path / "a" / "evaluation.md").read_text() == render(report)
    (tmp_path / "a" / "evaluation.json").unlink()
    command(*drawn, rank=1, ranks=2)
    assert not (tmp_path / "a" / "evaluation.json").exists()
    command(*drawn, rank=0, ranks=2)
    assert json.loads((tmp_path / "a" / "evaluation.json").read_text()) == report
    pixels = next(open_images("digits-train").batches(50))
    np.savez(tmp_path / "real.npz", arr_0=pixels)
    sets = (f"real={tmp_path / 'real.npz'}", f"drawn={tmp_path / 'a' / 'samples'}")
    command("--out", tmp_path / "b", "--sets", *sets, *quick)
    report = json.loads((tmp_path / "b" / "evaluation.json").read_text())
    assert report["compared_with"] == "real"
    assert list(report["differences"]) == ["drawn"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "evaluate: sets must be given (NAME=PATH ...), or --generate N, got none"),
        (("--sets", "a=none.npz"), "evaluate: none.npz must be an .npz, a folder"),
        (("--sets", "a=x", "a=y"), "evaluate: sets must be of different names"),
        (("--generate", "4", "--device", "abacus"), "evaluate: device must be 'auto' or a torch device"),
        (("--generate", "4", "--reference", "none"), "evaluate: none must be an .npz, a folder"),
        (("--generate", "4", "--extractor", "inception_v3"), "evaluate: weights must be torch-fidelity's"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(tmp_path, arguments, message, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["free_dit", "evaluate", "--out", "out", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ")
    assert message in line
