"""Conditions of any kind: their law, their places, how they are stored, and what is refused."""

from __future__ import annotations

import pytest
import torch
from analytic import DETECTED, FALSE_ALARM, BiasedDrafter, GaussianTarget, energy_p_value
from conditioned import ConditionedGaussian, null_of, some_conditions
from torch import nn

import free_kernels
from free_kernels import Conditions, DDPMSchedule, DrafterConfig, FeatureDrafter, HookTarget
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
    null = None if guidance == 1.0 else null_of(some_conditions(1, ELEMENTS, seed=9))
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


class Worded(nn.Module):
    """Actions ``[R, 3, 2]`` conditioned on words ``[R, W, 4]`` with a mask ``[R, W]``."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.words, self.leave = nn.Linear(2, 8), nn.Linear(4, 8), nn.Linear(8, 2)
        self.time, self.hidden, self.given = nn.Linear(1, 8), nn.Identity(), []

    def forward(self, x, t, conditions):
        self.given.append(conditions["words"])
        text = (self.words(conditions["words"]) * conditions["mask"].unsqueeze(-1)).sum(1, keepdim=True)
        return self.leave(self.hidden(torch.tanh(self.enter(x) + text + self.time(t.view(-1, 1, 1) / 1000))))


def worded(**settings):
    module = Worded().eval().requires_grad_(False)
    return HookTarget(
        module,
        "hidden",
        lambda h, t, conditions: module.leave(h),
        latent_shape=(3, 2),
        feature_shape=(3, 8),
        num_classes=None,
        learns_variance=False,
        pooled=lambda conditions: conditions["words"].mean(1),
        **settings,
    )


def texts(count, words=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "words": torch.randn(count, words, 4, generator=generator),
        "mask": torch.arange(words) < torch.randint(1, words + 1, (count, 1), generator=generator),
    }


def null_text():
    return {"words": torch.zeros(5, 4), "mask": torch.ones(5).bool()}


RUN = {"schedule": SCHEDULE, "draft_length": 4, "seed": 2}


def test_an_image_does_not_depend_on_the_images_beside_it():
    target, many = worded(), texts(6)
    settings = RUN | {
        "guidance_scale": 1.5,
        "null_condition": {"words": torch.zeros(5, 4), "mask": torch.ones(5).bool()},
    }
    together = free_kernels.sample(target, many, max_slots=4, **settings).samples
    one_by_one = {
        image.index: image.sample for image in free_kernels.sample_iter(target, many, max_slots=2, **settings)
    }
    ordinary = free_kernels.sample(target, many, **settings | {"draft_length": 1}).samples
    first = free_kernels.sample(target, {name: value[:1] for name, value in many.items()}, **settings).samples
    # Networks round alike in batches of any size only to a few bits, and a test may then decide otherwise.
    for other in (torch.stack([one_by_one[index] for index in range(6)]), ordinary):
        assert other.shape == together.shape == (6, 3, 2)
    torch.testing.assert_close(first[0], together[0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(one_by_one[5], together[5], rtol=1e-3, atol=1e-4)
    padded = {
        "words": torch.cat([many["words"], torch.full((6, 3, 4), 7.0)], 1),
        "mask": torch.cat([many["mask"], torch.zeros(6, 3).bool()], 1),
    }
    null = {"words": torch.zeros(8, 4), "mask": torch.arange(8) < 5}
    again = free_kernels.sample(target, padded, **settings | {"null_condition": null, "max_slots": 4}).samples
    torch.testing.assert_close(again, together, rtol=1e-3, atol=1e-4)


def test_rows_of_the_only_image_share_its_memory():
    target, one = worded(), texts(1)
    free_kernels.sample(target, one, **RUN)
    rows = [given for given in target.module.given if len(given) > 1]
    assert rows
    shared = one["words"].untyped_storage().data_ptr()
    assert all(given.untyped_storage().data_ptr() == shared for given in rows if len(given) == 4)


def test_the_targets_own_null_condition_and_another():
    own, other = worded(null_condition=null_text()), worded()
    settings = RUN | {"guidance_scale": 2.0}
    wanted = free_kernels.sample(own, texts(3), **settings).samples
    assert torch.equal(free_kernels.sample(other, texts(3), null_condition=null_text(), **settings).samples, wanted)
    replaced = {"words": torch.ones(1, 5, 4), "mask": torch.ones(1, 5).bool()}
    assert not torch.equal(free_kernels.sample(own, texts(3), null_condition=replaced, **settings).samples, wanted)
    with pytest.raises(ValueError, match="^sample: null_condition must be given with guidance_scale 2, got None"):
        free_kernels.sample(other, texts(3), **settings)


@pytest.mark.parametrize("pooled", [lambda c: c["words"].mean(), lambda c: c["words"][:1, 0], lambda c: c["words"]])
def test_pooled_vectors_are_one_for_each_condition(pooled):
    target = worded()
    target._pooled = pooled
    drafter = FeatureDrafter((3, 2), (3, 8), 0, DrafterConfig(width=32, head_dim=32), condition_width=4)
    with pytest.raises(
        ValueError, match=r"^sample: target.pooled must be floating point \[3 or 4, P\], a vector for each"
    ):
        free_kernels.sample(target, texts(3), drafter=drafter.requires_grad_(False), **RUN)


def test_a_drafter_is_shown_pooled_conditions(tmp_path):
    target = worded()
    drafter = FeatureDrafter((3, 2), (3, 8), 0, DrafterConfig(width=32, head_dim=32), condition_width=4)
    for parameter in drafter.requires_grad_(False).parameters():
        parameter.normal_(std=0.2)
    drafter.save(tmp_path / "drafter.safetensors")
    loaded = FeatureDrafter.load(tmp_path / "drafter.safetensors", target)
    assert loaded.condition_width == 4
    assert free_kernels.sample(target, texts(3), drafter=loaded, **RUN).samples.shape == (3, 3, 2)
    bound, _ = bind("test", target, texts(3))
    assert bound.pooled.shape == (3, 4)
    y = torch.tensor([2, 0])
    for in_tables in (False, True):
        once = loaded.conditioned(bound.pooled)
        once = once.hoisted(SCHEDULE.timesteps, torch.arange(3)) if in_tables else once
        feature = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
        state = torch.randn(2, 3, 2, generator=torch.Generator().manual_seed(1))
        together = once(feature, state, state, SCHEDULE.timesteps[[3, 3]], y)
        alone = once(feature[1:], state[1:], state[1:], SCHEDULE.timesteps[[3]], y[1:])
        torch.testing.assert_close(together[1:], alone)
        assert not torch.allclose(together[0], once(feature, state, state, SCHEDULE.timesteps[[3, 3]], y.flip(0))[0])


@pytest.mark.parametrize("labels", ["one by one", "auto"])
def test_other_samplers_take_conditions(labels):
    target, many = worded(), texts(4)
    ordinary = free_kernels.ancestral_sample(target, many, schedule=SCHEDULE, seed=2).samples
    single = free_kernels.sample(target, many, **RUN | {"draft_length": 1}).samples
    torch.testing.assert_close(single, ordinary, rtol=1e-4, atol=1e-4)
    if labels == "auto":
        assert free_kernels.sample(target, many, **RUN | {"draft_length": "auto"}).samples.shape == (4, 3, 2)
    found = free_kernels.feasibility(
        target, SCHEDULE, conditions=many, images=2, positions=2, rounds=2, timing_repeats=2
    )
    assert found.images == 2
    memory = free_kernels.estimate_memory(target, texts(1), schedule=SCHEDULE, draft_length=4)
    assert memory.states == 2 * 6 * 4


def test_class_labels_are_the_shorthand():
    target = GaussianTarget((4, 2))
    labels = torch.tensor([0, 2])
    by_name, first = (
        free_kernels.sample(target, *given, schedule=SCHEDULE, draft_length=3, **named).samples
        for given, named in (((), {"class_labels": labels}), ((labels,), {}))
    )
    assert torch.equal(by_name, first)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({}, ValueError, "conditions or class_labels must be given, one of them, got neither"),
        (
            {"conditions": texts(2), "class_labels": torch.tensor([0])},
            ValueError,
            "conditions or class_labels must .* both",
        ),
        (
            {"class_labels": torch.tensor([0])},
            ValueError,
            "class_labels must be None for HookTarget, which takes conditions",
        ),
        ({"conditions": {}}, ValueError, "conditions must be a tensor .* got an empty dict"),
        ({"conditions": [1]}, TypeError, r"conditions must be a tensor \[N, \.\.\.\] or a dict of them, got \[1\]"),
        ({"conditions": {"words": 3}}, TypeError, r"conditions\['words'\] must be a tensor"),
        ({"conditions": {3: torch.zeros(2)}}, TypeError, "conditions must be a dict with strings as names, got 3"),
        (
            {"conditions": {"words": torch.tensor(1.0)}},
            ValueError,
            r"conditions\['words'\] must be \[N, \.\.\.\] with N >= 1",
        ),
        (
            {"conditions": {"words": torch.zeros(2, 5, 4), "more": {"mask": torch.ones(3, 5)}}},
            ValueError,
            r"conditions\['more'\]\['mask'\] must be .* with N = 2 as conditions\['words'\], got float32 \[3, 5\]",
        ),
        (
            {"conditions": texts(2), "null_condition": torch.zeros(5, 4)},
            TypeError,
            r"null_condition must be a dict with 'words', 'mask', got float32 \[5, 4\]",
        ),
        (
            {"conditions": texts(2), "null_condition": {"words": torch.zeros(5, 4)}},
            ValueError,
            r"null_condition must be a dict with 'words', 'mask', got \['words'\]",
        ),
        (
            {"conditions": texts(2), "null_condition": {"words": torch.zeros(4, 4), "mask": torch.ones(5).bool()}},
            ValueError,
            r"null_condition\['words'\] must be float32 \[5, 4\], got float32 \[4, 4\]",
        ),
    ],
)
def test_wrong_conditions_are_named(given, error, message):
    with pytest.raises(error, match=f"^sample: {message}"):
        free_kernels.sample(worded(), **given, **RUN)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (
            {"conditions": {"label": torch.tensor([0])}},
            TypeError,
            "conditions must be class labels, which GaussianTarget takes",
        ),
        (
            {"conditions": torch.tensor([0]), "null_condition": torch.tensor(1)},
            ValueError,
            "null_condition must be None",
        ),
        ({"conditions": torch.tensor([0.5])}, TypeError, r"class_labels must be int64 \[N\]"),
    ],
)
def test_wrong_conditions_of_a_target_of_class_labels(given, error, message):
    with pytest.raises(error, match=f"^sample: {message}"):
        free_kernels.sample(GaussianTarget((4, 2)), **given, **RUN)


def test_a_drafter_of_labels_does_not_fit_conditions():
    labelled = FeatureDrafter((3, 2), (3, 8), 2, DrafterConfig(width=32, head_dim=32))
    with pytest.raises(
        ValueError, match="^sample: drafter must be one made with condition_width 4, got one for class labels"
    ):
        free_kernels.sample(worded(), texts(2), drafter=labelled, **RUN)


def test_conditions_are_looked_up_by_place():
    known = Conditions(
        {"a": torch.arange(6.0).view(3, 2), "b": {"c": torch.tensor([True, False, True])}},
        {"a": torch.full((1, 2), 9.0), "b": {"c": torch.tensor(False)}},
    )
    assert len(known) == 3
    rows = known.rows(torch.tensor([2, 3, 0, 2]))
    assert torch.equal(rows["a"], torch.tensor([[4.0, 5], [9, 9], [0, 1], [4, 5]]))
    assert rows["b"]["c"].tolist() == [True, False, True, True]
    assert known.at(1)["a"].untyped_storage().data_ptr() == known.values["a"].untyped_storage().data_ptr()
    assert torch.equal(known.at(3)["a"], torch.full((2,), 9.0))
    half = known.cast(torch.bfloat16)
    assert half.values["a"].dtype == torch.bfloat16 == half.null["a"].dtype
    assert half.values["b"]["c"].dtype == torch.bool
    assert known.vectors(lambda given: given["a"]).shape == (4, 2)
