"""Guidance whose scale depends on step and image: the law is the ordinary sampler's with the same scales."""

from __future__ import annotations

import pytest
import torch
from analytic import DETECTED, FALSE_ALARM, BiasedDrafter, GaussianTarget, law_p_value

import free_kernels.sampling.round
from free_kernels import DDPMSchedule, ancestral_sample, sample

IMAGES, LABEL, STEPS = 3000, 1, 8
INTERVAL = (200.0, 800.0)
# Every other step guides strongly, so that a neighbour's scale gives another law.
BY_STEP = [1.0, 5.0, 0.0, 4.0, 1.0, 6.0, 0.5, 3.0]
BY_IMAGE = torch.tensor([1.0, 2.0, 4.0]).repeat(IMAGES // 3)
LABELS = torch.full((IMAGES,), LABEL)


def inside(schedule: DDPMSchedule, scale: float) -> list[float]:
    """The scale of every step within the interval."""
    return [scale if INTERVAL[0] <= t <= INTERVAL[1] else 1.0 for t in schedule.timesteps.tolist()]


def p_values(samples, target, schedule, scales_of_groups, direction) -> list[float]:
    """Of images 0, 3, ..., of 1, 4, ... and so on, each group against the law of its own scales."""
    return [
        law_p_value(samples[group::3], *target.final_law(schedule, LABEL, scales), direction)
        for group, scales in enumerate(scales_of_groups)
    ]


def setting(kind: str, schedule: DDPMSchedule):
    """Keywords of the sampler, and the scales of every step for each of three groups of images."""
    if kind == "step":
        return {"guidance_scale": lambda step: BY_STEP[step]}, [BY_STEP] * 3
    if kind == "image":
        return {"guidance_scale": BY_IMAGE}, [[float(w)] * STEPS for w in BY_IMAGE[:3]]
    if kind == "interval":
        return {"guidance_scale": 4.0, "guidance_interval": INTERVAL}, [inside(schedule, 4.0)] * 3
    if kind == "both":
        both = {"guidance_scale": lambda step: BY_IMAGE * BY_STEP[step], "guidance_interval": INTERVAL}
        groups = [[float(w) * s for s in BY_STEP] for w in BY_IMAGE[:3]]
        limited = inside(schedule, 0.0)
        return both, [[s if at == 0.0 else 1.0 for s, at in zip(group, limited, strict=True)] for group in groups]
    raise ValueError(kind)


@pytest.mark.parametrize("drafter", ["frozen", "biased"])
@pytest.mark.parametrize("kind", ["step", "image", "interval", "both"])
@pytest.mark.parametrize("variance", ["fixed_large", "learned_range"])
def test_law_is_that_of_the_same_scales(kind, variance, drafter):
    """Rows that were refused draft again, with slots that images leave and enter."""
    target, schedule = (
        GaussianTarget(learns_variance=variance == "learned_range"),
        DDPMSchedule(STEPS, variance=variance),
    )
    biased = BiasedDrafter(target)
    keywords, scales = setting(kind, schedule)
    given = {"schedule": schedule, "drafter": "frozen" if drafter == "frozen" else biased, "max_slots": 700, "seed": 4}
    result = sample(target, LABELS, **given, **keywords)
    assert result.stats.acceptance < 0.9, "some drafts have to be refused"
    assert min(p_values(result.samples, target, schedule, scales, biased.direction)) * 3 > FALSE_ALARM


@pytest.mark.parametrize("kind", ["step", "image", "interval", "both"])
def test_law_of_blocks(kind):
    target, schedule = GaussianTarget(learns_variance=True), DDPMSchedule(STEPS, variance="learned_range")
    biased = BiasedDrafter(target)
    keywords, scales = setting(kind, schedule)
    given = {"schedule": schedule, "drafter": biased, "verification": "block", "max_slots": 700, "seed": 6}
    samples = sample(target, LABELS, **given, **keywords).samples
    assert min(p_values(samples, target, schedule, scales, biased.direction)) * 3 > FALSE_ALARM


@pytest.mark.parametrize("kind", ["step", "image", "interval", "both"])
def test_closed_form_holds_for_the_ordinary_sampler_and_wrong_scales_are_found(kind):
    target, schedule = GaussianTarget(), DDPMSchedule(STEPS)
    direction = BiasedDrafter(target).direction
    keywords, scales = setting(kind, schedule)
    samples = ancestral_sample(target, LABELS, schedule=schedule, seed=7, **keywords).samples
    assert min(p_values(samples, target, schedule, scales, direction)) * 3 > FALSE_ALARM
    # The scales of the next image, and of the step before.
    wrong = scales[1:] + scales[:1] if kind == "image" else [group[-1:] + group[:-1] for group in scales]
    assert min(p_values(samples, target, schedule, wrong, direction)) < DETECTED


@pytest.mark.parametrize("bug", ["step of the first row", "another slot's image"])
def test_scales_of_other_rows_are_found(bug, monkeypatch):
    """A packed call whose rows have scales that are not those of their step and image."""
    target, schedule = GaussianTarget(), DDPMSchedule(STEPS, variance="fixed_large")
    biased = BiasedDrafter(target)
    keywords, scales = setting("step" if bug == "step of the first row" else "image", schedule)
    right = free_kernels.sampling.round.packed_values

    def wrong(values, row_offsets, rows):
        if bug == "step of the first row":
            return right(values[:, :1].expand_as(values), row_offsets, rows)
        return right(values.roll(1, 0), row_offsets, rows)

    monkeypatch.setattr(free_kernels.sampling.round, "packed_values", wrong)
    samples = sample(target, LABELS, schedule=schedule, drafter=biased, seed=4, **keywords).samples
    assert min(p_values(samples, target, schedule, scales, biased.direction)) < DETECTED
