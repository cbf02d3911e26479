"""One process of a distributed run, started by torchrun: writes what it found to a file of its own."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from analytic import BiasedDrafter, GaussianTarget
from conditioned import ConditionedGaussian, null_of, some_conditions

from free_kernels import DDPMSchedule
from free_kernels.distributed import api as distributed

LABELS = torch.arange(7) % 3
SETTINGS = {"schedule": DDPMSchedule(14), "draft_length": 5, "max_slots": 3}
CASES = {
    "plain": {},
    "guided": {"guidance_scale": 2.0},
    "scales": {"guidance_scale": torch.linspace(0.5, 4.0, 7), "guidance_interval": (200, 900)},
    "scales of steps": {"guidance_scale": lambda step: torch.linspace(0.5, 4.0, 7) * step / 7},
    "block": {"verification": "block"},
    "relaxed": {"relaxation": 2.0},
    "auto": {"draft_length": 1},
    "noise": {"noise": torch.randn(7, 14, 1, 4, 4, generator=torch.Generator().manual_seed(2))},
    "few images": {"labels": torch.tensor([2])},
    "conditions": {"conditions": some_conditions(7, 8)},
    "conditions and noise": {
        "conditions": some_conditions(7, 8),
        "null_condition": null_of(some_conditions(1, 8, seed=9)),
        "guidance_scale": 1.5,
        "noise": torch.randn(7, 14, 4, 2, generator=torch.Generator().manual_seed(2)),
    },
}


class Failing(GaussianTarget):
    """A target that fails or dies in one rank after some calls."""

    manner, rank, calls = "", 0, 0

    def features(self, x, t, y):
        self.calls += 1
        if dist.get_rank() == self.rank and self.calls == 5:
            if self.manner == "dies":
                os._exit(9)
            if self.manner == "raises":
                raise ValueError("a weight is missing")
            return super().features(x, t, y) * float("nan")
        return super().features(x, t, y)


def run(case: str, target: GaussianTarget, sample) -> object:
    """A case by any sampler of the same arguments."""
    options = dict(CASES[case])
    if "conditions" in options:
        return sample(ConditionedGaussian(), drafter="frozen", seed=6, **(SETTINGS | options))
    labels = options.pop("labels", LABELS)
    return sample(target, labels, drafter=BiasedDrafter(target), seed=6, **(SETTINGS | options))


def main() -> None:
    out, verify, manner = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    dist.init_process_group("gloo", timeout=timedelta(seconds=40))
    rank = dist.get_rank()
    mesh = distributed.sample_mesh(verify)

    def sample(*arguments, **options):
        return distributed.sample(*arguments, mesh=mesh, **options)

    if manner == "works":
        found = {case: run(case, GaussianTarget(learns_variance=True), sample) for case in CASES}
        torch.save({case: one.samples for case, one in found.items()}, out / f"samples{rank}.pt")
        if rank == 0:
            text = [
                f"{case} {one.stats.rounds_per_image.tolist()} {one.stats.target_rows}" for case, one in found.items()
            ]
            (out / "stats.txt").write_text("\n".join(text))
    else:
        target = Failing(learns_variance=True)
        target.manner, target.rank = manner, int(sys.argv[4])
        try:
            run("plain", target, sample)
            message = "no error"
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
        (out / f"error{rank}.txt").write_text(message)
        os._exit(0)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
