"""Drafts of an image's first step, for drafters that bring a stand-in for the parent feature that it lacks."""

from __future__ import annotations

import mutations
import numpy as np
import pytest
import torch
from analytic import DETECTED, FALSE_ALARM, BiasedDrafter, GaussianTarget, PerfectDrafter, law_p_value
from call_by_call import play_call_by_call

import free_kernels.sampling.round
from free_kernels import DDPMSchedule, FeatureDrafter, PhiloxNoise, ancestral_sample, sample, sample_iter
from free_kernels.drafters import DrafterConfig
from free_kernels.ops.coupling import couple
from free_kernels.protocols import first_drafted_step

LABELS = torch.arange(9) % 3
STEPS = DDPMSchedule(20)
STAND_IN = 7.0


class FromTheFirst:
    """A drafter that drafts the first step too, and notes what it is given there."""

    drafts_first_step = True

    def __init__(self, drafter: object) -> None:
        self.drafter, self.seen = drafter, []

    def initial_feature(self, state):
        """STAND_IN plus the state, so that a slot's row is known by its own state."""
        shape = self.drafter.target.feature_shape
        return STAND_IN + state.flatten(1)[:, : shape[0], None].expand(-1, *shape)

    def __call__(self, feature, previous, state, t, y):
        first = t == STEPS.timesteps[0]
        if first.any():
            self.seen.append((feature[first], previous[first], state[first]))
        return self.drafter(feature, previous, state, t, y)


@pytest.fixture(params=[False, True], ids=["fixed", "learned"])
def target(request):
    return GaussianTarget(learns_variance=request.param)


