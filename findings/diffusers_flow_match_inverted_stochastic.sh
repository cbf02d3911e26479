#!/usr/bin/env bash
# diffusers 0.42.1, FlowMatchEulerDiscreteScheduler(invert_sigmas=True, stochastic_sampling=True): the chain of a perfect
# network ends in pure noise, whatever the network predicts. Inverted sigmas run from 0 to 1, and a stochastic step mixes the
# clean sample in by one minus the next sigma, as if they had not been inverted.
# Expected: the data's point, as with either option alone, or an error for the pair.
# Why it matters here: read as a chain of Gaussian steps, the pair has a well-formed table of transitions whose law is that of
# noise; we refuse it by name.
# Source: diffusers/schedulers/scheduling_flow_match_euler_discrete.py, set_timesteps and step.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6 diffusers==0.42.1
cd "$work"
"$work/venv/bin/python" - <<'PYTHON'
import diffusers, torch
from diffusers import FlowMatchEulerDiscreteScheduler

POINT = 3.0


def end(inverted, stochastic):
    """Mean and deviation of what a chain of 20 steps ends in where all data is one point."""
    scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=inverted, stochastic_sampling=stochastic)
    scheduler.set_timesteps(20)
    generator = torch.Generator().manual_seed(0)
    state = torch.randn(4096, generator=generator)
    for index, now in enumerate(scheduler.timesteps):
        # The straight path's noise level, and the velocity along which sigma grows: towards noise, or inverted to data.
        sigma = float(scheduler.sigmas[index])
        noise_level = 1 - sigma if inverted else sigma
        velocity = (state - POINT) / max(noise_level, 1e-6)
        output = -velocity if inverted else velocity
        state = scheduler.step(output, now, state, generator=generator).prev_sample
    return float(state.mean()), float(state.std())


found = {pair: end(*pair) for pair in ((False, False), (False, True), (True, False), (True, True))}
for (inverted, stochastic), (mean, deviation) in found.items():
    print(
        f"diffusers {diffusers.__version__}: inverted {inverted}, stochastic {stochastic}: "
        f"ends at {mean:.2f} with deviation {deviation:.2f}; the data is {POINT}"
    )
    right = abs(mean - POINT) < 0.02 and deviation < 0.02
    noise = abs(mean) < 0.1 and abs(deviation - 1) < 0.1
    assert noise if inverted and stochastic else right
PYTHON
