"""``sample`` as its users see it: determinism, perfect drafters, ragged batches, stats, errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from analytic import BiasedDrafter, GaussianTarget, PerfectDrafter

from free_kernels import (
    DDPMSchedule,
    FeatureDrafter,
    PhiloxNoise,
    RoundInfo,
    TensorNoise,
    ancestral_sample,
    sample,
)
from free_kernels.extension import has_extension

LABELS = torch.arange(9) % 3
STEPS = DDPMSchedule(20)


@pytest.fixture(params=[False, True], ids=["fixed", "learned"])
def target(request):
    return GaussianTarget(learns_variance=request.param)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("draft_length", [1, 3, 6, 20])
def test_a_perfect_drafter_returns_the_ordinary_images(target, guidance, draft_length):
    settings = {"schedule": STEPS, "guidance_scale": guidance, "seed": 4}
    expected = ancestral_sample(target, LABELS, **settings)
    drafter = PerfectDrafter(target)
    result = sample(target, LABELS, drafter=drafter, draft_length=draft_length, **settings)
    torch.testing.assert_close(result.samples, expected.samples, rtol=1e-5, atol=1e-5)
    assert result.stats.acceptance == 1.0 or draft_length == 1
    # The first round has no parent feature and is a single row.
    assert result.stats.rounds_per_image.tolist() == [1 + -(-19 // draft_length)] * len(LABELS)


def test_a_wrong_drafter_returns_other_images_of_the_same_law(target):
    drafter = BiasedDrafter(target, variance_bias=0.1)
    expected = ancestral_sample(target, LABELS, schedule=STEPS)
    result = sample(target, LABELS, schedule=STEPS, drafter=drafter)
    assert not torch.allclose(result.samples, expected.samples, atol=1e-3)
    assert 0 < result.stats.acceptance < 1


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_an_image_does_not_depend_on_batch_or_slots(target, guidance):
    """Alone, in a batch, or in any slot: an image is that of its seed and index."""
    drafter = BiasedDrafter(target, variance_bias=0.1)
    settings = {"schedule": STEPS, "drafter": drafter, "guidance_scale": guidance, "seed": 8}
    whole = sample(target, LABELS, **settings).samples
    for slots in (1, 2, 4):
        few = sample(target, LABELS, max_slots=slots, **settings).samples
        torch.testing.assert_close(few, whole, rtol=1e-5, atol=1e-5)
    for index in (0, 5):
        source = PhiloxNoise(8, first_image=index)
        alone = sample(target, LABELS[index : index + 1], noise=source, **settings).samples
        torch.testing.assert_close(alone[0], whole[index], rtol=1e-5, atol=1e-5)


def test_order_of_labels_only_permutes_the_noise_keys(target):
    """With the noise brought along, permuting the images permutes the results."""
    drafter = BiasedDrafter(target, variance_bias=0.1)
    order = torch.randperm(len(LABELS), generator=torch.Generator().manual_seed(0))

    class Permuted(PhiloxNoise):
        def normal(self, images, steps, purpose, shape, rounds=None):
            return super().normal(order[images], steps, purpose, shape, rounds)

        def uniform(self, images, steps, purpose, rounds=None):
            return super().uniform(order[images], steps, purpose, rounds)

    plain = sample(target, LABELS, schedule=STEPS, drafter=drafter, seed=2)
    permuted = sample(target, LABELS[order], schedule=STEPS, drafter=drafter, noise=Permuted(2))
    torch.testing.assert_close(permuted.samples, plain.samples[order], rtol=1e-5, atol=1e-5)


def test_seeds_differ_and_repeat(target):
    settings = {"schedule": STEPS, "drafter": BiasedDrafter(target)}
    first, again = (sample(target, LABELS, seed=1, **settings).samples for _ in range(2))
    other = sample(target, LABELS, seed=2, **settings).samples
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=0.1)


def test_noise_tensors_drive_both_samplers(target):
    noise = torch.randn(len(LABELS), 20, *target.latent_shape)
    expected = ancestral_sample(target, LABELS, schedule=STEPS, noise=noise)
    x = noise[:, 0]
    from free_kernels.ops.coupling import gaussian_transition

    table = STEPS.table(STEPS.resolve_variance(target.learns_variance))
    for k, t in enumerate(STEPS.timesteps):
        t = t.expand(len(x))
        output = target.head(target.features(x, t, LABELS), t, LABELS)
        mean, std = gaussian_transition(x, output, table[k : k + 1])
        x = mean + (std * noise[:, k + 1] if k < 19 else 0)
    torch.testing.assert_close(expected.samples, x, rtol=1e-5, atol=1e-5)
    result = sample(target, LABELS, schedule=STEPS, noise=noise, drafter=PerfectDrafter(target))
    torch.testing.assert_close(result.samples, x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("drafter", [BiasedDrafter, None], ids=["corrected", "frozen"])
@pytest.mark.parametrize("verification", ["token", "block"])
def test_every_backend_gives_the_same_images(target, drafter, verification):
    settings = {"schedule": STEPS, "drafter": drafter(target) if drafter else "frozen", "verification": verification}
    auto = sample(target, LABELS, max_slots=3, **settings).samples
    backends = ("reference", "extension") if has_extension() else ("reference",)
    for backend in backends:
        got = sample(target, LABELS, backend=backend, max_slots=3, **settings).samples
        torch.testing.assert_close(got, auto, rtol=1e-5, atol=1e-5)


def test_triton_is_never_replaced_silently():
    with pytest.raises(RuntimeError, match="^couple: backend 'triton' cannot be used: "):
        sample(GaussianTarget(), LABELS, schedule=STEPS, backend="triton")


def test_stats_add_up(target):
    seen: list[RoundInfo] = []
    result = sample(target, LABELS, schedule=STEPS, drafter=BiasedDrafter(target), max_slots=4, callback=seen.append)
    stats = result.stats
    assert stats.target_calls == len(seen) == seen[-1].round
    assert seen[-1].images_done == seen[-1].num_images == len(LABELS)
    assert all(0 < step <= 20 for info in seen for step in info.steps)
    assert stats.rounds_per_image.shape == (9,)
    assert stats.call_reduction == pytest.approx(20 * 9 / stats.rounds_per_image.sum())
    # Each round commits the accepted drafts of an image and one more step, except where the draft at its end was cut.
    assert stats.accepted_by_step.sum() + stats.rounds_per_image.sum() == 20 * 9
    assert stats.acceptance_by_step.shape == (20,)
    assert np.isnan(stats.acceptance_by_step[[0, 19]]).all(), "the first and the last step are never drafted"
    assert stats.target_rows >= stats.rounds_per_image.sum()
    assert stats.bias_bound == 0.0
    assert stats.elapsed_s > 0


def test_ordinary_stats():
    target = GaussianTarget()
    stats = ancestral_sample(target, LABELS, schedule=STEPS, max_slots=4).stats
    assert (stats.target_calls, stats.target_rows, stats.drafter_calls) == (60, 180, 0)
    assert stats.call_reduction == 1.0
    whole = ancestral_sample(target, LABELS, schedule=STEPS).samples
    torch.testing.assert_close(ancestral_sample(target, LABELS, schedule=STEPS, max_slots=4).samples, whole)


@pytest.mark.parametrize("sampler", [sample, ancestral_sample])
@pytest.mark.parametrize(
    ("labels", "error"),
    [
        (torch.tensor([0.0]), TypeError),
        (torch.tensor([0], dtype=torch.int32), TypeError),
        ([0, 1], TypeError),
        (torch.tensor([3]), ValueError),
        (torch.tensor([-1]), ValueError),
        (torch.zeros(2, 2, dtype=torch.int64), ValueError),
        (torch.zeros(0, dtype=torch.int64), ValueError),
    ],
)
def test_wrong_labels_are_named(sampler, labels, error):
    with pytest.raises(error, match=rf"^{sampler.__name__}: class_labels must be int64 \[N\] in \[0, 3\)"):
        sampler(GaussianTarget(), labels, schedule=STEPS)


class OtherNumbers(PhiloxNoise):
    """A source that does not give what it promises."""

    def __init__(self, normal=lambda n: n, uniform=lambda n: n):
        super().__init__(0)
        self.changes = normal, uniform

    def normal(self, *keys):
        return self.changes[0](super().normal(*keys))

    def uniform(self, *keys):
        return self.changes[1](super().uniform(*keys))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"keys": [1, 2]}, TypeError, r"image_keys must be int64 \[N\] in \[0, 2\*\*32\), got \[1, 2\]"),
        ({"keys": torch.tensor([0, 2**33])}, ValueError, r"image_keys must be .* got values in \[0, 8589934592\]"),
        ({"first": 2**32}, ValueError, "first_image must be an int in"),
    ],
)
def test_wrong_keys_of_noise_are_named(arguments, error, message):
    with pytest.raises(error, match=f"^PhiloxNoise: {message}"):
        PhiloxNoise(0, arguments.get("first", 0), image_keys=arguments.get("keys"))
    with pytest.raises(TypeError, match=r"^TensorNoise: noise must be float32"):
        TensorNoise([1.0], 0)


def test_what_has_no_values_is_named():
    with pytest.raises(ValueError, match=r"^sample: class_labels must be int64 .*, got labels on the meta device"):
        sample(GaussianTarget(), torch.zeros(2, dtype=torch.int64, device="meta"), schedule=STEPS)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"draft_length": 0}, ValueError, r"draft_length must be an int in \[1, 20\], got 0"),
        ({"draft_length": 21}, ValueError, r"draft_length must be an int in \[1, 20\], got 21"),
        ({"draft_length": 2.0}, TypeError, "draft_length must be an int"),
        ({"guidance_scale": float("nan")}, ValueError, "guidance_scale must be a finite number"),
        ({"guidance_scale": "2"}, TypeError, "guidance_scale must be a finite number"),
        ({"guidance_channels": 2}, ValueError, r"guidance_channels must be an int in \[1, 1\]"),
        ({"drafter": "forecast"}, ValueError, "drafter must be 'frozen' or a drafter"),
        ({"drafter": 3}, TypeError, "drafter must be 'frozen' or a callable"),
        ({"verification": "none"}, ValueError, "verification must be one of"),
        ({"relaxation": -0.1}, ValueError, "relaxation must be"),
        ({"backend": "cuda"}, ValueError, "backend must be one of"),
        ({"seed": -1}, ValueError, "seed must be an int"),
        ({"seed": 2**64}, ValueError, "seed must be an int"),
        ({"max_slots": 0}, ValueError, "max_slots must be an int"),
        ({"noise": torch.zeros(9, 2, 4, 4)}, ValueError, "noise must be float32"),
        ({"noise": torch.zeros(9, 1, 4, 4, dtype=torch.float64)}, TypeError, "noise must be float32"),
        ({"noise": torch.full((9, 1, 4, 4), float("inf"))}, ValueError, "noise must be finite"),
        ({"noise": "gaussian"}, TypeError, "noise must be None, a tensor or a NoiseSource"),
        ({"noise": TensorNoise(torch.zeros(9, 5, 1, 4, 4), 0)}, ValueError, "noise must be float32"),
        ({"noise": PhiloxNoise}, TypeError, "noise must be None, a tensor or a NoiseSource"),
        (
            {"noise": PhiloxNoise(0, image_keys=torch.arange(8))},
            ValueError,
            "noise.image_keys must be keys of 9 images",
        ),
        ({"noise": OtherNumbers(lambda n: n.double())}, TypeError, r"noise must be float32 \[9, 1, 4, 4\] from normal"),
        (
            {"noise": OtherNumbers(lambda n: n[:, :, 1:])},
            ValueError,
            r"noise must be float32 \[9, 1, 4, 4\] from normal",
        ),
        ({"noise": OtherNumbers(uniform=lambda n: n[1:])}, ValueError, r"noise must be float32 \[\d+\] from uniform"),
        ({"callback": 5}, TypeError, "callback must be callable, got 5"),
        ({"progress": 2.0}, TypeError, "progress must be a bool, got 2.0"),
        ({"drafter": torch.nn.Linear(2, 2)}, TypeError, "drafter must be callable with .*, got Linear"),
        ({"drafter": lambda *given: None}, ValueError, r"drafter's output must be \[R, T, D\] = .*, got None"),
        ({"schedule": 20}, TypeError, "schedule must be a schedule"),
        ({"schedule": DDPMSchedule}, TypeError, "schedule must be a schedule"),
        ({"drafter": FeatureDrafter}, TypeError, "drafter must be 'frozen' or a callable"),
        (
            {"drafter": FeatureDrafter((1, 4, 4), (4, 32), 3)},
            ValueError,
            r"drafter must be one made for a target with feature_shape \(16, 2\)",
        ),
    ],
)
def test_wrong_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=f"^sample: {message}"):
        sample(GaussianTarget(), LABELS, **{"schedule": STEPS, **arguments})


@pytest.mark.parametrize("target", [3, object(), torch.nn.Linear(2, 2)])
def test_wrong_targets_are_named(target):
    with pytest.raises(TypeError, match=r"^sample: target must be a Target"):
        sample(target, LABELS)


@pytest.mark.parametrize(
    ("member", "value", "error"),
    [
        ("latent_shape", (), ValueError),
        ("latent_shape", (1, 4, 0), ValueError),
        ("latent_shape", (1, 4.0, 4), TypeError),
        ("latent_shape", 4, TypeError),
        ("latent_shape", None, TypeError),
        ("feature_shape", (16,), ValueError),
        ("feature_shape", (16, 2, 1), ValueError),
        ("feature_shape", None, TypeError),
        ("num_classes", -1, ValueError),
        ("num_classes", "3", TypeError),
        ("learns_variance", "yes", TypeError),
        ("learns_variance", None, TypeError),
    ],
)
@pytest.mark.parametrize("sampler", [sample, ancestral_sample])
def test_wrong_members_of_a_target_are_named(sampler, member, value, error):
    target = GaussianTarget()
    setattr(target, member, value)
    with pytest.raises(error, match=rf"^{sampler.__name__}: target\.{member} must be .*, got "):
        sampler(target, LABELS, schedule=STEPS)


@pytest.mark.parametrize("sampler", [sample, ancestral_sample])
def test_integers_of_numpy_are_ints(sampler):
    given = {"max_slots": 2, "seed": 5, "guidance_channels": 1} | ({"draft_length": 3} if sampler is sample else {})
    plain, numbers = ({name: kind(value) for name, value in given.items()} for kind in (int, np.int64))
    drawn = [sampler(GaussianTarget(), LABELS, schedule=STEPS, **settings).samples for settings in (plain, numbers)]
    assert torch.equal(*drawn)


@pytest.mark.parametrize("steps", [1, 4, 5, 6, 7])
def test_the_default_draft_length_fits_the_schedule(steps):
    given = {"schedule": DDPMSchedule(steps), "seed": 3}
    named = sample(GaussianTarget(), LABELS, draft_length=min(6, steps), **given)
    assert torch.equal(sample(GaussianTarget(), LABELS, **given).samples, named.samples)
    assert torch.equal(sample(GaussianTarget(), LABELS, draft_length=None, **given).samples, named.samples)


@pytest.mark.parametrize("sampler", [sample, ancestral_sample])
@pytest.mark.parametrize("shape", ["broadcast", "one row", "half", "features"])
def test_outputs_of_another_shape_are_named(sampler, shape):
    class Wrong(GaussianTarget):
        def head(self, h, t, y):
            output = super().head(h, t, y)
            return {"broadcast": output[..., :1, :1], "one row": output[:1], "half": output[:, :1]}.get(shape, output)

        def features(self, x, t, y):
            h = super().features(x, t, y)
            return h[:, :-1] if shape == "features" else h

    part = "features" if shape == "features" else "head"
    with pytest.raises(ValueError, match=rf"^{sampler.__name__}: target\.{part} must be"):
        sampler(Wrong(learns_variance=True), LABELS, schedule=STEPS)


def test_drafts_of_another_shape_are_named():
    with pytest.raises(ValueError, match=r"^sample: drafter's output must be \[R, T, D\] = \[9, 16, 2\]"):
        sample(GaussianTarget(), LABELS, schedule=STEPS, drafter=lambda feature, *_: feature[:, :1])


def test_results_are_ordinary_tensors():
    """Usable under autograd and in place; nothing that the user keeps turns into an inference tensor."""
    for sampler in (sample, ancestral_sample):
        samples = sampler(GaussianTarget(), LABELS, schedule=STEPS).samples
        assert not samples.is_inference()
        torch.nn.functional.conv2d(samples, torch.ones(1, 1, 1, 1, requires_grad=True)).sum().backward()
        samples.clamp_(-1, 1)
    assert not STEPS.timesteps.is_inference()


@pytest.mark.parametrize("labels", [torch.tensor([2]).expand(6), torch.arange(12)[::2] % 3])
def test_labels_and_features_of_any_stride(labels):
    class Strided(GaussianTarget):
        def features(self, x, t, y):
            return super().features(x, t, y).transpose(1, 2).contiguous().transpose(1, 2)

    expected = sample(GaussianTarget(), labels.contiguous(), schedule=STEPS).samples
    # Not bit for bit: kernels for strided memory need not fuse products and sums as those for vectors do.
    torch.testing.assert_close(sample(Strided(), labels, schedule=STEPS).samples, expected, rtol=1e-5, atol=1e-5)


def test_every_draft_starts_from_the_exact_parent():
    """A round's first draft sees the target's own feature at the state before; later ones see the drafter's last."""
    target = GaussianTarget(learns_variance=True)
    biased = BiasedDrafter(target, variance_bias=0.1)
    before = {int(t): int(s) for s, t in zip(STEPS.timesteps[:-1], STEPS.timesteps[1:], strict=True)}
    exact_seen = drafted_seen = 0

    def checking(feature, previous, state, t, y):
        nonlocal exact_seen, drafted_seen
        t_before = torch.tensor([before[int(value)] for value in t])
        exact = target.features(previous, t_before, y)
        drafted = biased(feature, previous, previous, t_before, y)
        is_exact = torch.isclose(feature, exact, atol=1e-5).flatten(1).all(1)
        is_drafted = torch.isclose(feature, drafted, atol=1e-5).flatten(1).all(1)
        assert bool((is_exact | is_drafted).all())
        exact_seen += int(is_exact.sum())
        drafted_seen += int(is_drafted.sum())
        return biased(feature, previous, state, t, y)

    sample(target, LABELS, schedule=STEPS, drafter=checking, max_slots=4, guidance_scale=2.0)
    assert exact_seen > 100
    assert drafted_seen > 100