@pytest.mark.parametrize("slots", [None, 2])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("length", [1, 3, 20])
def test_a_perfect_drafter_saves_the_round_of_one_row(target, length, guidance, slots):
    settings = {"schedule": STEPS, "guidance_scale": guidance, "seed": 4, "max_slots": slots}
    expected = ancestral_sample(target, LABELS, **settings)
    drafter = FromTheFirst(PerfectDrafter(target))
    result = sample(target, LABELS, drafter=drafter, draft_length=length, **settings)
    torch.testing.assert_close(result.samples, expected.samples, rtol=1e-5, atol=1e-5)
    assert result.stats.rounds_per_image.tolist() == [-(-20 // length)] * len(LABELS)
    assert result.stats.tested_by_step[0] == (len(LABELS) if length > 1 else 0)
    # Whenever an image enters a slot, its first draft sees the stand-in and its own initial state, twice.
    states = torch.cat([state for _, _, state in drafter.seen]) if drafter.seen else torch.zeros(0, 1, 4, 4)
    assert len(states) == (len(LABELS) * (2 if guidance != 1.0 else 1) if length > 1 else 0)
    for feature, previous, state in drafter.seen:
        assert torch.equal(previous, state)
        assert torch.equal(feature[..., 0], STAND_IN + state.flatten(1))


@pytest.mark.parametrize("verification", ["token", "block"])
@pytest.mark.parametrize("slots", [None, 700])
def test_the_law_is_the_ordinary_samplers(target, verification, slots):
    """Directed and energy test of 3,000 images with drafts refused half of the time, from the first step on."""
    schedule = DDPMSchedule(8, variance="learned_range" if target.learns_variance else "fixed_large")
    biased = BiasedDrafter(target, variance_bias=0.3 if target.learns_variance else 0.0)
    labels = torch.full((3000,), 1)
    settings = {"schedule": schedule, "verification": verification, "max_slots": slots, "seed": 21}
    result = sample(target, labels, drafter=FromTheFirst(biased), **settings)
    assert result.stats.tested_by_step[0] == 3000
    assert 0.05 < result.stats.acceptance_by_step[0] < 0.95
    law = target.final_law(schedule, 1)
    assert law_p_value(result.samples, *law, biased.direction) > FALSE_ALARM


def test_first_drafts_kept_untested_are_found(monkeypatch):
    """Negative controls: with the first step's draft kept on refusals the images have another law."""
    # Of two steps only the first adds noise, so nothing washes it out again.
    schedule, target = DDPMSchedule(2, variance="fixed_large"), GaussianTarget()
    biased = BiasedDrafter(target, eps_bias=0.01)
    law, labels = target.final_law(schedule, 1), torch.full((3000,), 1)
    for mutation in (couple, mutations.draft_kept_on_some_rejections, mutations.always_accept):
        play_call_by_call(monkeypatch)
        monkeypatch.setattr(free_kernels.sampling.round, "couple", mutation)
        torch.manual_seed(0)
        result = sample(target, labels, drafter=FromTheFirst(biased), draft_length=2, schedule=schedule, seed=21)
        p_value = law_p_value(result.samples, *law, biased.direction)
        assert p_value > FALSE_ALARM if mutation is couple else p_value < DETECTED, mutation.__name__


def test_images_do_not_depend_on_the_batch(target):
    drafter = FromTheFirst(BiasedDrafter(target, variance_bias=0.1))
    settings = {"schedule": STEPS, "drafter": drafter, "seed": 8}
    whole = sample(target, LABELS, **settings).samples
    for slots in (1, 2, 4):
        few = sample(target, LABELS, max_slots=slots, **settings).samples
        torch.testing.assert_close(few, whole, rtol=1e-5, atol=1e-5)
    for index, image in sample_iter(target, LABELS, max_slots=2, **settings):
        torch.testing.assert_close(image, whole[index], rtol=1e-5, atol=1e-5)
    alone = sample(target, LABELS[5:6], noise=PhiloxNoise(8, first_image=5), **(settings | {"seed": 0})).samples
    torch.testing.assert_close(alone[0], whole[5], rtol=1e-5, atol=1e-5)


def test_automatic_lengths_draft_it_once_an_ordinary_step_is_timed(target):
    """The first image begins with ordinary steps, which are timed; later ones may draft from their first step on."""
    drafter = FromTheFirst(PerfectDrafter(target))
    expected = ancestral_sample(target, LABELS, schedule=STEPS, seed=3).samples
    for _ in range(2):
        result = sample(target, LABELS, schedule=STEPS, seed=3, drafter=drafter, draft_length="auto", max_slots=1)
        torch.testing.assert_close(result.samples, expected, rtol=1e-5, atol=1e-5)
    plain = PerfectDrafter(target)
    stats = sample(target, LABELS, schedule=STEPS, seed=3, drafter=plain, draft_length="auto", max_slots=1).stats
    assert stats.tested_by_step[0] == 0


@pytest.mark.parametrize("shape", [(9, 16), (8, 16, 2), (9, 16, 3), None])
def test_a_stand_in_of_another_shape_is_refused(shape):
    drafter = FromTheFirst(PerfectDrafter(GaussianTarget()))
    drafter.initial_feature = lambda state: None if shape is None else torch.zeros(shape)
    with pytest.raises(
        (ValueError, TypeError), match=r"^sample: drafter.initial_feature must be \[R, T, D\] = \[9, 16, 2\]"
    ):
        sample(GaussianTarget(), LABELS, schedule=STEPS, drafter=drafter)


def test_a_spoiled_stand_in_is_named():
    drafter = FromTheFirst(BiasedDrafter(GaussianTarget()))
    drafter.drafter = lambda feature, previous, state, t, y: feature
    drafter.drafter.target = None
    drafter.initial_feature = lambda state: torch.full((9, 16, 2), torch.nan)
    with pytest.raises(
        FloatingPointError, match="^sample: the output drafted by drafter and head must be finite.*step 0"
    ):
        sample(GaussianTarget(), LABELS, schedule=STEPS, drafter=drafter)


class TestFeatureDrafter:
    SHAPES = ((2, 8, 8), (16, 12), 5)

    def make(self, **config) -> FeatureDrafter:
        torch.manual_seed(0)
        return FeatureDrafter(*self.SHAPES, DrafterConfig(width=32, **config))

    def test_the_stand_in_is_fitted_by_least_squares(self):
        """Features linear in the patch are found again, up to the ridge; of other patches they are others."""
        drafter = self.make()
        states = torch.randn(64, 2, 8, 8)
        tiles = drafter._tiles(states)
        weights, bias = torch.randn(8, 12), torch.randn(16, 12)
        drafter.set_first_feature(states, tiles @ weights + bias)
        with torch.no_grad():
            torch.testing.assert_close(drafter.initial_feature(states), tiles @ weights + bias, atol=0.2, rtol=0.0)
            wrong = drafter.initial_feature(states.flip(3))
        assert (wrong - (tiles @ weights + bias)).abs().max() > 1.0

    def test_tiles_are_the_patches_in_order(self):
        drafter = self.make()
        state = torch.arange(128.0).view(1, 2, 8, 8)
        tiles = drafter._tiles(state)[0]
        for token in range(16):
            row, column = divmod(token, 4)
            patch = state[0, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            assert torch.equal(tiles[token], patch.flatten())

    def test_it_is_a_choice_that_a_file_keeps(self, tmp_path):
        for chosen in (True, False):
            drafter = self.make(first_step=chosen).eval()
            drafter.save(tmp_path / "drafter.safetensors")
            loaded = FeatureDrafter.load(tmp_path / "drafter.safetensors")
            assert loaded.drafts_first_step is chosen
            assert first_drafted_step(loaded) == 1 - chosen
            assert any(name.startswith("first_") for name in loaded.state_dict()) is chosen
            if chosen:
                state = torch.randn(3, 2, 8, 8)
                assert torch.equal(loaded.initial_feature(state), drafter.initial_feature(state))

    def test_others_draft_no_first_step(self):
        assert first_drafted_step(PerfectDrafter(None)) == 1
        np.testing.assert_array_equal(first_drafted_step("frozen"), 1)
