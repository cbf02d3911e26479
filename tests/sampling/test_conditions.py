"""Conditions of any kind: their law, their places, how they are stored, and what is refused."""

from __future__ import annotations

import pytest
import torch
from analytic import DETECTED, FALSE_ALARM, BiasedDrafter, energy_p_value
from conditioned import ConditionedGaussian, some_conditions

import free_kernels
from free_kernels import DDPMSchedule
from free_kernels.conditions import bind

SCHEDULE = DDPMSchedule(num_steps=8)
ELEMENTS, COPIES = 8, 1500


def mapped(conditions, function):
    data = {name: function(value) for name, value in conditions["data"].items()}
    return {"data": data, "mask": function(conditions["mask"])}


class Drafting(BiasedDrafter):
    """The biased drafter of the target that the sampler's conditions make, of which it knows the pooled vectors."""

    def conditioned(self, pooled):
        bound = ConditionedGaussian(self.target.latent_shape, self.target.learns_variance)
        bound.means, bound.stds = pooled.chunk(2, 1)
        bound.tilt = torch.zeros_like(bound.means)
        return BiasedDrafter(bound, self.eps_bias, self.variance_bias)


@pytest.mark.parametrize("guidance", [1.0, 1.6])
@pytest.mark.parametrize("neighbours", [False, True])
def test_law_of_every_image_is_its_conditions(guidance, neighbours, monkeypatch):
    """Ragged dicts with refill of slots and refused rows; rows that read their neighbour's condition are found."""
    target, conditions = ConditionedGaussian((4, 2)), some_conditions(2, ELEMENTS)
    null = None if guidance == 1.0 else mapped(some_conditions(1, ELEMENTS, seed=9), lambda value: value[0])
    if neighbours:
        features = ConditionedGaussian.features
        monkeypatch.setattr(ConditionedGaussian, "features", lambda self, x, t, y: features(self, x, t, y.roll(1)))
    found = free_kernels.sample(
        target,
        mapped(conditions, lambda value: value.repeat(COPIES, *[1] * (value.ndim - 1))),
        null_condition=null,
        guidance_scale=guidance,
        schedule=SCHEDULE,
        drafter=Drafting(target),
        seed=3,
        max_slots=700,
        draft_length=4,
    )
    assert 0.05 < found.stats.acceptance < 0.95
    bound, _ = bind("test", target, conditions, null_condition=null)
    p_values = [
        energy_p_value(found.samples[image::2], *bound.final_law(SCHEDULE, image, guidance)) for image in range(2)
    ]
    assert max(p_values) < DETECTED if neighbours else min(p_values) > FALSE_ALARM
