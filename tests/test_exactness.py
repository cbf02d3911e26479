"""The law of whole runs against closed forms, with a drafter that is wrong half of the time.

Each test has negative controls: couplings with a bug (tests/mutations.py) that the same statistic has to find.
"""

from __future__ import annotations

import mutations
import pytest
import torch
from analytic import DETECTED, FALSE_ALARM, BiasedDrafter, GaussianTarget, law_p_value

import free_kernels.sampler
from free_kernels import DDPMSchedule, ancestral_sample, sample

IMAGES = 3000
LABEL = 1


def run(target, schedule, drafter, guidance=1.0, seed=11, **settings):
    labels = torch.full((IMAGES,), LABEL)
    return sample(target, labels, schedule=schedule, drafter=drafter, guidance_scale=guidance, seed=seed, **settings)


def setting(variance: str, steps: int = 8, variance_bias: float = 0.1):
    learned = variance == "learned_range"
    target = GaussianTarget(learns_variance=learned)
    drafter = BiasedDrafter(target, variance_bias=variance_bias if learned else 0.0)
    return target, DDPMSchedule(steps, variance=variance), drafter


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_law_is_the_ordinary_samplers(variance, guidance):
    target, schedule, drafter = setting(variance)
    law = target.final_law(schedule, LABEL, guidance)
    result = run(target, schedule, drafter, guidance)
    assert 0.2 < result.stats.acceptance < 0.8, "the drafter has to be bad enough to exercise reflection"
    assert law_p_value(result.samples, *law, drafter.direction) > FALSE_ALARM


@pytest.mark.parametrize("variance", ["fixed_small", "learned_range"])
def test_closed_form_law_holds_for_the_ordinary_sampler(variance):
    target, schedule, drafter = setting(variance)
    labels = torch.full((IMAGES,), LABEL)
    result = ancestral_sample(target, labels, schedule=schedule, seed=5)
    assert law_p_value(result.samples, *target.final_law(schedule, LABEL), drafter.direction) > FALSE_ALARM


@pytest.mark.parametrize(
    ("variance", "mutation"),
    [
        ("fixed_large", mutations.wrong_reflection_sign),
        ("fixed_large", mutations.fresh_sample_on_rejection),
        ("fixed_large", mutations.draft_kept_on_some_rejections),
        ("fixed_large", mutations.always_accept),
        ("learned_range", mutations.fresh_sample_on_rejection),
        ("learned_range", mutations.draft_kept_on_some_rejections),
        ("learned_range", mutations.target_variance_on_both_sides),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_wrong_couplings_are_found(variance, mutation, monkeypatch):
    target, schedule, drafter = setting(variance, variance_bias=0.3)
    torch.manual_seed(0)
    monkeypatch.setattr(free_kernels.sampler, "couple", mutation)
    result = run(target, schedule, drafter)
    assert law_p_value(result.samples, *target.final_law(schedule, LABEL), drafter.direction) < DETECTED


def test_noise_that_was_looked_at_must_not_be_reused(monkeypatch):
    """A reflection whose noise the next step uses again, as if keyed by image alone, changes the law."""
    target, schedule, drafter = setting("fixed_large")
    original = free_kernels.sampler._Chain.draw

    def one_noise_for_all_steps(chain, purpose, images, steps):
        return original(chain, purpose, images, torch.zeros_like(steps))

    monkeypatch.setattr(free_kernels.sampler._Chain, "draw", one_noise_for_all_steps)
    result = run(target, schedule, drafter)
    assert law_p_value(result.samples, *target.final_law(schedule, LABEL), drafter.direction) < DETECTED


@pytest.mark.parametrize("draft_length", [1, 2, 3, 8])
def test_law_for_every_draft_length_and_few_slots(draft_length):
    target, schedule, drafter = setting("learned_range")
    result = run(target, schedule, drafter, draft_length=draft_length, max_slots=701, seed=3 + draft_length)
    assert law_p_value(result.samples, *target.final_law(schedule, LABEL), drafter.direction) > FALSE_ALARM


def test_infeasible_variances_fall_back_to_a_direct_draw():
    """A drafter whose variance is far too large refuses whole rows (no shared slack exists) and stays exact."""
    target = GaussianTarget(learns_variance=True)
    drafter = BiasedDrafter(target, eps_bias=0.2, variance_bias=30.0)
    schedule = DDPMSchedule(8)
    result = run(target, schedule, drafter)
    assert result.stats.acceptance < 0.5
    assert law_p_value(result.samples, *target.final_law(schedule, LABEL), drafter.direction) > FALSE_ALARM
