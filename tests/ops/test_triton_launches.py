"""What ``sample`` and the ops hand to Triton's JIT for sm_90 compiles, and sizes that change do not compile anew."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

WORKER = Path(__file__).parents[1].joinpath("workers", "triton_worker_launches.py")
COUPLING = {"coupling_rows_kernel", "coupling_commit_kernel"}
ROUND = COUPLING | {"philox_kernel", "advance_kernel", "tally_kernel", "open_kernel", "renew_kernel"}
KEPT = ROUND | {"keep_kernel", "find_kernel"}
CLEAN = ROUND - {"advance_kernel"} | {"measure_kernel", "keep_clean_kernel", "find_kernel", "replay_kernel"}
# Kernels that a run launches, and the most compilations that it adds to those of the runs before it. A round's longest
# draft goes into the commit kernel as the next power of two: L = 4, 2 and 1 are three compilations. The bundled drafter
# leaves the first share of the chain to clean samples, whose three kernels it compiles too.
RUNS = {
    "learned": (KEPT | {"feature_attention_kernel", "tokens_kernel", "norm_kernel", "table_kernel", "join_kernel"}, 28),
    "other sizes": (KEPT | {"feature_attention_kernel"}, 0),
    "frozen": (CLEAN, 4),
    "frozen, other sizes": (CLEAN, 0),
    "automatic lengths": (KEPT, 2),
    "guided": (KEPT, 12),
    "block": (KEPT, 6),
    "relaxed": (KEPT, 3),
    "own noise": (KEPT, 5),
    "windowed": (ROUND | {"feature_attention_kernel"}, 1),
    "attention": ({"feature_attention_kernel"}, 1),
    "attention of other sizes": ({"feature_attention_kernel"}, 0),
    "numbers": ({"philox_kernel"}, 1),
    "numbers of other keys": ({"philox_kernel"}, 0),
}

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton's compiler")


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    """Every run in one process; the first one's kernels are really compiled, for any would do to see what is wrong."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, WORKER, "--compile", "learned"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", RUNS)
def test_compilations_are_few(recorded, name):
    kernels, most = RUNS[name]
    assert kernels <= set(recorded[name]["launches"])
    assert sum(recorded[name]["compilations"].values()) <= most, recorded[name]


def test_sizes_would_compile_anew_if_they_were_specialised(recorded):
    """The control of the bounds of 0: the same runs, where sizes are allowed to count."""
    anew = recorded["control: other sizes"]["compilations"]
    assert set(anew) >= COUPLING
    assert sum(anew.values()) > RUNS["other sizes"][1]
