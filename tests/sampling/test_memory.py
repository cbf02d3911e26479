"""What a run holds at most, against the formula that users plan with."""

from __future__ import annotations

import pytest
import torch

from benchmarks.sampler.live_bytes import LiveBytes
from benchmarks.sampler.shapes import Shape, ShapedDrafter, ShapedTarget
from free_kernels import DDPMSchedule, PhiloxNoise, TensorNoise, estimate_memory, sample

STEPS, SLOTS = 30, 3
SHAPE = Shape("small", (4, 8, 8), (16, 64), torch.bfloat16, 1.0, SLOTS)


def left_out(length: int) -> int:
    """Bytes that the formula leaves out: the table of K steps; timesteps; of each row eight coefficients and indices.

    A row is named by fewer than twenty-five int64 at a time, in steps, timesteps, labels, offsets and places.
    """
    return STEPS * (8 * 4 + 2 * 8) + SLOTS * length * (8 * 4 + 25 * 8) + 2048


def run(**settings) -> tuple[int, int]:
    """Measured and estimated bytes."""
    settings = {"schedule": DDPMSchedule(STEPS), "drafter": ShapedDrafter()} | settings
    target = ShapedTarget(SHAPE)
    estimate = SLOTS * estimate_memory(target, **{k: v for k, v in settings.items() if k != "noise"}).peak
    with LiveBytes() as alive:
        samples = sample(target, torch.arange(SLOTS), max_slots=SLOTS, **settings).samples
    return alive.peak, estimate + samples.nbytes


@pytest.mark.parametrize("length", [1, 2, 6, 12])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("drafter", ["frozen", "learned"])
def test_a_run_takes_what_is_stated(length, guidance, reuse, drafter):
    settings = {} if drafter == "learned" else {"drafter": "frozen"}
    measured, estimate = run(draft_length=length, guidance_scale=guidance, reuse_refused=reuse, **settings)
    assert estimate < measured + left_out(length)
    assert measured < estimate + left_out(length)


@pytest.mark.parametrize("drafter", ["frozen", "learned"])
def test_scales_of_images_are_mixed_in_a_copy(drafter):
    settings = {} if drafter == "learned" else {"drafter": "frozen"}
    measured, estimate = run(
        draft_length=6, guidance_scale=torch.tensor([1.0, 3.0, 5.0]), reuse_refused=False, **settings
    )
    assert estimate < measured + left_out(6)
    assert measured < estimate + left_out(6)


def test_blocks_keep_two_rows():
    measured, estimate = run(draft_length=6, verification="block")
    assert abs(measured - estimate) < left_out(6)


class Hoarding(PhiloxNoise):
    """Keeps all numbers that it draws."""

    def of_round(self, *given, **named):
        drawn = super().of_round(*given, **named)
        self.__dict__.setdefault("drawn", []).append(drawn)
        return drawn


def test_noise_that_is_kept_whole_is_seen():
    measured, estimate = run(draft_length=6, noise=Hoarding(0))
    assert measured > estimate + left_out(6)


def test_slots_within():
    estimate = estimate_memory(ShapedTarget(SHAPE), draft_length=6)
    assert estimate.slots_within(estimate.peak - 1) == 0
    assert estimate.slots_within(3 * estimate.peak) == 3
    assert estimate.as_dict()["peak"] == estimate.peak
    with pytest.raises(ValueError, match=r"slots_within: num_bytes must be .*, got -1"):
        estimate.slots_within(-1)


def test_errors_name_the_function():
    target = ShapedTarget(SHAPE)
    with pytest.raises(ValueError, match=r"estimate_memory: draft_length must be"):
        estimate_memory(target, draft_length=0)
    with pytest.raises(TypeError, match=r"estimate_memory: settings must be arguments of sample"):
        estimate_memory(target, length=3)
    noise = TensorNoise(torch.zeros(1, 251, 4, 8, 8), 0)
    with pytest.raises(ValueError, match=r"estimate_memory: noise must be None"):
        estimate_memory(target, noise=noise)
