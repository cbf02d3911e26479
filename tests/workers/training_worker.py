"""A drafter training that tests start, kill and start again: ``training_worker.py OUT STORE [DIE_AT]``.

With ``DIE_AT`` the process of rank 1 kills itself before that iteration.
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch

from free_dit import DiT, DiTConfig
from free_dit.train_drafter import DrafterTrainConfig, train_drafter
from free_dit.training.distributed import Place
from free_dit.training.loop import LoopConfig, TrainingLoop
from free_kernels import DiTTarget, DrafterConfig

CONFIG = DrafterTrainConfig(
    drafter=DrafterConfig(width=32, head_dim=16),
    loop=LoopConfig(
        iterations=60, warmup=2, learning_rate=3e-3, ema_decay=0.9, checkpoint_every=7, log_every=1, accumulate=2
    ),
    num_steps=14,
    batch_size=8,
    trajectories=4,
    refresh_every=5,
    calibration_images=2,
    keep_shards=3,
    process_timeout_s=240,
)


def tiny_target(dtype: torch.dtype = torch.float32) -> DiTTarget:
    """A DiT of random weights, the same in every process."""
    generator = torch.Generator().manual_seed(0)
    module = DiT(DiTConfig(8, 4, 1, 32, 2, 2, 3)).eval().requires_grad_(False)
    for name, parameter in module.named_parameters():
        if name != "pos_embed":
            parameter.normal_(std=0.1, generator=generator)
    return DiTTarget(module.to(dtype))


def main() -> None:
    out, store, *die_at = sys.argv[1:]
    place, iterate = Place.from_environment(), TrainingLoop._iterate

    def mortal(loop: TrainingLoop) -> dict[str, float]:
        if die_at and place.rank == 1 and loop.step == int(die_at[0]):
            os.kill(os.getpid(), signal.SIGKILL)
        return iterate(loop)

    TrainingLoop._iterate = mortal
    train_drafter(tiny_target(), replace(CONFIG, store=store), Path(out), "tiny", place)


if __name__ == "__main__":
    main()
