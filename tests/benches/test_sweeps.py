"""The sampler of sweeps that benchmarks stand beside: the ordinary sampler's images, and no more calls than steps."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

from free_dit import load_bundled
from free_dit.networks.denoiser import DenoiserTarget, photograph_crops
from free_kernels import DDPMSchedule, ancestral_sample

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / "benchmarks").exists(), reason="needs the source checkout")
STEPS, IMAGES = 30, 3


@pytest.fixture(scope="module", params=["fixed variance", "learned variance"])
def case(request):
    """Target, labels, schedule and the ordinary sampler's images."""
    if request.param == "fixed variance":
        target, schedule = DenoiserTarget(photograph_crops(4, count=20)), DDPMSchedule(STEPS, variance="fixed_small")
    else:
        target, schedule = load_bundled("digits")[0], DDPMSchedule(STEPS)
    labels = torch.arange(IMAGES) % target.num_classes
    return target, labels, schedule, ancestral_sample(target, labels, schedule=schedule, seed=3).samples


def swept(case, window, tolerance):
    from benchmarks.sampler.sweeps import sample_by_sweeps

    target, labels, schedule, _ = case
    return sample_by_sweeps(target, labels, schedule, window=window, tolerance=tolerance, seed=3)


def close(images, exact):
    # Rows of calls of other sizes differ by rounding, which a chain carries along: 1e-3 of a pixel in [-1, 1] is some
    # thousands of ulps, and far below the noise of a step (0.01 and more before the last ones).
    return torch.allclose(images, exact, rtol=0, atol=1e-3)


def test_a_window_of_one_is_the_ordinary_sampler(case):
    result = swept(case, 1, 0.0)
    assert close(result.samples, case[3])
    assert (result.calls, result.rows) == (STEPS, STEPS)


@pytest.mark.parametrize("window", [2, 5, STEPS, 2 * STEPS])
def test_without_tolerance_the_images_are_the_ordinary_samplers(case, window):
    result = swept(case, window, 0.0)
    assert close(result.samples, case[3])
    assert 1 + math.ceil((STEPS - 1) / window) <= result.calls <= STEPS
    assert result.calls <= result.rows <= result.calls * window


def test_a_tolerance_saves_calls_and_shows_in_the_images(case):
    """Where everything passes, every sweep after the first commits a whole window, and the images are others."""
    result = swept(case, 5, 1e6)
    assert result.calls == 1 + math.ceil((STEPS - 1) / 5)
    assert not close(result.samples, case[3])
    calls = [swept(case, 5, tolerance).calls for tolerance in (0.0, 1e-2, 1e-1, 1.0)]
    assert calls == sorted(calls, reverse=True)
    assert calls[-1] < calls[0]


def test_wrong_arguments_are_named(case):
    with pytest.raises(ValueError, match="^sample_by_sweeps: window must be an int in"):
        swept(case, 0, 0.0)
    with pytest.raises(ValueError, match="^sample_by_sweeps: tolerance must be a finite number in"):
        swept(case, 2, -1.0)


def test_the_comparison_counts_both_samplers_and_renders(monkeypatch, tmp_path, capsys):
    import json

    from benchmarks.sampler import bench_sweeps

    monkeypatch.setattr(bench_sweeps, "LENGTHS", (3,))
    monkeypatch.setattr(bench_sweeps, "STEPS", (12,))
    monkeypatch.setattr(sys, "argv", ["bench_sweeps", "--out", str(tmp_path / "sweeps.json"), "--images", "1"])
    bench_sweeps.main()
    rows = json.loads((tmp_path / "sweeps.json").read_text())["rows"]
    assert len(rows) == 2 * len(bench_sweeps.TOLERANCES) + 3
    assert all(4 <= row["calls"] <= 12 and row["calls"] <= row["rows"] <= 3 * row["calls"] for row in rows)
    assert {row["error"] is None for row in rows} == {True, False}
    assert "| sweeps, 0.1 |" in capsys.readouterr().out
