"""``couple``, ``couple_block`` in Triton against the reference: in the interpreter, and on a GPU where there is one."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import triton_worker_coupling as worker

WORKER = Path(worker.__file__)
gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET", "0") != "0", reason="TRITON_INTERPRET keeps kernels off it"),
]


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    """All cases in one process, to pay for its start once."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, WORKER], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", worker.BY_NAME)
def test_interpreted_kernels_agree_with_the_reference(interpreted, name):
    assert interpreted["cases"][name] == []


@pytest.mark.parametrize("name", worker.PRECISION_NAMES)
def test_interpreted_error_is_at_most_twice_eagers(interpreted, name):
    for output, quotients in interpreted["precision"][name].items():
        print(output, *(f"{quotient:.2f}" for quotient in quotients))
        assert max(quotients) <= 2, output


def test_interpreted_normals_are_those_of_the_random_ops(interpreted):
    assert interpreted["normals"] == []


def test_products_that_overflow_are_refused_as_by_the_reference(interpreted):
    assert interpreted["overflow"] == []


def test_the_comparison_finds_planted_faults(interpreted):
    block = {"block_rounds", "block_is_not_token", "block_draw"}
    assert set(interpreted["controls"]) == {"guidance_channels", "seed", "rounds", "rounding"} | block
    for name, found in interpreted["controls"].items():
        assert found, name


@pytest.mark.parametrize("variant", ["tensors", "block"])
def test_cases_cover_every_outcome(variant):
    """Else the comparison says little: acceptance, refusal, last rows and infeasible rows must all occur."""
    outcomes = set()
    for case in worker.CASES:
        committed = worker.oracle(worker.make(case), variant).committed
        for length, count in zip(case.lengths, committed.tolist(), strict=True):
            kind = "idle" if length == 0 else "single" if length == 1 else "all" if count == length else "refused"
            outcomes.add((kind, case.learned, count > 1 and kind == "refused"))
    for learned in (False, True):
        assert {("idle", learned, False), ("single", learned, False), ("all", learned, False)} <= outcomes
        assert {("refused", learned, False), ("refused", learned, True)} <= outcomes


@pytest.fixture(scope="module")
def kernels() -> Any:
    return pytest.importorskip("free_kernels.ops.coupling.triton_launch")


@pytest.mark.parametrize(
    ("slots", "length", "numel"),
    [(1, 1, 1), (1, 6, 64), (1, 6, 4096), (1, 6, 16384), (86, 6, 16384), (1, 6, 65536), (3, 2, 315), (1, 2, 10**6)],
)
def test_launch_shape_covers_every_element_once(kernels, slots, length, numel):
    shape = kernels.launch_shape(slots, length, numel)
    per_program = shape.block * shape.chunks
    assert shape.num_splits == math.ceil(numel / per_program)
    assert shape.num_splits <= 64
    for block in (shape.block, shape.commit_block):
        assert block & (block - 1) == 0
        assert 64 <= block <= 512


def test_few_rows_still_spread_over_a_large_gpu(kernels):
    for numel in (4096, 16384):
        shape = kernels.launch_shape(1, 6, numel)
        assert 5 * shape.num_splits >= 80


LARGE = [
    worker.Case(
        f"{numel}-{str(dtype).removeprefix('torch.')}",
        lengths=(6, 3, 0, 1, 6),
        latent=(4, side, side),
        learned=True,
        guidance=(4.0, 3),
        gap=0.5,
        # The variance error adds about D r^2 to the squared gap.
        spread=0.2 / math.sqrt(numel),
        output=dtype,
        seed=numel,
    )
    for side, numel in ((32, 4096), (64, 16384), (128, 65536))
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
]


class TestOnGpu:
    pytestmark = gpu

    @pytest.fixture(autouse=True)
    def poisoned(self):
        """New tensors are NaN: an element that is never written shows."""
        torch.use_deterministic_algorithms(True, warn_only=True)
        yield
        torch.use_deterministic_algorithms(False)

    @pytest.mark.parametrize("case", worker.CASES + LARGE, ids=lambda case: case.name)
    def test_kernels_agree_with_the_reference(self, kernels, case):
        assert worker.check(case, kernels, "cuda") == []

    def test_products_that_overflow_are_refused_as_by_the_reference(self):
        assert worker.check_overflow("cuda") == []

    def test_normals_are_those_of_the_random_ops(self):
        assert worker.check_normals("cuda") == []

    @pytest.mark.parametrize("variant", worker.RUNS)
    def test_graph_capture_follows_its_inputs(self, variant):
        """A replay sees new data and new lengths, which only the device knows."""
        case, run = dataclasses.replace(LARGE[1], rounds=True), worker.RUNS[variant]
        held = worker.make(case).to("cuda")
        run(held)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run(held)
        lengths = (1, 6, 6, 3, 0)
        fresh = worker.make(dataclasses.replace(case, lengths=lengths, seed=case.seed + 4)).to("cuda")
        for old, new in zip((*held.given, *held.keys), (*fresh.given, *fresh.keys), strict=True):
            if isinstance(old, torch.Tensor) and old.stride().count(0) == 0:
                old.copy_(new)
        graph.replay()
        assert worker.compare(captured, fresh, variant) == []

    @pytest.mark.parametrize("variant", worker.VARIANTS)
    @pytest.mark.parametrize("case", worker.PRECISION, ids=lambda case: case.name)
    def test_error_is_at_most_twice_eagers(self, case, variant):
        quotients = worker.precision(case, variant, "cuda")
        assert all(mean <= 2 for mean, _ in quotients.values()), quotients

    @pytest.mark.parametrize("variant", worker.RUNS)
    def test_nothing_waits_for_the_device(self, variant):
        arguments, run = worker.make(LARGE[0]).to("cuda"), worker.RUNS[variant]
        run(arguments)
        torch.cuda.set_sync_debug_mode("error")
        try:
            run(arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")
