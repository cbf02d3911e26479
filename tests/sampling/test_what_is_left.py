"""What a run leaves behind, and what it takes from its caller: weights, buffers, knowledge, devices."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import numpy as np
import pytest
import torch
from analytic import BiasedDrafter, GaussianTarget
from conditioned import ConditionedGaussian, some_conditions
from torch import nn

from free_kernels import (
    DDPMSchedule,
    FeatureDrafter,
    FlowSDESchedule,
    HookTarget,
    PhiloxNoise,
    TensorNoise,
    ancestral_sample,
    estimate_memory,
    sample,
    sample_iter,
)
from free_kernels.drafters import DrafterConfig
from free_kernels.steering import length_policy

STEPS = DDPMSchedule(10)
LABELS = torch.arange(5) % 3


class StartingDrafter(nn.Module):
    """Drafts a first step from a weight of its own."""

    drafts_first_step = True

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.zeros(1, 16, 2))

    def initial_feature(self, state):
        return self.start.expand(len(state), -1, -1)

    def forward(self, feature, previous, state, t, y):
        return feature


@pytest.mark.parametrize("slots", [1, 2, 5])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_run_does_not_write_to_a_drafters_weights(slots, guidance):
    drafter, given = StartingDrafter(), {"max_slots": slots, "guidance_scale": guidance, "schedule": STEPS}
    first = sample(GaussianTarget(), LABELS, drafter=drafter, **given).samples
    assert not drafter.start.any()
    assert torch.equal(sample(GaussianTarget(), LABELS, drafter=drafter, **given).samples, first)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x, t, y):
        return self.outer(self.inner(x.flatten(1).unsqueeze(1))).view_as(x)


def hooked() -> HookTarget:
    module = Small().eval()

    def head(h, t, y):
        return module.outer(h.flatten(1)).view(-1, 1, 4, 4)

    shapes = {"latent_shape": (1, 4, 4), "feature_shape": (1, 16)}
    return HookTarget(module, "inner", head, **shapes, num_classes=3, learns_variance=False)


def test_the_module_of_a_hook_target_is_freed():
    target = hooked()
    sample(target, LABELS, schedule=STEPS)
    left = weakref.ref(target.module)
    del target
    gc.collect()
    assert left() is None


def test_what_a_hook_target_was_compared_with_is_not_pickled():
    target = hooked()
    for _ in range(2):
        pickle.loads(pickle.dumps(target._known))
        sample(target, LABELS, schedule=STEPS)
    copied = pickle.loads(pickle.dumps(target._known))
    assert target._known
    assert not copied
    # A copy of the target for one run's conditions knows what the target knows.
    assert copy.copy(target)._known is target._known


class Owner:
    """What knowledge is kept for, in the place of a target's module."""


def kept(owner: object) -> dict:
    return length_policy._KNOWN[owner]


def test_what_auto_learned_stays_with_the_callers_drafter():
    target, conditions = ConditionedGaussian((8, 1)), some_conditions(3, 8)
    target.module = Owner()
    drafter = FeatureDrafter((8, 1), (8, 2), 0, DrafterConfig(width=32), condition_width=16)
    for seed in range(3):
        sample(target, conditions, drafter=drafter, schedule=STEPS, draft_length="auto", seed=seed)
    (only,) = kept(target.module).values()
    assert only.drafter is drafter
    assert only.round > 0


def test_what_auto_learned_is_of_the_drafter_behind_a_wrapper():
    target = GaussianTarget()
    target.module = Owner()
    drafter = FeatureDrafter((1, 4, 4), (16, 2), 3, DrafterConfig(width=32))
    for wrapped in (drafter, nn.DataParallel(drafter), nn.DataParallel(drafter)):
        sample(target, LABELS, drafter=wrapped, schedule=STEPS, draft_length="auto")
    (only,) = kept(target.module).values()
    assert only.drafter is drafter


def test_what_auto_learned_is_bounded(monkeypatch):
    owner, drafters = Owner(), [BiasedDrafter(GaussianTarget()) for _ in range(5)]
    monkeypatch.setattr(length_policy, "_MOST_KEPT", 3)

    def knowledge(number: int) -> length_policy.Knowledge:
        return length_policy.knowledge_of(owner, drafters[number], (), 10, 1)

    first = [knowledge(number) for number in range(3)]
    assert knowledge(0) is first[0]
    knowledge(3)
    # The one that was asked for longest ago made room.
    assert [knowledge(number) is first[number] for number in (0, 2)] == [True, True]
    assert knowledge(1) is not first[1]
    assert len(kept(owner)) == 3


def test_what_auto_learned_is_of_a_level_of_guidance():
    target, drafter = GaussianTarget(), BiasedDrafter(GaussianTarget())
    target.module = Owner()

    def run(scale) -> int:
        settings = {"drafter": drafter, "schedule": STEPS, "draft_length": "auto", "guidance_scale": scale}
        sample(target, LABELS, **settings)
        return len(kept(target.module))

    alike = (3.0, 3.1, torch.full((5,), 3.2), torch.linspace(2.9, 3.1, 5), lambda k: 3.0 + 0.1 * (k == 1))
    assert [run(scale) for scale in alike] == [1] * 5
    assert [run(scale) for scale in (1.0, 9.0)] == [2, 3]


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), torch.device("cpu", 0)])
def test_a_target_may_name_its_device_in_any_way(device):
    target = GaussianTarget((1, 4, 4))
    target.device = device
    drafter = FeatureDrafter((1, 4, 4), (16, 2), 3, DrafterConfig(width=32))
    sample(target, LABELS, drafter=drafter, schedule=STEPS)
    # Negative control: on another one.
    with pytest.raises(ValueError, match="drafter must be on cpu.* like the target, got one on meta"):
        sample(target, LABELS, drafter=drafter.to("meta"), schedule=STEPS)