class Poisoned(GaussianTarget):
    """Turns the output of one image (found by its label) non-finite from a given timestep on."""

    def __init__(self, value: float, timestep: int, label: int) -> None:
        super().__init__()
        self.value, self.timestep, self.label = value, timestep, label

    def head(self, h, t, y):
        output = super().head(h, t, y)
        output[(t <= self.timestep) & (y == self.label)] = self.value
        return output


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("step", [0, 7, 19])
@pytest.mark.parametrize("sampler", [sample, ancestral_sample])
def test_non_finite_outputs_name_step_and_image(sampler, step, value):
    """NaN or infinity at any step: the message names the step and one of the images 2, 5, 8 that have label 2."""
    target = Poisoned(value, int(STEPS.timesteps[step]), label=2)
    with pytest.raises(
        FloatingPointError, match=rf"^{sampler.__name__}: .* must be finite, .* step {step} of image [258]$"
    ):
        sampler(target, LABELS, schedule=STEPS)


@pytest.mark.parametrize("sampler", [sample, ancestral_sample])
def test_infinities_that_arithmetic_would_hide(sampler):
    """Clipping makes an infinite prediction finite, and so does a deviation of zero with a variance channel of -inf."""
    target = Poisoned(float("inf"), 1000, label=2)
    with pytest.raises(FloatingPointError, match="step 0 of image 2"):
        sampler(target, LABELS, schedule=DDPMSchedule(20, clip_denoised=True))

    class NoVariance(GaussianTarget):
        def variance_channel(self, t, y):
            return super().variance_channel(t, y) - torch.inf

    with pytest.raises(FloatingPointError, match="step 0 of image 0"):
        sampler(NoVariance(learns_variance=True), LABELS, schedule=STEPS)
    fixed = DDPMSchedule(20, variance="fixed_small")
    assert bool(sampler(NoVariance(learns_variance=True), LABELS, schedule=fixed).samples.isfinite().all())


