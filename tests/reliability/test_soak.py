"""10,000 images one by one: memory does not grow with their number."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from analytic import BiasedDrafter, GaussianTarget
from fresh_process import STATM, evaluate_alone, resident

from free_kernels import DDPMSchedule, sample_iter

IMAGES, LATENT = 10_000, (4, 16, 16)
IMAGE_BYTES = 4 * 4 * 16 * 16


def growth(count: int, kept: list[torch.Tensor] | None = None) -> float:
    """Bytes by which a run of ``count`` images grows with each: slope of a line through RSS after the first quarter.

    ``kept`` is given every image: what a leak would do.
    """
    target = GaussianTarget(latent_shape=LATENT)
    images = sample_iter(
        target,
        torch.arange(count) % 3,
        max_slots=100,
        schedule=DDPMSchedule(4),
        drafter=BiasedDrafter(target),
        draft_length=3,
    )
    number, total, at, sizes = 0, torch.zeros(LATENT), [], []
    for _, image in images:
        number += 1
        total += image
        if kept is not None:
            kept.append(image)
        if number >= count // 4 and number % 100 == 0:
            at.append(number)
            sizes.append(resident())
    assert number == count
    assert total.isfinite().all()
    return float(np.polyfit(at, sizes, 1)[0])


def growth_alone(count: int, leaking: bool) -> float:
    """:func:`growth` in a process of its own: where earlier tests have freed memory, a leak would fill that first."""
    return evaluate_alone("test_soak", f"growth({count}, {[] if leaking else None})")


@pytest.mark.slow
@pytest.mark.skipif(not STATM.exists(), reason="reads memory from /proc")
def test_memory_is_constant(fault_log):
    """Growth per image is below a quarter of one; a run that keeps its images grows by more than half of each."""
    slope = growth_alone(IMAGES, leaking=False)
    fault_log("10,000 images in one run of sample_iter", "memory constant")
    fault_log.figure("growth in bytes per image of 4096 bytes", slope)
    leaking = growth_alone(IMAGES, leaking=True)
    fault_log.figure("the same where every image is kept (negative control)", leaking)
    assert leaking > IMAGE_BYTES / 2
    assert slope < IMAGE_BYTES / 4
