#!/usr/bin/env bash
# diffusers 0.42.1, DDPMScheduler(timestep_spacing="trailing"): for 62 of the numbers of steps from 1 to 1,000 (61, 103,
# 121, 122, 201 ...) set_timesteps returns one step more than asked for, and the last one is timestep -1. Indexing
# alphas_cumprod with it reads the noisiest level: with 61 steps alpha_bar is .9960 at the last but one, .00004 at the last.
# Expected: as many timesteps as asked for, all of them in [0, num_train_timesteps).
# Why it matters here: a schedule read off a scheduler must leave a negative timestep out; a chain of Gaussian
# steps built from it silently ends in noise.
# Source: DDPMScheduler.set_timesteps counts down from num_train_timesteps by the float num_train_timesteps / n with
# np.arange, whose length depends on rounding: diffusers/schedulers/scheduling_ddpm.py.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6 diffusers==0.42.1
cd "$work"
"$work/venv/bin/python" - <<'PYTHON'
import diffusers
from diffusers import DDPMScheduler

longer = []
for count in range(1, 1001):
    scheduler = DDPMScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(count)
    if len(scheduler.timesteps) != count:
        longer.append((count, len(scheduler.timesteps), int(scheduler.timesteps[-1])))
scheduler = DDPMScheduler(timestep_spacing="trailing")
scheduler.set_timesteps(61)
read, last_but_one = (float(scheduler.alphas_cumprod[t]) for t in (scheduler.timesteps[-1], scheduler.timesteps[-2]))
print(f"diffusers {diffusers.__version__}: {len(longer)} of 1,000 numbers of steps; asked, got, last timestep: {longer[:5]}")
print(f"61 steps: alpha_bar at the last two timesteps {last_but_one:.4f}, {read:.6f}")
assert len(longer) == 62 and all(got == asked + 1 and last == -1 for asked, got, last in longer), longer
assert last_but_one > 0.99 and read < 1e-4
PYTHON
