"""How ``couple_block`` decides in Triton: its parts alone; whole rounds are in test_triton_coupling.py."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
WORKER = Path(__file__).parents[1].joinpath("workers", "triton_worker_block.py")


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    """In a process of its own, since the interpreter is chosen while Triton is imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, str(WORKER)], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])


# Half the spacing of float64 around 1: what one operation rounds by, relatively.
UNIT = 2.0**-53
# Relative error of a tail above 0 in units, to first order and largest at 0: 6 roundings of y, which the series takes
# on by half, 2.4 of Horner's rule, 4 of the other factor, 2 of exp, 2 of the products and 2 of SciPy's own tail: 15.4.
# exp's argument -t^2 / 2, and SciPy's, is rounded too, relative to the tail by t^2 / 2 units each.
TAIL_ABOVE = 16 * UNIT
# Below 0 it is 1 minus such a tail, which is at most 1/2, rounded once more by half a unit; SciPy's value is off by 1.
TAIL_BELOW = TAIL_ABOVE / 2 + 1.5 * UNIT


def check_tail(errors: dict[str, float]) -> None:
    assert errors["above"] <= TAIL_ABOVE
    assert errors["below"] <= TAIL_BELOW
    assert errors["beyond"] == 0


def check_decisions(found: dict[str, float], length: int) -> None:
    # Only the rounds of 8 are many.
    residuals, direct = (100, 100) if length == 8 else (9, 3)
    assert found["residuals"] > residuals
    assert found["direct"] > direct
    assert found["deepest"] == length - 1
    assert found["otherwise"] == 0
    assert found["off"] < 1e-6
    assert found["off_usual"] < 2e-6


def test_the_tail_keeps_its_digits(interpreted):
    check_tail(interpreted["tail"])
    check_tail(interpreted["fine_tail"])


@pytest.mark.parametrize("side", ["above", "below"])
def test_a_tail_that_is_off_is_found(interpreted, side):
    """Off by 5e-15 of itself: one wrong digit of the series' smallest coefficients is more."""
    with pytest.raises(AssertionError):
        check_tail(interpreted["tail"] | {side: interpreted["wrong_tail"][side]})


def test_residuals_are_drawn_as_by_the_reference(interpreted):
    assert interpreted["draw"] < 2e-7


@pytest.mark.parametrize("length", [2, 8, 64, 256])
def test_slots_are_decided_as_by_the_reference(interpreted, length):
    check_decisions(interpreted[f"decisions-{length}"], length)


def test_another_gap_is_found(interpreted):
    control = interpreted["control"]
    assert control["otherwise"] > 0 or control["off"] > 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET", "0") != "0", reason="TRITON_INTERPRET keeps kernels off it")
def test_on_a_gpu():
    worker = importlib.import_module("triton_worker_block")
    check_tail(worker.tail_errors(1920, "cuda"))
    check_tail(worker.tail_errors(3968, "cuda"))
    assert worker.draw_error("cuda") < 2e-7
    for length, slots in worker.SIZES:
        check_decisions(worker.decision_errors(*worker.decided(length, slots, "cuda")), length)
