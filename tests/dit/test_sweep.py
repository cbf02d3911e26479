"""The trade-off table: its statistics against known laws, its resumption, and a small run of the command."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.stats import binom

from free_dit import cli
from free_dit.data import load_digits
from free_dit.experiments import sweep
from free_dit.experiments.sweep import Cell, SweepSettings, full_cells, preset, quick_cells, read_sweep, run_sweep
from free_dit.experiments.sweep_page import METRIC, render, write_report
from free_dit.quality import (
    class_accuracy,
    digit_features,
    digits_classifier,
    frechet_distance,
    frechet_interval,
    frechet_of_moments,
)

TINY = SweepSettings(num=20, num_calls=2, timing_pairs=1, resamples=20)
CELLS = [
    Cell("none", num_steps=20, quality=True),
    Cell("learned", "token", 4, num_steps=20, quality=True),
    Cell("frozen", "block", "auto", num_steps=20),
    Cell("learned", "token", 4, relaxation=1.0, num_steps=20, guidance=2.0),
    Cell("ddim", num_steps=10, quality=True),
]


def test_frechet_distance_of_gaussians_in_closed_form():
    generator = np.random.default_rng(0)
    mean_a, mean_b = generator.normal(size=(2, 6))
    # Where covariances commute the root is elementwise; else scipy's root of the (unsymmetric) product is the oracle.
    diagonal_a, diagonal_b = generator.uniform(0, 3, (2, 6))
    expected = ((mean_a - mean_b) ** 2).sum() + ((np.sqrt(diagonal_a) - np.sqrt(diagonal_b)) ** 2).sum()
    assert frechet_of_moments(mean_a, np.diag(diagonal_a), mean_b, np.diag(diagonal_b)) == pytest.approx(expected)
    roots = generator.normal(size=(2, 6, 6))
    a, b = roots @ roots.swapaxes(1, 2)
    expected = ((mean_a - mean_b) ** 2).sum() + np.trace(a + b - 2 * np.real(sqrtm(a @ b)))
    assert frechet_of_moments(mean_a, a, mean_b, b) == pytest.approx(expected)
    singular = np.outer(mean_a, mean_a)
    assert frechet_of_moments(mean_a, singular, mean_a, singular) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_of_samples():
    generator = np.random.default_rng(1)
    a, b = 1.5 * generator.normal(size=(60_000, 3)) + 1.0, generator.normal(size=(60_000, 3))
    # 3 (1^2 + 0.5^2); the standard error of this many samples is about 0.02.
    assert frechet_distance(a, b) == pytest.approx(3.75, abs=0.1)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a))


def coverage(mean: float, scale: float, runs: int) -> tuple[int, int]:
    """How often the interval holds the distance of the laws, and how often quantiles of resampled distances do."""
    generator, width, hits, percentile_hits = np.random.default_rng(2), 4, 0, 0
    truth = width * (mean**2 + (scale - 1) ** 2)
    for run in range(runs):
        a = scale * generator.normal(size=(80, width)) + mean
        b = generator.normal(size=(120, width))
        estimate = frechet_interval(a, b, resamples=200, seed=run)
        sampled = frechet_distance(a, b)
        hits += estimate.low <= truth <= estimate.high
        percentile_hits += 2 * sampled - estimate.high <= truth <= 2 * sampled - estimate.low
    return hits, percentile_hits


def test_the_interval_covers_at_its_level():
    runs = 300
    # Both tails at a false-alarm rate of 1e-4 each, with a percent for the bootstrap's own error in small samples.
    fewest, most = binom.ppf(1e-4, runs, 0.94), binom.isf(1e-4, runs, 0.96)
    hits, _ = coverage(0.8, 1.3, runs)
    assert fewest <= hits <= most
    # Where the laws hardly differ it is conservative, and plain quantiles, which ignore the bias, are useless.
    hits, percentile_hits = coverage(0.05, 1.0, runs)
    assert hits >= fewest
    assert percentile_hits < runs / 10


def test_strata_leave_out_the_chance_in_their_sizes():
    generator = np.random.default_rng(3)
    labels = np.arange(200) % 4
    a, b = (10.0 * np.eye(4)[labels] + generator.normal(size=(200, 4)) for _ in range(2))
    within = frechet_interval(a, b, strata_a=labels, strata_b=labels)
    across = frechet_interval(a, b)
    assert within.high - within.low < (across.high - across.low) / 2
    assert within == frechet_interval(a, b, strata_a=labels, strata_b=labels)


def test_the_classifier_reads_held_out_digits():
    data = load_digits("test")
    accuracy = class_accuracy(data.images, data.labels)
    assert accuracy.value >= 0.96
    assert accuracy.low < accuracy.value < accuracy.high
    features = digit_features(data.images)
    assert features.shape == (len(data.labels), 16)
    assert features.dtype == np.float64
    noise = torch.randn(200, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert frechet_interval(digit_features(noise), features).low > frechet_interval(features[::2], features[1::2]).high
    assert class_accuracy(noise, torch.arange(200) % 10).high < 0.3


def test_the_classifier_is_the_same_every_time():
    weights = {name: value.clone() for name, value in digits_classifier().state_dict().items()}
    digits_classifier.cache_clear()
    torch.manual_seed(7)
    state = torch.get_rng_state()
    for name, value in digits_classifier().state_dict().items():
        assert torch.equal(value, weights[name]), name
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: digit_features(torch.zeros(3, 8, 8)), r"digit_features: images must be floating point \[N, 1, 8, 8\]"),
        (lambda: digit_features(torch.full((2, 1, 8, 8), torch.nan)), "images must be finite, got 128 elements"),
        (lambda: class_accuracy(torch.zeros(3, 1, 8, 8), torch.zeros(2).long()), r"labels must be int64 \[3\]"),
        (lambda: frechet_distance(np.zeros((1, 4)), np.zeros((9, 4))), r"features_a must be \[N, D\] with N >= 2"),
        (lambda: frechet_distance(np.zeros((9, 4)), np.zeros((9, 5))), r"features_b must be \[N, 4\] with N >= 2"),
        (lambda: frechet_distance(np.zeros((9, 4)), np.full((9, 4), np.inf)), "features_b must be finite"),
        (lambda: frechet_interval(np.zeros((9, 4)), np.zeros((9, 4)), level=1.0), r"level must be in \(0, 1\)"),
        (
            lambda: frechet_interval(np.zeros((2, 4)), np.zeros((2, 4)), strata_a=np.arange(2)),
            "strata_a must be two rows or more of every stratum, got 1 of one",
        ),
        (lambda: SweepSettings(num=10), r"sweep: num must be an int in \[20, inf\), got 10"),
        (lambda: preset("half"), "sweep: preset must be one of 'quick', 'full'"),
        (lambda: run_sweep(Path("x"), [CELLS[0], CELLS[0]], TINY), "sweep: cells must be one or more, of different"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_presets_have_distinct_keys_and_a_baseline_for_every_chain():
    for cells in (full_cells(), quick_cells()):
        assert len({cell.key for cell in cells}) == len(cells)
        baselines = {(cell.num_steps, cell.guidance) for cell in cells if cell.drafter == "none"}
        drafted = {(cell.num_steps, cell.guidance) for cell in cells if cell.drafter in ("frozen", "learned")}
        assert drafted == baselines
        assert all(cell.quality for cell in cells if cell.drafter in ("none", "ddim"))
    assert {cell.num_steps for cell in full_cells() if cell.drafter == "ddim"} == {20, 50}
    assert Cell("learned", "block", "auto", num_steps=50, guidance=2.0).key == "learned-block-Lauto-r0-K50-g2"


@pytest.fixture
def counted(monkeypatch):
    """Cells measured, in order; the third one is interrupted the first time."""
    calls: list[str] = []

    def measure(target, drafter, cell, settings):
        calls.append(cell.key)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return {"key": cell.key, "cell": sweep.asdict(cell)}

    monkeypatch.setattr(sweep, "measure_cell", measure)
    return calls


def test_an_interrupted_sweep_goes_on_where_it_stopped(tmp_path, counted):
    with pytest.raises(KeyboardInterrupt):
        run_sweep(tmp_path, CELLS, TINY)
    assert len(list((tmp_path / "cells").iterdir())) == 2
    keys = [cell.key for cell in CELLS]
    assert [record["key"] for record in read_sweep(tmp_path)["cells"]] == keys[:2]
    report = run_sweep(tmp_path, CELLS, TINY)
    assert counted == [*keys[:3], *keys[2:]]
    assert [record["key"] for record in report["cells"]] == keys
    run_sweep(tmp_path, CELLS, TINY)
    run_sweep(tmp_path, [replace(CELLS[0], quality=False)], TINY)
    assert len(counted) == 6
    # Quality that is wanted now and was not measured then.
    run_sweep(tmp_path, [replace(CELLS[2], quality=True)], TINY)
    assert counted[6:] == [keys[2]]
    assert not [path for path in tmp_path.rglob("*") if path.suffix == ".tmp"]


def test_other_settings_are_refused(tmp_path, counted, monkeypatch):
    run_sweep(tmp_path, CELLS[:1], TINY)
    with pytest.raises(
        ValueError, match=r"must hold cells of the same settings, got num 20 \(now 30\), seed 0 \(now 1"
    ):
        run_sweep(tmp_path, CELLS[:1], replace(TINY, num=30, seed=1))
    kept = json.loads((tmp_path / "settings.json").read_text())
    (tmp_path / "settings.json").write_text(json.dumps({**kept, "model_sha256": "another"}))
    with pytest.raises(ValueError, match="model_sha256 'another'"):
        run_sweep(tmp_path, CELLS[:1], TINY)
    (tmp_path / "settings.json").write_text(json.dumps(kept))
    (tmp_path / "cells" / f"{CELLS[0].key}.json").write_text("{")
    with pytest.raises(ValueError, match=r"K20-g1.json must be JSON, got .* remove it"):
        run_sweep(tmp_path, CELLS[:1], TINY)
    assert len(counted) == 1


def test_a_tiny_sweep_from_end_to_end(tmp_path):
    report = run_sweep(tmp_path, CELLS, TINY)
    assert read_sweep(tmp_path) == report
    ordinary, lossless, auto, relaxed, ddim = report["cells"]
    assert ordinary["call_reduction"] == 1
    assert ordinary["wall_clock"] is None
    assert ordinary["acceptance"] is None
    assert lossless["call_reduction"] > 1
    assert lossless["call_reduction"] == pytest.approx(20 / lossless["calls_per_image"])
    assert lossless["bias_bound"] == 0
    assert lossless["wall_clock"]["pairs"] == 1
    assert lossless["images"] == 20
    assert auto["images"] == 2
    assert auto["quality"] is None
    assert relaxed["bias_bound"] > 0
    assert ddim["calls_per_image"] == 10
    for record in (ordinary, lossless, ddim):
        assert record["quality"]["frechet"]["low"] <= record["quality"]["frechet"]["value"]
        assert 0 <= record["quality"]["accuracy"]["value"] <= 1
    assert report["real"]["held_out_images"] == 360
    paths = write_report(report, tmp_path)
    text = paths[0].read_text()
    assert text == render(report)
    assert METRIC in text
    assert "| 20 | 2 | learned, token, L 4, relaxed 1 |" in text
    assert "FID" not in text
    assert paths[1].read_bytes().startswith(b"\x89PNG")
    paths[0].unlink()
    command = [sys.executable, "-m", "free_dit", "sweep", "--out", tmp_path, "--render-only"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert paths[0].read_text() == text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--out", "none", "--render-only"), "sweep.json must be an existing file"),
        (("--out", "/proc/none/x"), "sweep: out must be a writable file path"),
        (("--out", "x", "--num", "3"), "sweep: num must be an int in [20, inf), got 3"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(tmp_path, arguments, message, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["free_dit", "sweep", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert message in line