def test_non_finite_drafts_are_blamed_on_the_drafter():
    target = GaussianTarget()

    def broken(feature, previous, state, t, y):
        return torch.where((y == 1).view(-1, 1, 1) & (t.view(-1, 1, 1) < 500), torch.nan, feature)

    first = int((STEPS.timesteps < 500).nonzero()[0])
    with pytest.raises(
        FloatingPointError, match=rf"^sample: the output drafted by drafter and head .* step {first} of image [147]$"
    ):
        sample(target, LABELS, schedule=STEPS, drafter=broken)


def test_an_interrupt_in_a_callback_passes_through():
    def interrupt(info: RoundInfo) -> None:
        if info.round == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(GaussianTarget(), LABELS, schedule=STEPS, callback=interrupt)


def test_the_callers_tensors_stay_as_they_were():
    labels, noise = LABELS.clone(), torch.randn(9, 1, 4, 4)
    kept = noise.clone()
    sample(GaussianTarget(), labels, schedule=STEPS, noise=noise, max_slots=2)
    assert torch.equal(labels, LABELS)
    assert torch.equal(noise, kept)


def test_block_verification_in_the_sampler(target):
    """Images keep to themselves; another round draws other noise, so a noise tensor of all steps is refused."""
    drafter = BiasedDrafter(target, variance_bias=0.1)
    settings = {"schedule": STEPS, "drafter": drafter, "verification": "block", "seed": 8}
    whole = sample(target, LABELS, **settings)
    few = sample(target, LABELS, max_slots=2, **settings)
    torch.testing.assert_close(few.samples, whole.samples, rtol=1e-5, atol=1e-5)
    token = sample(target, LABELS, **{**settings, "verification": "token"})
    assert not torch.allclose(token.samples, whole.samples, atol=1e-3)
    initial = torch.randn(len(LABELS), *target.latent_shape)
    assert sample(target, LABELS, noise=initial, **settings).samples.isfinite().all()
    with pytest.raises(ValueError, match="^sample: noise must be initial states only with verification 'block'"):
        sample(target, LABELS, noise=torch.randn(len(LABELS), 20, *target.latent_shape), **settings)


