"""``ancestral_sample`` against improved DDPM's loop over the original's guided forward, written out from the papers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from analytic import PerfectDrafter
from originals import OriginalDiT, randomised

from free_kernels import DDPMSchedule, DiTTarget, ancestral_sample, sample

STEPS = 12
LABELS = torch.tensor([2, 0, 4])


@pytest.fixture(scope="module")
def module():
    dit = randomised(OriginalDiT(), scale=0.1)
    for parameter in dit.final_layer.linear.parameters():
        parameter.mul_(0.3)
    return dit


@pytest.fixture(scope="module")
def noise():
    return torch.randn(3, STEPS, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def original_loop(module, noise, guidance) -> torch.Tensor:
    """Respaced diffusion with learned variances, on a doubled batch; float64 outside the network."""
    kept = np.linspace(0, 999, STEPS).round().astype(int)
    alphas = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[kept]
    before = np.append(1.0, alphas[:-1])
    betas = 1 - alphas / before
    posterior = betas * (1 - before) / (1 - alphas)
    low, high = np.log(np.append(posterior[1], posterior[1:])), np.log(betas)
    labels = torch.cat([LABELS, torch.full_like(LABELS, module.y_embedder.num_classes)])
    z = torch.cat([noise[:, 0], noise[:, 0]]).double()
    for step, index in enumerate(reversed(range(STEPS))):
        t = torch.full((6,), int(kept[index]))
        output = module.forward_with_cfg(z.float(), t, labels, guidance).double()
        eps, v = output.chunk(2, dim=1)
        log_variance = (v + 1) / 2 * high[index] + (1 - v) / 2 * low[index]
        clean = z / alphas[index] ** 0.5 - (1 / alphas[index] - 1) ** 0.5 * eps
        mean = betas[index] * before[index] ** 0.5 / (1 - alphas[index]) * clean
        mean = mean + (1 - before[index]) * (1 - betas[index]) ** 0.5 / (1 - alphas[index]) * z
        z = mean
        if index > 0:
            fresh = torch.cat([noise[:, step + 1], torch.full_like(noise[:, 0], 9.9)])  # the second half is never read
            z = mean + (0.5 * log_variance).exp() * fresh
    return z[:3].float()


@pytest.mark.parametrize("guidance", [1.5, 4.0])
def test_the_originals_images(module, noise, guidance):
    """Guidance on three channels of four is the default of its family; ordinary, speculative and perfectly drafted."""
    expected = original_loop(module, noise, guidance)
    settings = {"schedule": DDPMSchedule(STEPS), "guidance_scale": guidance, "noise": noise}
    tolerance = {"rtol": 1e-3, "atol": 1e-3}
    torch.testing.assert_close(ancestral_sample(module, LABELS, **settings).samples, expected, **tolerance)
    one = sample(module, LABELS, draft_length=1, **settings)
    torch.testing.assert_close(one.samples, expected, **tolerance)
    perfect = sample(module, LABELS, drafter=PerfectDrafter(DiTTarget(module)), draft_length=5, **settings)
    torch.testing.assert_close(perfect.samples, expected, **tolerance)
    assert perfect.stats.acceptance == 1


def test_guidance_on_all_channels_is_another_chain(module, noise):
    """The switch, and the comparison's negative control."""
    settings = {"schedule": DDPMSchedule(STEPS), "guidance_scale": 4.0, "noise": noise}
    expected = original_loop(module, noise, 4.0)
    other = ancestral_sample(module, LABELS, guidance_channels=4, **settings).samples
    assert float((other - expected).abs().max()) > 1e-2
    fixed = ancestral_sample(module, LABELS, **{**settings, "schedule": DDPMSchedule(STEPS, variance="fixed_large")})
    assert float((fixed.samples - expected).abs().max()) > 1e-2
