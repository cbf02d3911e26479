#!/usr/bin/env bash
# diffusers 0.42.1, DDPMScheduler(variance_type="fixed_large_log"): step() returns NaN everywhere for finite inputs, without
# a warning. "fixed_small_log", the other name that ends in _log, has exactly the law of "fixed_small".
# Expected: the law of "fixed_large", or an error.
# Why it matters here: a scheduler that is read for its Gaussian transitions has no law there and has to be refused.
# Source: _get_variance returns the logarithm of beta for this name, and step() takes its square root as for a variance:
# diffusers/schedulers/scheduling_ddpm.py.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6 diffusers==0.42.1
cd "$work"
"$work/venv/bin/python" - <<'PYTHON'
import diffusers, torch
from diffusers import DDPMScheduler

state, output = torch.randn(2, 1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
after = {}
for name in ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"):
    scheduler = DDPMScheduler(variance_type=name, clip_sample=False)
    scheduler.set_timesteps(50)
    after[name] = scheduler.step(output, 500, state, generator=torch.Generator().manual_seed(1)).prev_sample
    print(f"diffusers {diffusers.__version__}, {name}: {after[name].isnan().float().mean():.0%} of the next state is NaN")
torch.testing.assert_close(after["fixed_small"], after["fixed_small_log"])
assert after["fixed_large"].isfinite().all() and after["fixed_large_log"].isnan().all()
PYTHON
