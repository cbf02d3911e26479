"""What a round does in one call on the CPU is what it does call by call, and done where nothing else is asked for."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from random_networks import CONFIG, random_dit
from round_settings import SETTINGS

from free_dit import load_bundled
from free_kernels import DDPMSchedule, FeatureDrafter, FrozenDrafter, PhiloxNoise, TensorNoise, sample
from free_kernels.drafters import DrafterConfig
from free_kernels.extension import has_extension
from free_kernels.ops.declaration import Op
from free_kernels.sampling import draft_sources, drafting
from free_kernels.sampling import round as round_module
from free_kernels.sampling.job import make_job
from free_kernels.sampling.options import Options
from free_kernels.targets import DiTTarget
from free_kernels.targets.adaln import AdaLNTarget

pytestmark = pytest.mark.skipif(not has_extension(), reason="no compiled extension")
LABELS = torch.arange(5)


@pytest.fixture(scope="module")
def pair():
    return load_bundled("digits")


def run(pair, settings):
    target, drafter = pair
    settings = {"drafter": drafter, "schedule": DDPMSchedule(20), "draft_length": 5, "seed": 3} | settings
    return sample(target, LABELS, **settings)


def call_by_call():
    """Rounds as on a device without such ops."""
    made = round_module.Rounds.__init__

    def separate(self, *arguments, **settings):
        made(self, *arguments, **settings)
        self._at_once = False

    return mock.patch.object(round_module.Rounds, "__init__", separate)


def refusing(name):
    """One of the ops that do several things in one call fails."""
    owner = {"open_keyed_round": drafting, "decide_round": round_module}[name]
    return mock.patch.object(owner, name, mock.Mock(side_effect=AssertionError("not to be called here")))


@pytest.mark.parametrize("name", SETTINGS)
def test_at_once_is_call_by_call(pair, name):
    at_once = run(pair, SETTINGS[name])
    with call_by_call(), refusing("decide_round"), refusing("open_keyed_round"):
        separate = run(pair, SETTINGS[name])
    assert torch.equal(at_once.samples, separate.samples)
    ours, theirs = at_once.stats, separate.stats
    for count in ("target_calls", "target_rows", "drafter_calls", "bias_bound"):
        assert getattr(ours, count) == getattr(theirs, count)
    for counts in ("rounds_per_image", "tested_by_step", "accepted_by_step", "bias_bound_per_image"):
        assert (getattr(ours, counts) == getattr(theirs, counts)).all()
    np.testing.assert_array_equal(ours.uncertainty_by_step, theirs.uncertainty_by_step)


@pytest.mark.parametrize("name", SETTINGS)
def test_drafts_with_the_head_are_those_without(pair, name):
    with mock.patch.object(AdaLNTarget, "drafting_head", return_value=None):
        separate = run(pair, SETTINGS[name])
    assert torch.equal(run(pair, SETTINGS[name]).samples, separate.samples)


def compiled_calls(pair, settings) -> Counter:
    """How often a run calls each compiled op."""
    calls, run_compiled = Counter(), Op.run_compiled

    def counted(self, arguments):
        calls[self.name] += 1
        return run_compiled(self, arguments)

    with mock.patch.object(Op, "run_compiled", counted):
        calls["target calls"] = run(pair, settings).stats.target_calls
    return calls


def test_a_round_of_clean_samples_is_six_calls(pair):
    calls = compiled_calls(pair, {"drafter": "frozen"})
    rounds = calls.pop("target calls")
    # The initial noise, once.
    assert calls.pop("philox_normal") == 1
    # A last round of one row drafts nothing.
    assert rounds - 1 <= calls.pop("replay_drafts_cpu") <= rounds
    assert calls == dict.fromkeys(
        ("open_keyed_round_cpu", "pack_drafts", "table_rows_cpu", "final_layer_cpu", "decide_round_cpu"), rounds
    )


def test_a_draft_calls_the_drafter_and_one_op_more(pair):
    calls = compiled_calls(pair, {"reuse_refused": False})
    drafts = calls["advance_from_features_cpu"]
    assert calls["drafter_network_cpu"] == drafts > 0
    assert "advance_drafts_cpu" not in calls
    assert calls["final_layer_cpu"] == calls["decide_round_cpu"] == calls["target calls"]


class Source:
    """Numbers of another kind."""

    def normal(self, images, steps, purpose, shape, rounds=None):
        return PhiloxNoise(5).normal(images, steps, purpose, shape, rounds)

    def uniform(self, images, steps, purpose, rounds=None):
        return PhiloxNoise(5).uniform(images, steps, purpose, rounds)


class Shifted(PhiloxNoise):
    """Its uniforms are its own, so nobody else may draw them."""

    def uniform(self, images, steps, purpose, rounds=None):
        return super().uniform(images + 1, steps, purpose, rounds)


NOISE = [Source(), Shifted(5), PhiloxNoise(5, backend="reference")]


@pytest.mark.parametrize("noise", NOISE, ids=["source", "uniforms", "reference"])
def test_numbers_of_another_source_are_its_own(pair, noise):
    with refusing("open_keyed_round"):
        run(pair, {"noise": noise})


def test_rounds_that_a_source_draws_itself_are_its_own(pair):
    class Counting(PhiloxNoise):
        rounds = 0

        def of_round(self, *arguments):
            self.rounds += 1
            return super().of_round(*arguments)

    noise = Counting(5)
    with refusing("open_keyed_round"):
        found = run(pair, {"noise": noise})
    assert noise.rounds == found.stats.target_calls
    assert torch.equal(found.samples, run(pair, {"noise": PhiloxNoise(5)}).samples)


@pytest.mark.parametrize("name", ["normal", "uniform", "of_round"])
def test_what_is_put_onto_a_source_is_used(pair, name):
    noise, calls = PhiloxNoise(5), Counter()
    own = getattr(noise, name)

    def put(*arguments):
        calls[name] += 1
        return own(*arguments)

    setattr(noise, name, put)
    with refusing("open_keyed_round"):
        found = run(pair, {"noise": noise})
    assert calls[name] >= found.stats.target_calls


def test_numbers_of_a_tensor_are_the_tensors(pair):
    with refusing("open_keyed_round"):
        run(pair, {"noise": TensorNoise(torch.randn(5, 20, 1, 8, 8, generator=torch.Generator().manual_seed(1)), 3)})


def test_keys_of_images_are_used(pair):
    """Images that are drawn in parts, and under keys of their own, are those of the whole."""
    whole = run(pair, {}).samples
    target, drafter = pair
    settings = {"drafter": drafter, "schedule": DDPMSchedule(20), "draft_length": 5}
    part = sample(target, LABELS[2:], noise=PhiloxNoise(3, first_image=2), **settings).samples
    keys = torch.tensor([4, 0, 3])
    keyed = sample(target, LABELS[keys], noise=PhiloxNoise(3, image_keys=keys), **settings).samples
    # A batch of another size may round its matrix products in another way.
    torch.testing.assert_close(part, whole[2:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(keyed, whole[keys], rtol=1e-4, atol=1e-4)


def test_the_reference_is_call_by_call(pair):
    with refusing("decide_round"), refusing("open_keyed_round"):
        run(pair, {"backend": "reference"})


def test_features_that_come_later_are_not_waited_for(pair):
    """A target whose packed call gives its features later is coupled before."""
    target, drafter = pair
    order = []

    class Late:
        def __getattr__(self, name):
            return getattr(target, name)

        def hoisted(self, timesteps, labels):
            return self

        def packed_call(self, x, t, y):
            features = target.features(x, t, y)

            def wait():
                order.append("features")
                return features

            return target.head(features, t, y), wait

    couple = round_module.couple

    def noted(*arguments, **settings):
        order.append("couple")
        return couple(*arguments, **settings)

    with refusing("decide_round"), mock.patch.object(round_module, "couple", noted):
        run((Late(), drafter), {})
    assert order[:4] == ["couple", "features"] * 2


def drafting_head(target, schedule=DDPMSchedule(20), **settings):
    options = Options(schedule=schedule, drafter=FrozenDrafter(), draft_length=5, **settings)
    return make_job("sample", target, LABELS % 3, options).hoisted().drafting_head()


def test_whose_heads_draft(pair):
    """Those that are nothing but the parts that the op knows, and whose output is used whole."""
    target, _ = pair
    with torch.no_grad():
        assert drafting_head(target) is not None
        assert drafting_head(target, backend="reference") is None
        assert drafting_head(target, guidance_scale=2.0) is not None
        # Scales that differ by step are mixed between head and draft.
        assert drafting_head(target, guidance_scale=2.0, guidance_interval=(100, 800)) is None
    # It has no derivative.
    assert drafting_head(target) is None
    with torch.no_grad():
        # Half of the output is not used.
        assert drafting_head(target, DDPMSchedule(20, variance="fixed_small")) is None
        with torch.autocast("cpu"):
            assert drafting_head(target) is None


@pytest.mark.parametrize("learned", [False, True])
def test_drafts_of_a_target_with_several_channels(learned):
    target = DiTTarget(random_dit(replace(CONFIG, learn_sigma=learned)))
    config = DrafterConfig(width=32, head_dim=16)
    drafter = FeatureDrafter(target.latent_shape, target.feature_shape, target.num_classes, config)
    settings = {"schedule": DDPMSchedule(12), "drafter": drafter.eval().requires_grad_(False), "draft_length": 4}
    found = sample(target, LABELS % 5, **settings)
    with mock.patch.object(AdaLNTarget, "drafting_head", return_value=None):
        separate = sample(target, LABELS % 5, **settings)
    assert torch.equal(found.samples, separate.samples)
    with mock.patch.object(drafting.DraftingPass, "advance", side_effect=AssertionError("the head drafts")):
        sample(target, LABELS % 5, **settings)


def test_a_head_of_the_callers_drafts(pair):
    """A subclass's head is called for every draft, and so is one that was put onto a target."""
    target, drafter = pair
    calls = Counter()

    class Watched(DiTTarget):
        def head(self, h, t, y):
            calls["subclass"] += 1
            return super().head(h, t, y)

    found = run((Watched(target.module), drafter), {})
    assert calls["subclass"] > found.stats.target_calls
    assert torch.equal(found.samples, run(pair, {}).samples)
    own = DiTTarget(target.module)
    head = own.head

    def put(h, t, y):
        calls["put"] += 1
        return head(h, t, y)

    own.head = put
    with torch.no_grad():
        assert drafting_head(own) is None


def test_drafts_of_a_drafter_of_another_dtype_are_cast(pair):
    """Features that are no float32 are cast before the head, which is the target's."""
    target, drafter = pair

    class Half:
        def __call__(self, feature, previous, state, t, y):
            return drafter(feature.float(), previous, state, t, y).to(torch.bfloat16)

        def __getattr__(self, name):
            return getattr(drafter, name)

        def hoisted(self, timesteps, labels):
            return self

    settings = {"reuse_refused": False}
    found = run((target, Half()), settings)
    with mock.patch.object(AdaLNTarget, "drafting_head", return_value=None):
        assert torch.equal(found.samples, run((target, Half()), settings).samples)


def test_the_drafts_head_is_asked_for_once_a_pass(pair):
    asked = Counter()
    whole = draft_sources.Job.drafting_head

    def counted(self):
        asked["head"] += 1
        return whole(self)

    with mock.patch.object(draft_sources.Job, "drafting_head", counted):
        stats = run(pair, {"reuse_refused": False}).stats
    assert 0 < asked["head"] <= stats.target_calls
