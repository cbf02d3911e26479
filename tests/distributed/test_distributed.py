"""Several processes on gloo: the images of one process for every mesh, and errors that end the run in bounded time."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import distributed_worker
import numpy as np
import pytest
import torch
from analytic import GaussianTarget

from free_kernels import sample
from free_kernels.distributed import api as distributed
from free_kernels.results import SampleStats

HERE = Path(__file__).parents[1]


def torchrun(processes: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
    command += [str(HERE / "workers" / "distributed_worker.py"), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.parametrize(("processes", "verify"), [(2, 1), (2, 2), (4, 2), (3, 3)])
def test_images_are_those_of_one_process(tmp_path, processes, verify):
    done = torchrun(processes, tmp_path, verify, "works")
    assert done.returncode == 0, done.stderr[-3000:]
    stats = dict(line.split(" [") for line in (tmp_path / "stats.txt").read_text().splitlines())
    for case in distributed_worker.CASES:
        want = distributed_worker.run(case, GaussianTarget(learns_variance=True), sample)
        for rank in range(processes):
            got = torch.load(tmp_path / f"samples{rank}.pt", weights_only=True)[case]
            torch.testing.assert_close(got, want.samples, rtol=1e-5, atol=1e-5)
        rounds, rows = stats[case].split("] ")
        assert [int(x) for x in rounds.split(",")] == want.stats.rounds_per_image.tolist()
        assert int(rows) == want.stats.target_rows


@pytest.mark.parametrize(
    ("manner", "rank", "first", "second"),
    [
        (
            "raises",
            1,
            "RuntimeError: sample: every process of the group must answer",
            "ValueError: a weight is missing",
        ),
        ("raises", 0, "ValueError: a weight is missing", "RuntimeError: distributed.sample: every process must finish"),
        (
            "spoils",
            1,
            "FloatingPointError: sample: the target's output must be finite",
            "RuntimeError: distributed.sample",
        ),
        ("dies", 1, "ConnectionError: ", None),
        ("dies", 0, None, "ConnectionError: "),
    ],
)
def test_a_failing_process_ends_the_run(tmp_path, manner, rank, first, second, fault_log):
    """Every other process gets an error that says what happened, long before the timeout of 40 s would tell."""
    began = time.monotonic()
    torchrun(2, tmp_path, 2, manner, rank)
    assert time.monotonic() - began < 600
    for number, expected in ((0, first), (1, second)):
        path = tmp_path / f"error{number}.txt"
        if expected is None:
            assert not path.exists()
        elif manner == "dies" and not path.exists():
            # torchrun ends the others as soon as it sees one die; which of the two comes first is a matter of luck.
            continue
        else:
            assert path.read_text().startswith(expected), path.read_text()
    fault_log(f"one of two processes {manner}", "every other process ends with an error in bounded time")


def test_merged_figures():
    def stats(images, tested, accepted, uncertainty, bias):
        one = SampleStats(3, 10, 4, np.array(images), np.array(tested), np.array(accepted))
        one.uncertainty_by_step, one.bias_bound_per_image, one.elapsed_s = (
            np.array(uncertainty),
            np.array(bias),
            len(bias),
        )
        return one

    merged = distributed.merged_stats(
        [
            stats([4, 5], [2, 0, 0], [1, 0, 0], [1.0, np.nan, np.nan], [0.1, 0.3]),
            stats([6], [6, 1, 0], [6, 1, 0], [2.0, 5.0, np.nan], [0.2]),
        ]
    )
    assert merged.rounds_per_image.tolist() == [4, 5, 6]
    assert merged.tested_by_step.tolist() == [8, 1, 0]
    assert merged.accepted_by_step.tolist() == [7, 1, 0]
    np.testing.assert_allclose(merged.uncertainty_by_step, [(2 * 1 + 6 * 2) / 8, 5.0, np.nan])
    assert merged.bias_bound == pytest.approx(0.2)
    assert (merged.target_calls, merged.target_rows, merged.drafter_calls, merged.elapsed_s) == (6, 20, 8, 2)


def test_errors_without_a_group():
    with pytest.raises(RuntimeError, match="^sample_mesh: torch.distributed must be initialised"):
        distributed.sample_mesh()
