#!/usr/bin/env bash
# diffusers 0.42.1, FlowMatchEulerDiscreteScheduler.step: the arguments s_churn, s_tmin, s_tmax and s_noise are accepted and
# never read, so a caller who asks for a stochastic step by s_churn > 0 gets the deterministic one, without a word.
# Expected: noise added as in EulerDiscreteScheduler.step, which has the same arguments, or an error.
# Why it matters here: such a call looks like a chain of Gaussian steps and is an ODE step without noise, which cannot be
# sampled speculatively; only stochastic_sampling=True in the configuration adds noise.
# Source: diffusers/schedulers/scheduling_flow_match_euler_discrete.py.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6 diffusers==0.42.1
cd "$work"
"$work/venv/bin/python" - <<'PYTHON'
import diffusers, torch
from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

state, output = torch.randn(2, 1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def moved(kind):
    """Largest change of a step when churn is asked for."""
    after = []
    for asked in ({}, {"s_churn": 1.0, "s_noise": 2.0}):
        scheduler = kind()
        scheduler.set_timesteps(4)
        generator = torch.Generator().manual_seed(1)
        after.append(scheduler.step(output, scheduler.timesteps[0], state, generator=generator, **asked).prev_sample)
    return float((after[0] - after[1]).abs().max())


euler, flow = moved(EulerDiscreteScheduler), moved(FlowMatchEulerDiscreteScheduler)
print(f"diffusers {diffusers.__version__}: churn changes a step of EulerDiscrete by {euler:.3g}, of FlowMatchEuler by {flow:.3g}")
assert euler > 0.1 and flow == 0.0
PYTHON
