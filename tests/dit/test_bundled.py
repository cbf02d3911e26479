"""The shipped pair: what it reaches, and that it changes nothing about the images."""

from __future__ import annotations

import hashlib
import json

import mutations
import numpy as np
import pytest
import torch
from call_by_call import play_call_by_call

import free_kernels.sampling.round
from free_dit import load_bundled
from free_dit.bundled import MODELS, bundled_names
from free_dit.data import load_digits
from free_kernels import DDPMSchedule, PhiloxNoise, ancestral_sample, sample

LABELS = torch.arange(64) % 10
# Noise that drafter training has not seen.
NEW_SEED = 2**63 + 1234


@pytest.fixture(scope="module")
def digits():
    return load_bundled("digits")


def test_the_files_are_those_of_the_card():
    folder = MODELS / "digits"
    figures = json.loads((folder / "evaluation.json").read_text())
    sizes = 0
    for name, (size, digest) in figures["files"].items():
        data = (folder / name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (size, digest)
        assert digest in (folder / "MODEL_CARD.md").read_text()
        sizes += size
    assert sizes <= 8_000_000


def test_unknown_names_are_refused():
    assert bundled_names() == ("digits", "digits_sit")
    with pytest.raises(ValueError, match="^load_bundled: name must be one of 'digits', 'digits_sit', got 'imagenet'"):
        load_bundled("imagenet")


@pytest.mark.slow
def test_call_reduction(digits):
    """Committed steps per round at 250 steps, learned variance, lossless; block against token image by image.

    Blocks save rounds over tokens that go without refused rows, which blocks cannot use beyond the first.
    """
    target, drafter = digits
    rounds = {}
    for verification, draft_length, guidance, reuse, images, floor in (
        ("token", 6, 1.0, True, 16, 5.5),
        ("token", 6, 2.0, True, 16, 5.4),
        ("token", 12, 1.0, True, 32, 10.0),
        ("token", 12, 1.0, False, 32, 9.2),
        ("block", 6, 1.0, True, 16, 5.55),
        ("block", 12, 1.0, True, 32, 9.9),
    ):
        stats = sample(
            target,
            LABELS[:images],
            drafter=drafter,
            draft_length=draft_length,
            guidance_scale=guidance,
            verification=verification,
            reuse_refused=reuse,
            seed=NEW_SEED,
        ).stats
        assert stats.call_reduction >= floor, (verification, draft_length, guidance, reuse)
        assert stats.bias_bound == 0.0
        rounds[verification, draft_length, reuse] = stats.rounds_per_image

    def saves(one: np.ndarray, other: np.ndarray) -> bool:
        """One-sided t test image by image, chance of a false alarm 1e-3 (3.37 at 31 degrees of freedom)."""
        saved = one - other
        return bool(saved.mean() > 3.37 * saved.std(ddof=1) / len(saved) ** 0.5)

    without = rounds["token", 12, False]
    assert saves(without, rounds["block", 12, True])
    assert saves(without, rounds["token", 12, True])
    # Negative control: the same verification with other noise saves nothing.
    settings = {"drafter": drafter, "draft_length": 12, "reuse_refused": False}
    again = sample(target, LABELS[:32], seed=NEW_SEED + 1, **settings).stats
    assert not saves(without, again.rounds_per_image)


@pytest.mark.slow
def test_learned_beats_frozen(digits):
    target, drafter = digits
    labels = LABELS[:16]
    runs = [sample(target, labels, drafter=d, draft_length=12).stats for d in (drafter, "frozen")]
    assert runs[0].call_reduction > 1.02 * runs[1].call_reduction


@pytest.mark.slow
def test_an_image_is_the_same_alone_and_in_a_batch(digits):
    """To rounding, which decides a near-tie differently in perhaps one row of a million."""
    target, drafter = digits
    settings = {"schedule": DDPMSchedule(100), "drafter": drafter, "guidance_scale": 1.5}
    whole = sample(target, LABELS[:12], seed=5, **settings).samples
    few = sample(target, LABELS[:12], seed=5, max_slots=5, **settings).samples
    torch.testing.assert_close(few, whole, rtol=1e-3, atol=1e-3)
    for index in (0, 7):
        source = PhiloxNoise(5, first_image=index)
        alone = sample(target, LABELS[index : index + 1], noise=source, **settings).samples
        torch.testing.assert_close(alone[0], whole[index], rtol=1e-3, atol=1e-3)


def kernel_test_p_value(first: torch.Tensor, second: torch.Tensor, permutations: int = 2000) -> float:
    """Permutation p-value of the squared maximum mean discrepancy, Gaussian kernel of median width (Gretton 2012)."""
    pooled = torch.cat([first, second]).flatten(1).double()
    squared = torch.cdist(pooled, pooled).square()
    kernel = torch.exp(-squared / squared[squared > 0].median()).numpy()
    count = len(first)
    generator = np.random.default_rng(0)
    signs = np.ones((permutations + 1, len(pooled)))
    signs[0, count:] = -1
    for row in signs[1:]:
        row[generator.permutation(len(pooled))[count:]] = -1
    statistics = np.einsum("pi,ij,pj->p", signs, kernel, signs, optimize=True)
    return float((statistics >= statistics[0]).mean())


@pytest.mark.slow
def test_images_are_drawn_from_the_same_distribution(digits, monkeypatch):
    """Two-sample test on one class at 50 steps: speculative against ordinary.

    It finds a sampler that accepts whatever the frozen drafter says. It does not find a few wrong refusals: those are
    for the directed tests of test_exactness.py.
    """
    target, drafter = digits
    labels = torch.full((400,), 3)
    schedule = DDPMSchedule(50)
    ordinary = ancestral_sample(target, labels, schedule=schedule, seed=1, max_slots=128).samples
    speculative = sample(target, labels, schedule=schedule, drafter=drafter, seed=2, max_slots=128)
    assert speculative.stats.acceptance < 0.98, "enough refusals for a wrong reflection to show"
    assert kernel_test_p_value(ordinary, speculative.samples) > 1e-3
    play_call_by_call(monkeypatch)
    monkeypatch.setattr(free_kernels.sampling.round, "couple", mutations.always_accept)
    wrong = sample(target, labels, schedule=schedule, drafter="frozen", seed=2, max_slots=128)
    assert kernel_test_p_value(ordinary, wrong.samples) < 1e-3


@pytest.mark.slow
def test_samples_are_digits(digits):
    """A nearest-neighbour classifier trained on the real digits reads the samples as what they were asked to be."""
    from sklearn.neighbors import KNeighborsClassifier

    target, drafter = digits
    data = load_digits("train")
    reader = KNeighborsClassifier(3).fit(data.images.flatten(1), data.labels)
    images = sample(target, LABELS, drafter=drafter, schedule=DDPMSchedule(100), guidance_scale=2.0).samples
    assert reader.score(images.flatten(1), LABELS) > 0.9
    assert reader.score(images.flatten(1), LABELS.roll(1)) < 0.3
