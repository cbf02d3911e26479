"""A round on fake CUDA tensors: nothing waits for the host or copies from it, launches are no more than they were."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_round_worker import CASES

WORKER = Path(__file__).parents[1].joinpath("workers", "fake_round_worker.py")
CONTROLS = [name for name in CASES if name.startswith("control")]
ROUNDS = [name for name, case in CASES.items() if name not in CONTROLS and not case.whole]
STEPS = ["ordinary 1", "ordinary 2"]
# Launches outside of target and drafter in a round of L = 6: the dispatcher's operations on CUDA tensors that are
# neither views nor allocations, where couple, commit_drafts and keep_clean_rows count for their two kernels and
# pack_drafts for its one.
MOST_OWN = {
    "learned": 27,
    "frozen": 15,
    "guided": 35,
    "scales of steps": 54,
    "frozen, scales of steps": 24,
    "windowed": 33,
    "block": 29,
    "relaxed by deviation": 76,
    "relaxed by variance": 86,
    "without tables": 27,
    "windowed without tables": 36,
    "flow": 32,
    "flow without tables": 35,
    "without reuse": 18,
    "a row a slot": 11,
    "frozen share, early": 17,
    "frozen share, late": 30,
    "frozen share, both": 39,
    "ordinary 1": 10,
    "ordinary 2": 13,
}
# With the 16 blocks of the bundled target, whose attention is 5 launches a block here and one on a GPU.
MOST_IN_ALL = 491
# Of the drafter's two blocks, in five calls: 6 of each call, and 8 of each block.
MOST_OF_DRAFTER = 5 * (6 + 2 * 8)
MOST_OF_PART = {
    "refused rows": 2,
    "rest": 11,
    "opening": 1,
    "renewal": 1,
    "drafts": 5,
    "tally": 1,
    "noise": 1,
    "couple": 2,
    "commit": 2,
    "pack": 1,
}


@pytest.fixture(scope="module")
def played() -> dict[str, dict[str, Any]]:
    """Every case, in one process that alone takes part in the pretence."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, WORKER], capture_output=True, text=True, env=environment)
    if done.stderr.startswith("skip: "):
        pytest.skip(done.stderr.strip().removeprefix("skip: "))
    assert done.returncode == 0, done.stderr[-4000:]
    return {one["case"]: one for one in map(json.loads, done.stdout.splitlines())}


def own(one: dict[str, Any]) -> int:
    return sum(count for part, count in one["parts"].items() if part not in ("target", "drafter"))


@pytest.mark.parametrize("name", ROUNDS + STEPS)
def test_what_is_captured_neither_waits_nor_copies(played, name):
    one = played[name]
    assert one["error"] is None
    assert one["device"] == "cuda:0"
    assert (one["copies"], one["reads"]) == ([], [])


def test_a_whole_round_copies_its_lengths_and_nothing_else(played):
    same, one = played["whole"], played["whole, other lengths"]
    assert same["error"] is one["error"] is None
    assert same["reads"] == one["reads"] == same["copies"] == []
    assert len(one["copies"]) == 1
    assert 'self.slots.lengths.copy_(torch.tensor(lengths, device="cpu"))' in one["copies"][0]


def test_planted_copies_and_reads_are_found(played):
    copies, fetches = played["control: copies"], played["control: fetches"]
    # One for each drafting step.
    assert len(copies["copies"]) == len(fetches["reads"]) == 5
    assert all(
        Path(__file__).parents[1].joinpath("workers", "fake_round_worker.py").name in line for line in copies["copies"]
    )
    assert "DataDependentOutputException" in played["control: looks"]["error"]


@pytest.mark.parametrize("name", MOST_OWN)
def test_launches_are_no_more_than_they_were(played, name):
    one = played[name]
    if not one["compiled"]:
        pytest.skip("needs the extension, which packs in one launch and commits in two")
    assert 0 < own(one) <= MOST_OWN[name], one["ops"]


def test_launches_by_part(played):
    one = played["learned"]
    if not one["compiled"]:
        pytest.skip("needs the extension, which packs in one launch and commits in two")
    assert 0 < sum(one["parts"].values()) <= MOST_IN_ALL
    assert one["parts"]["drafter"] <= MOST_OF_DRAFTER
    parts = {part: count for part, count in one["parts"].items() if part not in ("target", "drafter")}
    assert {part: count for part, count in parts.items() if count > MOST_OF_PART.get(part, 0)} == {}


def test_counts_see_a_further_launch(played):
    """The reference takes many launches where the kernels take five: a bound that nothing exceeds is none."""
    assert own(played["by the reference"]) > MOST_OWN["guided"]
