"""Continuous batching: the images of ``sample``, one by one, in memory that follows the slots."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from analytic import BiasedDrafter, GaussianTarget

from free_kernels import DDPMSchedule, RoundInfo, sample, sample_iter
from free_kernels.sampling.image_pool import ImagePool
from free_kernels.sampling.job import make_job
from free_kernels.sampling.options import Options

LABELS = torch.arange(23) % 3
STEPS = DDPMSchedule(12)


@pytest.mark.parametrize("slots", [1, 2, 5, 23, 64])
@pytest.mark.parametrize(("guidance", "learned"), [(1.0, False), (2.0, True)])
def test_the_images_of_sample_each_once(slots, guidance, learned):
    target = GaussianTarget(learns_variance=learned)
    settings = {"schedule": STEPS, "drafter": BiasedDrafter(target), "guidance_scale": guidance, "draft_length": 4}
    want = sample(target, LABELS, seed=7, **settings)
    images = sample_iter(target, LABELS, max_slots=slots, seed=7, **settings)
    found = list(images)
    assert sorted(one.index for one in found) == list(range(23))
    got = torch.stack([one.sample for one in sorted(found, key=lambda one: one.index)])
    torch.testing.assert_close(got, want.samples, rtol=1e-5, atol=1e-5)
    for figure in ("rounds_per_image", "tested_by_step", "accepted_by_step"):
        np.testing.assert_array_equal(getattr(images.stats, figure), getattr(want.stats, figure))


@pytest.mark.parametrize(
    "options",
    [
        {"verification": "block"},
        {"relaxation": 1.0},
        {"noise": torch.randn(23, 12, 1, 4, 4, generator=torch.Generator().manual_seed(1))},
    ],
    ids=["block", "relaxed", "noise of every step"],
)
def test_other_settings(options):
    target = GaussianTarget(learns_variance=True)
    settings = {"schedule": STEPS, "drafter": BiasedDrafter(target), "draft_length": 4, "seed": 3} | options
    want = sample(target, LABELS, **settings)
    images = sample_iter(target, LABELS, max_slots=3, **settings)
    for index, image in images:
        torch.testing.assert_close(image, want.samples[index], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(images.stats.bias_bound_per_image, want.stats.bias_bound_per_image, rtol=1e-4)


def test_a_slot_never_waits_and_memory_follows_the_slots():
    """Every slot is busy until too few images are left; of N = 400 images the state of 3 x 4 is held."""
    target = GaussianTarget()
    labels, seen = torch.zeros(400, dtype=torch.int64), []
    images = sample_iter(
        target, labels, max_slots=4, schedule=STEPS, drafter=BiasedDrafter(target), draft_length=3, callback=seen.append
    )
    assert len(images._speculation.samples) == 12
    count = sum(1 for _ in images)
    assert count == 400
    busy = [len(info.images) for info in seen if info.images_done <= 396]
    assert set(busy) == {4}
    assert sorted({image for info in seen for image in info.images}) == list(range(400))


def test_pool_by_a_plain_model():
    """Random lives of images, against a list that never forgets."""
    target, random = GaussianTarget(), np.random.default_rng(0)
    for slots, rows, count in ((1, 2, 9), (3, 6, 40), (3, 9, 10), (4, 12, 100), (5, 10, 11)):
        labels = torch.from_numpy(random.integers(0, 3, count))
        job = make_job("sample", target, labels, Options(schedule=STEPS, seed=5))
        pool, everything = ImagePool(job, slots, rows), job.initial_states(torch.arange(count))
        inside, entered = list(range(slots)), slots
        while True:
            rows_now = [-1 if row is None else row for row in inside]
            for row in rows_now:
                if row >= 0:
                    name = pool.images[row]
                    assert pool.indices[row] == name
                    assert pool.labels[row] == labels[name]
            if not any(row >= 0 for row in rows_now):
                break
            for slot, row in enumerate(rows_now):
                if row >= 0 and random.random() < 0.5:
                    queue = int(pool.queue)
                    inside[slot] = queue if queue < pool.rows else None
                    pool.queue += 1
                    if inside[slot] is not None:
                        # What enters is the next image of the job, with its own noise.
                        assert pool.images[queue] == entered
                        torch.testing.assert_close(pool.samples[queue], everything[entered])
                        entered += 1
            live = [-1 if row is None else row for row in inside]
            if max(live) >= 0:
                moved = pool.advance(live)
                inside = inside if moved is None else moved
        assert entered == count


def test_an_iterator_can_be_left(monkeypatch):
    target = GaussianTarget()
    seen: list[RoundInfo] = []
    images = sample_iter(target, LABELS, max_slots=2, schedule=STEPS, callback=seen.append)
    first = next(images)
    assert first.index in (0, 1)
    assert images.stats.elapsed_s > 0
    images.close()
    rounds = len(seen)
    assert list(images) == []
    assert len(seen) == rounds


def test_the_stats_are_those_of_the_images_so_far():
    """Of any moment: a round commits the drafts that it accepts and one step more."""
    target, seen = GaussianTarget(learns_variance=True), []

    def watch(_):
        seen.append(images.stats.rounds_per_image.sum() + images.stats.accepted_by_step.sum())

    settings = {"drafter": BiasedDrafter(target), "draft_length": 3, "relaxation": 0.5, "schedule": STEPS}
    images = sample_iter(target, LABELS, max_slots=2, callback=watch, **settings)
    assert np.isnan(images.stats.call_reduction)
    assert len(images.stats.uncertainty_by_step) == STEPS.num_steps
    done = [next(images).index]
    stats = images.stats
    assert 1 <= stats.call_reduction <= 3
    assert stats.bias_bound_per_image[done[0]] > 0
    assert not stats.bias_bound_per_image[4:].any(), "images that have not begun"
    assert np.isfinite(stats.uncertainty_by_step[:-1]).any()
    assert (stats.rounds_per_image > 0).sum() <= 4
    assert seen[0] >= 2, "two images, a step at least"
    assert (np.diff(seen) > 0).all(), "in every callback"
    done += [image.index for image in images]
    assert sorted(done) == list(range(len(LABELS)))
    whole = sample(target, LABELS, max_slots=2, **settings).stats
    assert seen[-1] == STEPS.num_steps * len(LABELS)
    for name in ("call_reduction", "rounds_per_image", "accepted_by_step", "tested_by_step", "bias_bound_per_image"):
        np.testing.assert_allclose(getattr(images.stats, name), getattr(whole, name), rtol=1e-6)
    assert whole.call_reduction == STEPS.num_steps * len(LABELS) / whole.rounds_per_image.sum()


def test_an_error_ends_the_iterator_and_is_not_the_end_of_the_images():
    def fail_later(info):
        if info.images_done:
            raise KeyError("the caller's own")

    images = sample_iter(GaussianTarget(), LABELS, max_slots=2, schedule=STEPS, callback=fail_later)
    with pytest.raises(KeyError, match="the caller's own"):
        next(images)
    rounds = images.stats.rounds_per_image.sum()
    assert rounds >= images.stats.target_calls > 0, "what was done until then is counted"
    with pytest.raises(
        RuntimeError, match="^sample_iter: the run ended with KeyError: .*; the images left need another"
    ):
        next(images)


def test_an_iterator_moves_between_inference_mode_and_outside():
    target = GaussianTarget()
    expected = sample(target, LABELS, schedule=STEPS, seed=3).samples
    with torch.inference_mode():
        images = sample_iter(target, LABELS, max_slots=2, schedule=STEPS, seed=3)
        found = [next(images)]
    found.append(next(images))
    with torch.inference_mode():
        found += images
    for index, image in found:
        torch.testing.assert_close(image, expected[index])
    assert len(found) == len(LABELS)


def test_errors_come_at_once():
    target = GaussianTarget()
    with pytest.raises(ValueError, match="^sample_iter: max_slots must be"):
        sample_iter(target, LABELS, max_slots=0)
    with pytest.raises(ValueError, match="^sample_iter: draft_length must be an int or 'auto'"):
        sample_iter(target, LABELS, draft_length="longest")
    with pytest.raises(TypeError, match="^sample_iter: settings must be arguments of sample, got 'drafted'"):
        sample_iter(target, LABELS, drafted=3)