class Exploding(GaussianTarget):
    """Finite outputs of which image 1 has a variance beyond all numbers at step 3."""

    def head(self, h, t, y):
        output = super().head(h, t, y)
        output[:, 1:] = torch.where(((t == STEPS.timesteps[3]) & (y == 1)).view(-1, 1, 1, 1), 1e5, output[:, 1:])
        # A network that bounds its input hides what went before.
        return output.nan_to_num()

    def features(self, x, t, y):
        return super().features(x.nan_to_num(0.0, 0.0, 0.0).clamp(-5, 5), t, y)


@pytest.mark.parametrize(
    ("sampler", "settings"),
    [(ancestral_sample, {}), (sample, {"draft_length": 1}), (sample, {"draft_length": "auto"})],
    ids=["ancestral", "one", "auto"],
)
def test_a_state_beyond_all_numbers_is_named(sampler, settings, monkeypatch):
    # Where "auto" begins with drafts, these name the step as well.
    monkeypatch.setattr(length_policy, "UNKNOWN_ACCEPTANCE", 0.0)
    target = Exploding(learns_variance=True)
    with pytest.raises(FloatingPointError, match=f"^{sampler.__name__}: .* at step 3 of image 1"):
        sampler(target, LABELS, schedule=STEPS, **settings)


def test_an_interrupt_ends_an_iterator_wherever_it_comes(monkeypatch):
    images = sample_iter(GaussianTarget(), LABELS, max_slots=2, schedule=STEPS)
    next(images)
    clone = torch.Tensor.clone

    def interrupted(tensor, **given):
        monkeypatch.setattr(torch.Tensor, "clone", clone)
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.Tensor, "clone", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(images)
    with pytest.raises(RuntimeError, match="the run ended with KeyboardInterrupt"):
        list(images)


@pytest.mark.parametrize("which", ["labels", "scales"])
def test_a_caller_may_use_buffers_again_while_iterating(which):
    given = {"labels": torch.arange(30) % 3, "scales": torch.linspace(1.0, 3.0, 30)}
    settings = {"schedule": STEPS, "seed": 4}
    want = sample(GaussianTarget(), given["labels"].clone(), guidance_scale=given["scales"].clone(), **settings).samples
    images = sample_iter(GaussianTarget(), given["labels"], guidance_scale=given["scales"], max_slots=2, **settings)
    found = [next(images)]
    given[which].fill_(1)
    for index, image in [*found, *images]:
        torch.testing.assert_close(image, want[index], rtol=1e-4, atol=1e-4)


def test_image_keys_do_not_wrap_around():
    sample(GaussianTarget(), LABELS, schedule=STEPS, noise=PhiloxNoise(0, first_image=2**32 - 5))
    with pytest.raises(ValueError, match=r"^sample: noise.first_image must be at most 2\*\*32 - 5 for 5 images"):
        sample(GaussianTarget(), LABELS, schedule=STEPS, noise=PhiloxNoise(0, first_image=2**32 - 4))
    for make in (lambda: PhiloxNoise(0, backend="foo"), lambda: TensorNoise(torch.zeros(2, 1, 4, 4), 0, backend="foo")):
        with pytest.raises(ValueError, match="backend must be one of"):
            make()


def test_both_samplers_have_stats_of_one_form():
    ordinary, drafted = (
        sampler(GaussianTarget(), LABELS, schedule=STEPS).stats for sampler in (ancestral_sample, sample)
    )
    for name in ("rounds_per_image", "tested_by_step", "uncertainty_by_step", "bias_bound_per_image"):
        assert getattr(ordinary, name).shape == getattr(drafted, name).shape, name
    assert np.isnan(ordinary.uncertainty_by_step).all()
    assert not ordinary.bias_bound_per_image.any()


@pytest.mark.parametrize("call", [sample, ancestral_sample, sample_iter, estimate_memory])
def test_a_warning_names_the_callers_line(call):
    with pytest.warns(UserWarning, match="holds none of the steps' times") as caught:
        call(GaussianTarget(), class_labels=LABELS, schedule=STEPS, guidance_scale=2.0, guidance_interval=(2000, 3000))
    assert {warning.filename for warning in caught} == {__file__}


def test_schedules_do_not_follow_the_default_device():
    scheduler = pytest.importorskip("diffusers").DDPMScheduler()
    from free_kernels import schedule_from_diffusers

    torch.set_default_device("meta")
    try:
        made = [DDPMSchedule(5), FlowSDESchedule(5), schedule_from_diffusers(scheduler, 5)]
        tables = [schedule.table(schedule.resolve_variance(False)) for schedule in made]
    finally:
        torch.set_default_device(None)
    assert {table.device.type for table in tables} == {"cpu"}