def test_dense_block_rounds(target):
    from free_kernels.sampling.job import make_job
    from free_kernels.sampling.options import Options
    from free_kernels.sampling.speculative import Speculation

    drafter = BiasedDrafter(target, variance_bias=0.1)
    want = sample(target, LABELS, schedule=STEPS, drafter=drafter, verification="block", seed=8)
    options = Options(schedule=STEPS, seed=8, drafter=drafter, draft_length=6, max_slots=3, verification="block")
    job = make_job("sample", target, LABELS, options)
    dense = Speculation(job, dense=True)
    with torch.no_grad():
        dense.run()
    torch.testing.assert_close(dense.samples, want.samples, rtol=1e-5, atol=1e-5)


class Answering:
    """A target or a drafter whose answers another makes, changed."""

    def __init__(self, own, name, change):
        self._own, self._name, self._change = own, name, change

    def __getattr__(self, name):
        found = getattr(self._own, name)
        return (lambda *given: self._change(found(*given))) if name == self._name else found

    def __call__(self, *given):
        return self._change(self._own(*given))


WRONG = {
    "a list": (lambda found: [found], ValueError, r"must be \[R, .*, got \[tensor"),
    "whole numbers": (lambda found: found.long(), TypeError, "must be floating-point numbers, got int64"),
    "complex": (lambda found: found.to(torch.complex64), TypeError, "must be floating-point numbers, got complex64"),
    "elsewhere": (lambda found: found.to("meta"), ValueError, "must be dense, on cpu, got torch.strided on meta"),
    "sparse": (lambda found: found.to_sparse(), ValueError, "must be dense, on cpu, got torch.sparse_coo on cpu"),
}


@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("who", ["target.features", "target.head", "drafter's output"])
def test_answers_of_another_kind_are_named(who, kind, reuse):
    change, error, message = WRONG[kind]
    target = GaussianTarget()
    drafter = BiasedDrafter(target)
    if who == "drafter's output":
        drafter = Answering(drafter, "", change)
    else:
        target = Answering(target, who.partition(".")[2], change)
    with pytest.raises(error, match=rf"^sample: {who} {message}"):
        sample(target, LABELS, schedule=STEPS, drafter=drafter, reuse_refused=reuse)


def test_noise_need_not_be_contiguous():
    target = GaussianTarget()
    shape = len(LABELS), 20, *target.latent_shape
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    turned = noise.transpose(-1, -2).contiguous().transpose(-1, -2)
    settings = {"schedule": STEPS, "drafter": BiasedDrafter(target)}
    assert not turned.is_contiguous()
    assert torch.equal(
        sample(target, LABELS, noise=turned, **settings).samples,
        sample(target, LABELS, noise=noise, **settings).samples,
    )
