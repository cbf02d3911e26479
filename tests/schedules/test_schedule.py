"""Transitions against independent formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from free_kernels import DDPMSchedule
from free_kernels.constants import TransitionColumn
from free_kernels.ops.coupling import gaussian_transition
from free_kernels.schedules.timesteps import respaced_timesteps


@pytest.mark.parametrize("steps", [20, 50, 100, 250, 1000])
def test_respacing_is_the_rounded_even_grid(steps):
    assert respaced_timesteps(1000, steps) == np.linspace(0, 999, steps).round().astype(int).tolist()


def test_timesteps_descend_from_the_noisiest():
    timesteps = DDPMSchedule(250).timesteps
    assert timesteps.dtype == torch.int64
    assert timesteps[0] == 999
    assert timesteps[-1] == 0
    assert bool((timesteps.diff() < 0).all())


def test_single_step_chain():
    schedule = DDPMSchedule(1)
    assert schedule.timesteps.tolist() == [0]
    assert float(schedule.table("fixed_small")[0, TransitionColumn.LOG_STD]) == -math.inf


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_mean_and_variance_against_the_posterior(variance):
    """The mean of q(x_{t-1} | x_t, x0) at the implied x0, and the three variances, from first principles."""
    schedule = DDPMSchedule(50, variance=variance)
    betas = np.linspace(1e-4, 0.02, 1000)
    alphas = np.cumprod(1 - betas)[schedule.timesteps.numpy()]
    before = np.append(alphas[1:], 1.0)
    beta = 1 - alphas / before
    posterior = beta * (1 - before) / (1 - alphas)
    generator = torch.Generator().manual_seed(0)
    state = torch.randn(50, 1, 2, 2, generator=generator)
    eps, v = torch.randn(2, 50, 1, 2, 2, generator=generator)
    mean, std = gaussian_transition(state, torch.cat([eps, v], 1), schedule.table(variance))
    column = lambda values: torch.from_numpy(values).view(-1, 1, 1, 1)  # noqa: E731
    x0 = (state.double() - column((1 - alphas) ** 0.5) * eps) / column(alphas**0.5)
    expected = column(before**0.5 * beta / (1 - alphas)) * x0
    expected = expected + column((1 - beta) ** 0.5 * (1 - before) / (1 - alphas)) * state
    torch.testing.assert_close(mean.double(), expected, rtol=1e-4, atol=1e-5)
    if variance == "learned_range":
        fraction = (v.double() + 1) / 2
        clipped = np.append(posterior[:-1], posterior[-2])
        variance_expected = (fraction * column(np.log(beta)) + (1 - fraction) * column(np.log(clipped))).exp()
    else:
        variance_expected = column(posterior if variance == "fixed_small" else beta).expand_as(state)
    torch.testing.assert_close(std[:-1].double() ** 2, variance_expected[:-1], rtol=1e-4, atol=1e-9)
    assert bool((std[-1] == 0).all()), "the last step adds no noise"


def test_clipping_bounds_the_clean_sample():
    schedule = DDPMSchedule(50, clip_denoised=True)
    table = schedule.table("fixed_small")
    state = torch.full((50, 1, 1, 1), 3.0)
    mean, _ = gaussian_transition(state, torch.full_like(state, -3.0), table, clip=schedule.clip)
    row = table.double()
    expected = row[:, TransitionColumn.MEAN_FROM_X0] + 3 * row[:, TransitionColumn.MEAN_FROM_STATE_GIVEN_X0]
    torch.testing.assert_close(mean.flatten().double(), expected, rtol=1e-5, atol=1e-6)


def test_clipping_without_effect_is_no_clipping():
    table = DDPMSchedule(50).table("fixed_small")
    state, eps = torch.randn(2, 50, 1, 4, 4)
    free, _ = gaussian_transition(state, eps, table)
    clipped, _ = gaussian_transition(state, eps, table, clip=1e6)
    torch.testing.assert_close(free, clipped, rtol=1e-3, atol=1e-4)


def test_auto_variance_follows_the_target():
    assert DDPMSchedule().resolve_variance(True) == "learned_range"
    assert DDPMSchedule().resolve_variance(False) == "fixed_small"
    assert DDPMSchedule(variance="fixed_large").resolve_variance(True) == "fixed_large"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_steps": 0}, ValueError, "num_steps must be an int in"),
        ({"num_steps": 1001}, ValueError, "num_steps must be an int in"),
        ({"num_steps": 2.5}, TypeError, "num_steps must be an int in"),
        ({"variance": "learned"}, ValueError, "variance must be one of"),
        ({"clip_denoised": 1}, TypeError, "clip_denoised must be a bool"),
        ({"beta_end": float("nan")}, ValueError, "beta_end must be a finite"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=f"^DDPMSchedule: {message}"):
        DDPMSchedule(**arguments)


def test_learned_variance_of_a_target_without_one():
    with pytest.raises(ValueError, match="variance must be a fixed variance for a target that learns no variance"):
        DDPMSchedule(variance="learned_range").resolve_variance(False)


def test_tables_of_a_used_schedule_are_made_while_a_graph_is_traced():
    """A table is kept for the next run, and is neither a pretended one later nor a real one among pretended ones."""
    used, fresh = DDPMSchedule(8), DDPMSchedule(8)
    real = used.table("fixed_small")
    for schedule in (used, fresh):
        with FakeTensorMode():
            assert type(schedule.table("fixed_small")) is FakeTensor
            assert type(schedule.timesteps) is FakeTensor
        assert torch.equal(schedule.table("fixed_small"), real)
        assert type(schedule.timesteps) is torch.Tensor


def test_a_table_is_the_callers():
    schedule = DDPMSchedule(8)
    given = schedule.table("fixed_small").zero_()
    assert schedule.table("fixed_small").any()
    assert not given.any()
