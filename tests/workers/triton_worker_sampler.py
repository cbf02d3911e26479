"""Run by test_triton_sampler.py with TRITON_INTERPRET=1: whole runs through the Triton coupling and the reference."""

from __future__ import annotations

import itertools

import torch
from analytic import BiasedDrafter, GaussianTarget

from free_kernels import DDPMSchedule, PhiloxNoise, sample

LABELS = torch.tensor([0, 1, 2])


def worst_difference(learned: bool, guidance: float | torch.Tensor, verification: str) -> float:
    target = GaussianTarget(learns_variance=learned)
    drafter = BiasedDrafter(target, variance_bias=0.1 if learned else 0.0)
    settings = {"schedule": DDPMSchedule(8), "drafter": drafter, "guidance_scale": guidance, "draft_length": 3}
    # Images of a later part of a job: their noise is keyed by their place in all of it.
    settings |= {"max_slots": 2, "noise": PhiloxNoise(5, first_image=7), "verification": verification}
    runs = [sample(target, LABELS, backend=backend, **settings) for backend in ("reference", "triton")]
    if (runs[0].stats.rounds_per_image != runs[1].stats.rounds_per_image).any():
        return float("inf")
    return float((runs[0].samples - runs[1].samples).abs().max())


SCALES = (1.0, 2.0, torch.tensor([1.0, 0.3, 4.0]))
print(max(worst_difference(*setting) for setting in itertools.product((False, True), SCALES, ("token", "block"))))
