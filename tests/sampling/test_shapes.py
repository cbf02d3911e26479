"""States of any shape: the same numbers as images of the same elements, through every part of the sampler."""

from __future__ import annotations

import math

import pytest
import torch
from analytic import BiasedDrafter, GaussianTarget

import free_kernels
from free_kernels import DDPMSchedule, DrafterConfig, FeatureDrafter, HookTarget

SHAPES = [(12,), (3, 4), (2, 3, 2), (1, 3, 2, 2), (3, 1, 2, 1, 2)]
SAMPLERS = free_kernels.sample, free_kernels.ancestral_sample
LABELS = torch.tensor([0, 2, 1, 1, 0])


def draw(shape, run=free_kernels.sample, **settings):
    """Samples of the target of twelve elements; channels are never told apart."""
    target = GaussianTarget(shape, learns_variance=settings.pop("learned", False))
    settings.setdefault("schedule", DDPMSchedule(num_steps=12))
    if run is not free_kernels.ancestral_sample:
        settings.setdefault("drafter", BiasedDrafter(target, variance_bias=0.1))
    return run(target, LABELS, seed=5, **settings)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"drafter": "frozen", "draft_length": 4},
        {"learned": True, "max_slots": 2},
        {"guidance_scale": 1.7, "verification": "block"},
        {"backend": "reference", "max_slots": 3},
        {"draft_length": "auto"},
        {"reuse_refused": False, "relaxation": 0.3},
    ],
    ids=lambda settings: " ".join(settings) or "defaults",
)
def test_samples_are_those_of_images(shape, settings):
    if settings.get("draft_length") == "auto":
        # Lengths follow measured times, so only the ordinary chain, whose steps are the same, can be compared.
        settings = {"run": free_kernels.ancestral_sample}
    wanted = draw((12, 1, 1), **settings)
    found = draw(shape, **settings)
    assert found.samples.shape == (len(LABELS), *shape)
    # One element of a sum may be added in another order where a row is cut differently.
    torch.testing.assert_close(found.samples.flatten(1), wanted.samples.flatten(1), rtol=1e-4, atol=1e-5)
    assert found.stats.target_calls == wanted.stats.target_calls


@pytest.mark.parametrize("shape", SHAPES)
def test_images_come_one_by_one_in_their_shape(shape):
    wanted = draw(shape, max_slots=2).samples
    for image in draw(shape, free_kernels.sample_iter, max_slots=2):
        assert torch.equal(image.sample, wanted[image.index])


@pytest.mark.parametrize("shape", SHAPES)
def test_given_noise_has_the_states_shape(shape):
    noise = torch.randn(len(LABELS), 12, *shape, generator=torch.Generator().manual_seed(3))
    for given in (noise, noise[:, 0]):
        found, ordinary = (
            draw(shape, run, noise=given) for run in (free_kernels.sample, free_kernels.ancestral_sample)
        )
        flat = draw((12, 1, 1), noise=given.reshape(*given.shape[: given.ndim - len(shape)], 12, 1, 1))
        torch.testing.assert_close(found.samples.flatten(1), flat.samples.flatten(1), rtol=1e-4, atol=1e-5)
        assert ordinary.samples.shape == found.samples.shape
    with pytest.raises(ValueError, match=r"^sample: noise must be float32 \[5, "):
        draw(shape, noise=noise[..., None])


def test_a_wrong_output_is_named_in_the_targets_shape():
    target = GaussianTarget((3, 4))
    target.head = lambda h, t, y: torch.zeros(len(h), 4, 3)
    with pytest.raises(ValueError, match=r"^sample: target.head must be \[R, C or 2C, \.\.\.\] = \[\d+, 3, 4\]"):
        free_kernels.sample(target, LABELS, schedule=DDPMSchedule(num_steps=6))


@pytest.mark.parametrize(
    ("latent", "tokens", "grid", "patch"),
    [
        ((16, 2), 16, (1, 16, 2), (1, 2)),
        ((16, 2), 4, (1, 16, 2), (4, 2)),
        ((4, 3, 8, 8), 48, (4, 24, 8), (2, 2)),
        ((4, 8, 4), 8, (4, 8, 4), (2, 2)),
    ],
)
def test_patches_of_a_drafter(latent, tokens, grid, patch):
    drafter = FeatureDrafter(latent, (tokens, 8), 3, DrafterConfig(width=32, head_dim=32))
    assert (drafter._grid, drafter.patch) == (grid, patch)
    states = torch.arange(2.0 * math.prod(latent)).view(2, *latent)
    cut = drafter._tiles(states)
    assert cut.shape == (2, tokens, math.prod(latent) // tokens)
    if len(latent) == 2:
        assert torch.equal(cut, states.view(2, tokens, -1))
    if len(latent) == 4:
        # The first patch of the second frame.
        assert torch.equal(cut[0, tokens // 3].view(4, 2, 2), states[0, :, 1, :2, :2])


@pytest.mark.parametrize(("latent", "tokens"), [((16, 2), 5), ((4, 3, 8, 8), 24), ((4, 8, 8), 10)])
def test_patches_that_do_not_tile(latent, tokens):
    with pytest.raises(ValueError, match="^FeatureDrafter: feature_shape must be T .* tiling"):
        FeatureDrafter(latent, (tokens, 8), 3)


def test_a_learned_drafter_of_actions(tmp_path):
    target = GaussianTarget((6, 2))
    plain = target.features, target.head
    target.feature_shape = (6, 4)
    target.features = lambda x, t, y: plain[0](x, t, y).reshape(len(x), 6, 4)
    target.head = lambda h, t, y: plain[1](h.reshape(len(h), 12, 2), t, y)
    torch.manual_seed(0)
    drafter = FeatureDrafter((6, 2), (6, 4), 3, DrafterConfig(width=32, head_dim=32)).requires_grad_(False)
    for parameter in drafter.parameters():
        parameter.normal_(std=0.1)
    drafter.save(tmp_path / "drafter.safetensors")
    loaded = FeatureDrafter.load(tmp_path / "drafter.safetensors", target)
    assert loaded.latent_shape == (6, 2)
    found, again = (
        free_kernels.sample(target, LABELS, drafter=one, schedule=DDPMSchedule(num_steps=12), seed=1).samples
        for one in (loaded, drafter)
    )
    assert found.shape == (5, 6, 2)
    assert torch.equal(found, again)


def test_a_module_of_actions_by_a_hook():
    net = (
        torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)).eval().requires_grad_(False)
    )
    target = HookTarget(
        net,
        "1",
        lambda h, t, y: net[2](h),
        latent_shape=(5, 2),
        feature_shape=(5, 8),
        num_classes=3,
        learns_variance=False,
        call=lambda module, x, t, y: module(x),
    )
    assert free_kernels.check_target(target).difference == 0
    speculative, ordinary = (
        run(target, LABELS, schedule=DDPMSchedule(num_steps=8))
        for run in (free_kernels.sample, free_kernels.ancestral_sample)
    )
    assert speculative.samples.shape == ordinary.samples.shape == (5, 5, 2)
