"""SIGINT and SIGTERM at random moments: sampling leaves at once, training goes on to the same weights."""

from __future__ import annotations

import os
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import interrupt_worker
import pytest
import torch

from free_kernels.checkpoint import load_checkpoint, save_checkpoint

HERE = Path(__file__).parents[1]
# A round lasts milliseconds; the rest is for machines that are busy with other things.
PROMPT_S = 10.0


def worker(*arguments: object) -> subprocess.Popen:
    paths = os.pathsep.join([str(HERE), *filter(None, sys.path)])
    command = [sys.executable, str(HERE / "workers" / "interrupt_worker.py"), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["token", "block", "auto", "iterator", "ordinary"])
def test_sampling_leaves_at_once(mode, fault_log):
    """No callback, no progress bar: KeyboardInterrupt comes out of the call, and later calls are sound."""
    dice, trials, waits = random.Random(mode), 8, []
    process = worker("sampling", mode, trials)
    try:
        for trial in range(trials):
            assert process.stdout.readline() == "go\n", process.stderr.read()
            time.sleep(dice.random() * 0.4)
            sent = time.monotonic()
            process.send_signal(signal.SIGTERM if trial % 3 == 2 else signal.SIGINT)
            word, _, at = process.stdout.readline().partition(" ")
            assert word == "interrupted", word
            waits.append(float(at) - sent)
            outcome = "left with KeyboardInterrupt; the next run was sound"
            fault_log(f"SIGINT or SIGTERM at a random moment of sampling, {mode}", outcome)
        assert process.wait(60) == 130
        assert process.stdout.read() == ""
    finally:
        process.kill()
    fault_log.figure("median seconds from signal to exception", statistics.median(waits))
    assert max(waits) < PROMPT_S


@pytest.mark.slow
def test_training_goes_on_to_the_same_weights(tmp_path, fault_log):
    """Signals until the run is done, every fourth one followed by a second that also cuts updates and checkpoints."""
    whole = interrupt_worker.make_loop(tmp_path / "whole")
    whole.run()
    dice, process, count = random.Random(0), worker("training", tmp_path / "parts"), 0
    try:
        while (line := process.stdout.readline().strip()) != "finished":
            assert process.poll() is None or line, process.stderr.read()
            if line == "go" and count < 25:
                time.sleep(dice.random() * 0.08)
                number = dice.choice([signal.SIGINT, signal.SIGTERM])
                process.send_signal(number)
                count += 1
                if count % 4 == 0:
                    time.sleep(dice.random() * 0.002)
                    process.send_signal(number)
        assert process.wait(60) == 0
    finally:
        process.kill()
    got = torch.load(tmp_path / "parts" / "weights.pt", weights_only=True)
    want = whole.averaged_weights() | {"step": torch.tensor(whole.step)}
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert [path.name for path in (tmp_path / "parts").glob(".*.tmp")] == []
    fault_log("SIGINT or SIGTERM at a random moment of training", "resumed to the same weights, bit for bit", count)
    assert count >= 10


def test_gradients_left_off_by_an_interrupt(tmp_path, fault_log):
    """An interrupt within torch's own ``no_grad`` leaves them off in the process; a run begins and ends with them."""
    whole, cut = (interrupt_worker.make_loop(tmp_path / name) for name in ("whole", "parts"))
    whole.run()
    own = cut.optimizer.step

    def interrupted():
        own()
        if cut.step == 15:
            torch.set_grad_enabled(False)
            raise KeyboardInterrupt

    cut.optimizer.step = interrupted
    with pytest.raises(KeyboardInterrupt):
        cut.run()
    assert torch.is_grad_enabled()
    resumed = interrupt_worker.make_loop(tmp_path / "parts")
    assert resumed.step == 10
    with torch.no_grad():
        resumed.run()
    want, got = whole.averaged_weights(), resumed.averaged_weights()
    assert all(torch.equal(got[name], want[name]) for name in want)
    fault_log("an interrupt that left gradients off", "resumed to the same weights, bit for bit")


def test_an_interrupt_while_a_checkpoint_is_read(tmp_path, monkeypatch, fault_log):
    """safetensors reports one that comes within its own calls as a ValueError, as if the file were broken."""
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, {"weight": torch.ones(2, 3)}, {"kind": "dit"})
    own, reads = torch.UntypedStorage.__getitem__, iter(range(1 << 20))

    def interrupted(storage, *arguments):
        if next(reads) == 1:
            signal.raise_signal(signal.SIGINT)
        return own(storage, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(torch.UntypedStorage, "__getitem__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load_checkpoint(path, "dit")
    assert next(reads) >= 2
    assert torch.equal(load_checkpoint(path, "dit")[0]["weight"], torch.ones(2, 3))
    fault_log("SIGINT while a checkpoint is read", "left with KeyboardInterrupt; the next call read it")


@pytest.mark.slow
@pytest.mark.parametrize(("number", "codes"), [(signal.SIGINT, (130,)), (signal.SIGTERM, (-15, 130))])
def test_the_command_line_leaves_no_half_file(tmp_path, number, codes, fault_log):
    out = tmp_path / "images.npz"
    command = [sys.executable, "-m", "free_dit", "sample", "--out", str(out), "--num", "2000"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, bufsize=0)
    try:
        shown = b""
        while b"sample:" not in shown:
            piece = process.stderr.read(200)
            assert piece, shown
            shown += piece
        time.sleep(1.0)
        sent = time.monotonic()
        process.send_signal(number)
        rest = process.stderr.read()
        assert process.wait(60) in codes
        assert time.monotonic() - sent < PROMPT_S
    finally:
        process.kill()
    assert b"Traceback" not in rest
    assert not list(tmp_path.iterdir())
    outcome = "exit 130 and one line" if number == signal.SIGINT else "ended by the signal"
    fault_log(f"{signal.Signals(number).name} to `python -m free_dit sample`", f"{outcome}; no half-written file")
