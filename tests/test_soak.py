"""10,000 images one by one: memory does not grow with their number."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from analytic import BiasedDrafter, GaussianTarget

from free_kernels import DDPMSchedule, sample_iter

STATM = Path("/proc/self/statm")
IMAGES, LATENT = 10_000, (4, 16, 16)
IMAGE_BYTES = 4 * 4 * 16 * 16
PAGE = 4096


def resident() -> int:
    """Bytes of this process in memory."""
    return int(STATM.read_text().split()[1]) * PAGE


def growth(kept: list[torch.Tensor] | None) -> float:
    """Bytes by which a run grows with each image: slope of a line through RSS at every 250th image after 2,500.

    ``kept`` is given every image: what a leak would do.
    """
    target = GaussianTarget(latent_shape=LATENT)
    images = sample_iter(
        target,
        torch.arange(IMAGES) % 3,
        max_slots=100,
        schedule=DDPMSchedule(4),
        drafter=BiasedDrafter(target),
        draft_length=3,
    )
    count, total, at, sizes = 0, torch.zeros(LATENT), [], []
    for _, image in images:
        count += 1
        total += image
        if kept is not None:
            kept.append(image)
        if count >= IMAGES // 4 and count % 250 == 0:
            at.append(count)
            sizes.append(resident())
    assert count == IMAGES
    assert total.isfinite().all()
    return float(np.polyfit(at, sizes, 1)[0])


@pytest.mark.slow
@pytest.mark.skipif(not STATM.exists(), reason="reads memory from /proc")
def test_memory_is_constant(fault_log):
    """Growth per image is below a tenth of an image; a variant that keeps its images shows as more than half of one."""
    slope = growth(None)
    fault_log("10,000 images in one run of sample_iter", "memory constant")
    fault_log.figure("growth in bytes per image of 4096 bytes", slope)
    leaking = growth([])
    fault_log.figure("the same where every image is kept (negative control)", leaking)
    assert leaking > IMAGE_BYTES / 2
    assert slope < IMAGE_BYTES / 10
