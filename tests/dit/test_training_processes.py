"""Drafter training in processes of its own: killed at random moments, and several of them at a time."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_worker import CONFIG, tiny_target

from free_dit.training.distributed import Place
from free_dit.training.drafter_loss import DrafterLoss
from free_dit.training.loop import TrainingLoop, iteration_seed
from free_kernels import FeatureDrafter

WORKER = Path(__file__).parents[1] / "workers" / "training_worker.py"
# One thread: sums in another order would be other bits.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(*arguments: object) -> list[str]:
    return [sys.executable, str(WORKER), *map(str, arguments)]


@pytest.mark.slow
@pytest.mark.parametrize("store", ["memory", "shards"])
def test_killed_at_random_moments_it_ends_with_the_same_bits(tmp_path, store):
    subprocess.run(command(tmp_path / "whole", store), check=True, capture_output=True, env=ENVIRONMENT, timeout=120)
    log, moments = tmp_path / "parts" / "log.csv", random.Random(store)
    kills = 0
    for low, high in ((8, 20), (24, 50)):
        process = subprocess.Popen(
            command(tmp_path / "parts", store), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT
        )
        lines, deadline = moments.randint(low, high), time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if log.exists() and log.read_bytes().count(b"\n") > lines:
                break
            time.sleep(0.002)
        # Anywhere within an iteration, a checkpoint or a shard.
        time.sleep(moments.random() * 0.02)
        process.kill()
        kills += process.wait(timeout=60) == -9
    assert kills == 2
    assert not (tmp_path / "parts" / "drafter.safetensors").exists()
    subprocess.run(command(tmp_path / "parts", store), check=True, capture_output=True, env=ENVIRONMENT, timeout=120)
    whole, parts = (load_file(tmp_path / run / "drafter.safetensors") for run in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    for name, tensor in whole.items():
        assert torch.equal(parts[name], tensor), name
    logs = [(tmp_path / run / "log.csv").read_text() for run in ("whole", "parts")]
    assert logs[0] == logs[1]
    assert len(logs[0].splitlines()) == 1 + CONFIG.loop.iterations
    if store == "shards":
        shards = [path.name for path in (tmp_path / "parts" / "trajectories" / "rank0").glob("*")]
        last = (CONFIG.loop.iterations - 1) // CONFIG.refresh_every
        wanted = {f"shard-{n:06d}.safetensors" for n in range(last - CONFIG.keep_shards + 1, last + 1)}
        assert set(shards) == wanted | {"manifest.json"}


def joint_training(out: Path, ranks: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """One process that averages the losses of ``ranks``: what processes of these ranks must arrive at together."""
    target, config = tiny_target(), replace(CONFIG, store="shards")
    with iteration_seed(config.loop.seed, -1):
        drafter = FeatureDrafter(target.latent_shape, target.feature_shape, target.num_classes, config.drafter)
    losses = [DrafterLoss(target, drafter, config, Place(rank, len(ranks)), out / "trajectories") for rank in ranks]
    losses[0].fit_scales()
    batches = config.loop.accumulate

    def loss(step: int):
        parts = []
        for rank, one in zip(ranks, losses, strict=True):
            for batch in range(batches):
                with iteration_seed(config.loop.seed, step, rank * batches + batch):
                    parts.append(one(step)[0])
        return torch.stack(parts).mean(), {}

    loop = TrainingLoop(drafter.train(), loss, replace(config.loop, accumulate=1), out, {})
    loop.run()
    return loop.averaged_weights()


def difference(weights: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> float:
    """The largest over tensors of distance over size; scales, which are not trained, among them."""
    return max(float((weights[name] - tensor).norm() / tensor.norm()) for name, tensor in others.items())


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
def test_two_processes_equal_one_on_both_their_batches_and_survive_a_death(tmp_path):
    """Process 1 dies at iteration 20: the run ends soon, and goes on to what one process gives for twice the batch."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
    torchrun += ["--master-port", str(random.randint(20000, 60000)), str(WORKER), str(tmp_path / "two"), "shards"]
    settings = {"capture_output": True, "text": True, "env": ENVIRONMENT, "timeout": 240}
    began = time.monotonic()
    died = subprocess.run([*torchrun, "20"], **settings)
    assert died.returncode != 0
    assert "Signal 9 (SIGKILL)" in died.stderr
    # Half of what a silent process would be waited for, and imports on a busy machine.
    assert time.monotonic() - began < 120
    assert not (tmp_path / "two" / "drafter.safetensors").exists()
    subprocess.run(torchrun, check=True, **settings)
    found = load_file(tmp_path / "two" / "drafter.safetensors")
    assert sorted(path.name for path in (tmp_path / "two" / "trajectories").iterdir()) == ["rank0", "rank1"]
    assert len((tmp_path / "two" / "log.csv").read_text().splitlines()) == 1 + CONFIG.loop.iterations

    # Each process has trajectories of its own, and one process with both sets sees the same windows.
    together = joint_training(tmp_path / "joint", (0, 1))
    alone = joint_training(tmp_path / "alone", (0,))
    # Initial weights that are off by 1e-7 end 3e-5 apart.
    assert difference(found, together) < 1e-3
    # Negative control: without the second process's windows.
    assert difference(found, alone) > 0.05


def test_the_environment_of_torchrun_is_read_whole(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert Place.from_environment() == Place()
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(ValueError, match="^Place.from_environment: LOCAL_RANK must be set by torchrun"):
        Place.from_environment()
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert Place.from_environment() == Place(3, 4, 1)
    assert not Place(3, 4, 1).is_first
    with pytest.raises(ValueError, match="^train_drafter: device must be 'auto', 'cpu' or 'cuda', got 'gpu'"):
        Place().device("gpu")
