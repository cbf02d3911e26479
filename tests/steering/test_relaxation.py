"""Relaxed acceptance: its bias is what is reported, strength 0 is lossless, and weights see nothing forbidden."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch
from analytic import BiasedDrafter, GaussianTarget
from call_by_call import play_call_by_call

import free_kernels.sampling.round
from free_kernels import DDPMSchedule, Relaxation, sample
from free_kernels.ops import couple
from free_kernels.steering.relaxation import bias_of_rows

COUNT, ELEMENTS = 200_000, 3
# Dvoretzky, Kiefer and Wolfowitz: the empirical distribution is this close to its law but for a chance of 1e-3.
TOLERANCE = math.sqrt(math.log(2 / 1e-3) / (2 * COUNT))
STEPS = DDPMSchedule(12)
LABELS = torch.arange(60) % 3


def one_step(delta: float, weight: float) -> tuple[np.ndarray, float]:
    """Outputs of a relaxed step along Delta, relative to the target's mean, and the share of accepted drafts."""
    g = torch.Generator().manual_seed(round(1000 * (delta + weight)))
    shape = (COUNT, 2, 1, 1, ELEMENTS)
    std, direction = 0.7, torch.tensor([0.6, 0.0, 0.8])
    mean = torch.zeros(COUNT, 1, *shape[2:])
    noise = torch.randn(shape, generator=g)
    columns = torch.zeros(COUNT, 2, 8)
    columns[..., 1], columns[..., 2] = 1.0, math.log(std)
    # The target's mean is its output: delta deviations beside the draft's.
    output = (std * delta * direction).expand(2 * COUNT, ELEMENTS).reshape(2 * COUNT, 1, 1, ELEMENTS)
    outcome = couple(
        torch.cat([torch.zeros_like(mean), mean + std * noise[:, :1]], dim=1),
        mean,
        torch.full_like(mean, std),
        noise,
        None,
        1 - torch.rand(COUNT, 2, generator=g),
        output,
        torch.arange(COUNT + 1) * 2,
        columns,
        relaxation=torch.full((COUNT, 2), weight),
    )
    accepted = outcome.committed == 2
    # An accepted draft's own state is the step's output; behind it lies the next row's.
    drafts = mean[:, 0] + std * noise[:, 0]
    states = torch.where(accepted.view(-1, 1, 1, 1), drafts, outcome.next_states)
    along = ((states.flatten(1) / std) @ direction - delta).numpy()
    return along, float(accepted.float().mean())


@pytest.mark.parametrize(("delta", "weight"), [(0.5, 0.5), (1.0, 0.9), (2.0, 0.3), (3.0, 0.7), (1.0, 0.0)])
def test_bias_bound_is_the_total_variation_of_a_step(delta, weight):
    """Output and target differ with one change of sign along Delta, so the largest gap of their distribution functions
    is their total variation. A figure for another weight is outside of the tolerance."""
    along, accepted = one_step(delta, weight)
    reported = float(bias_of_rows(torch.tensor(delta**2), torch.tensor(weight)))
    measured = scipy.stats.kstest(along, "norm").statistic
    assert abs(measured - reported) < TOLERANCE
    assert abs(accepted - 2 * scipy.stats.norm.cdf(-(1 - weight) * delta / 2)) < TOLERANCE
    other = float(bias_of_rows(torch.tensor(delta**2), torch.tensor(weight - 0.1 if weight else 0.1)))
    assert abs(measured - other) > TOLERANCE


@pytest.mark.parametrize("learned", [False, True])
def test_strength_0_is_lossless_bit_for_bit(learned):
    target = GaussianTarget(learns_variance=learned)
    settings = {"schedule": STEPS, "drafter": BiasedDrafter(target, variance_bias=0.1 * learned)}
    lossless = sample(target, LABELS, **settings)
    for relaxation in (0, 0.0, Relaxation(0.0), Relaxation(3.0, w_max=0.0)):
        relaxed = sample(target, LABELS, relaxation=relaxation, **settings)
        assert torch.equal(relaxed.samples, lossless.samples)
        assert relaxed.stats.bias_bound == 0.0
        np.testing.assert_array_equal(relaxed.stats.uncertainty_by_step, lossless.stats.uncertainty_by_step)


@pytest.mark.parametrize(("learned", "source"), [(False, "deviation"), (True, "deviation"), (True, "variance")])
def test_more_strength_commits_more_and_reports_more_bias(learned, source):
    target = GaussianTarget(learns_variance=learned)
    settings = {"schedule": STEPS, "drafter": BiasedDrafter(target, variance_bias=0.02 * learned)}
    runs = [
        sample(target, LABELS, relaxation=Relaxation(strength, source=source), **settings).stats
        for strength in (0.0, 0.3, 1.0, 4.0)
    ]
    for less, more in itertools.pairwise(runs):
        assert more.call_reduction >= less.call_reduction
        assert more.bias_bound > less.bias_bound
    assert runs[-1].call_reduction > 1.05 * runs[0].call_reduction
    assert runs[-1].bias_bound_per_image.shape == (len(LABELS),)
    assert runs[-1].bias_bound == pytest.approx(runs[-1].bias_bound_per_image.mean())
    known = runs[-1].tested_by_step > 0
    assert np.isfinite(runs[-1].uncertainty_by_step[known]).all()


def test_a_relaxed_image_does_not_depend_on_its_batch():
    target = GaussianTarget()
    settings = {"schedule": STEPS, "drafter": BiasedDrafter(target), "relaxation": 1.0}
    whole, few = (sample(target, LABELS, max_slots=slots, **settings) for slots in (None, 7))
    torch.testing.assert_close(few.samples, whole.samples, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(few.stats.bias_bound_per_image, whole.stats.bias_bound_per_image, rtol=1e-3, atol=1e-6)


def test_rows_behind_a_refusal_change_no_weight(monkeypatch):
    target = GaussianTarget()
    settings = {"schedule": STEPS, "drafter": BiasedDrafter(target), "relaxation": 1.0}
    expected = sample(target, LABELS, **settings)

    def poisoned(*args, **kwargs):
        outcome = couple(*args, **kwargs)
        behind = torch.arange(outcome.gap_sq.shape[1]) >= outcome.committed[:, None]
        outcome.gap_sq[behind] = torch.nan
        return outcome

    play_call_by_call(monkeypatch)
    monkeypatch.setattr(free_kernels.sampling.round, "couple", poisoned)
    result = sample(target, LABELS, **settings)
    assert torch.equal(result.samples, expected.samples)
    assert result.stats.bias_bound == expected.stats.bias_bound


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"relaxation": Relaxation(1.0), "verification": "block"}, "relaxation must be 0 with verification 'block'"),
        (
            {"relaxation": Relaxation(1.0, source="variance")},
            "relaxation must be source 'deviation' where",
        ),
        ({"relaxation": math.nan}, "relaxation must be"),
    ],
)
def test_wrong_relaxations_are_named(arguments, message):
    with pytest.raises(ValueError, match=f"^sample: {message}"):
        sample(GaussianTarget(), LABELS, schedule=STEPS, **arguments)


def test_a_relaxation_checks_itself():
    for arguments, name in (((-1.0,), "strength"), ((1.0, 1.0), "w_max"), ((1.0, 0.5, "guess"), "source")):
        with pytest.raises(ValueError, match=f"^Relaxation: {name} must be"):
            Relaxation(*arguments)
