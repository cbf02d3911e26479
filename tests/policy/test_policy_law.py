"""Actions of a conditional Gaussian policy, whose law is known, under the schedule of diffusion policies."""

from __future__ import annotations

import dataclasses

import mutations
import pytest
import torch
from analytic import DETECTED, FALSE_ALARM, BiasedDrafter, law_p_value
from call_by_call import play_call_by_call
from conditioned import ConditionedGaussian, some_conditions

import free_kernels.sampling.round
from free_dit.networks.policy import policy_schedule
from free_kernels.conditions import Conditions

HORIZON, ACTIONS, DECISIONS = 16, 2, 3000
# Clipping would leave the law without a closed form.
SCHEDULE = dataclasses.replace(policy_schedule(), clip_denoised=False)


class Policy(ConditionedGaussian):
    """Chunks of actions; an observation says mean and deviation."""

    def __init__(self):
        super().__init__((HORIZON, ACTIONS))
        self.alphas = torch.from_numpy(SCHEDULE.train_alphas_cumprod).float()


class Drafter(BiasedDrafter):
    """Knows the observation, and is wrong by a constant."""

    def conditioned(self, pooled):
        bound = Policy()
        bound.means, bound.stds = pooled.chunk(2, 1)
        bound.tilt = torch.zeros_like(bound.means)
        return BiasedDrafter(bound, 0.25)


def repeated(value):
    """Decision n of either observation, in turn."""
    if isinstance(value, dict):
        return {name: repeated(part) for name, part in value.items()}
    return value.repeat(DECISIONS, *[1] * (value.ndim - 1))


@pytest.mark.parametrize("wrong", [None, "always accepts", "a fresh draw on refusal", "another's observation"])
def test_law_of_actions(wrong, monkeypatch, uncorrected):
    """Slots are refilled; a wrong sampler is found."""
    observations = some_conditions(2, HORIZON * ACTIONS, seed=4)
    if wrong == "another's observation":
        features = Policy.features
        monkeypatch.setattr(Policy, "features", lambda self, x, t, y: features(self, x, t, y.roll(1)))
    elif wrong is not None:
        torch.manual_seed(0)
        wrongs = {
            "always accepts": mutations.always_accept,
            "a fresh draw on refusal": mutations.fresh_sample_on_rejection,
        }
        play_call_by_call(monkeypatch)
        monkeypatch.setattr(free_kernels.sampling.round, "couple", wrongs[wrong])
    drafter = Drafter(Policy())
    found = free_kernels.sample(
        Policy(), repeated(observations), schedule=SCHEDULE, drafter=drafter, draft_length=8, max_slots=400, seed=7
    )
    bound = Policy().conditioned(Conditions(observations))
    p_values = [
        law_p_value(found.samples[image::2], *bound.final_law(SCHEDULE, image), drafter.direction) for image in range(2)
    ]
    if wrong is None:
        assert 2 < found.stats.call_reduction < 8
        assert min(p_values) > FALSE_ALARM
    else:
        assert max(p_values) < DETECTED
