#!/usr/bin/env bash
# diffusers 0.42.1, FlowMatchEulerDiscreteScheduler(shift=3): the time shift is applied twice to the smallest noise level.
# With shift s the grid of n steps should end at s a / (1 + (s - 1) a), a = 1/1000; it ends at that value shifted again.
# Given sigmas=[...] are shifted once.
# Expected: one shift, so that shift only changes the spacing: .002994 for shift 3.  Seen: .008929.
# Why it matters here: a flow schedule that follows the published formula does not reproduce the scheduler: the last
# stochastic step starts from three times the noise.
# Source: __init__ shifts the training grid and keeps its ends as sigma_min and sigma_max; set_timesteps spaces timesteps
# between these ends and shifts again: diffusers/schedulers/scheduling_flow_match_euler_discrete.py.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6 diffusers==0.42.1
cd "$work"
"$work/venv/bin/python" - <<'PYTHON'
import diffusers
from diffusers import FlowMatchEulerDiscreteScheduler


def shifted(sigma, shift):
    return shift * sigma / (1 + (shift - 1) * sigma)


shift = 3.0
scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
scheduler.set_timesteps(4)
last = float(scheduler.sigmas[-2])
once, twice = shifted(1e-3, shift), shifted(shifted(1e-3, shift), shift)
print(f"diffusers {diffusers.__version__}: smallest sigma {last:.6f}; shifted once {once:.6f}, twice {twice:.6f}")
assert abs(last - twice) < 1e-6 and abs(last - once) > 5e-3
scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
print("given sigmas [1, .75, .5, .25] become", [round(float(sigma), 4) for sigma in scheduler.sigmas])
assert abs(float(scheduler.sigmas[3]) - shifted(0.25, shift)) < 1e-6
PYTHON
