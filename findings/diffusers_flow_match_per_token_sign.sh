#!/usr/bin/env bash
# diffusers 0.42.1, FlowMatchEulerDiscreteScheduler.step: with per_token_timesteps, all of them the step's own timestep, the
# state moves by the same distance in the opposite direction: away from the data for an output that without the argument
# leads there.
# Expected: the same step, as every token is at the same timestep.
# Why it matters here: whoever checks a chain of ours against the scheduler's by per-token timesteps, as image-to-video
# pipelines call it, compares with the negated velocity; pipelines hide it by passing the output with its sign changed.
# Source: diffusers/schedulers/scheduling_flow_match_euler_discrete.py takes "current less next" as the step there and
# "next less current" otherwise; pipelines/ltx/pipeline_ltx_condition.py negates the output.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6 diffusers==0.42.1
cd "$work"
"$work/venv/bin/python" - <<'PYTHON'
import diffusers, torch
from diffusers import FlowMatchEulerDiscreteScheduler

tokens = 4
state, output = torch.randn(2, 1, tokens, 8, generator=torch.Generator().manual_seed(0))


def moved(per_token):
    """How far the first step moves a state of tokens along the output."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    now = scheduler.timesteps[0]
    asked = {"per_token_timesteps": now.expand(1, tokens)} if per_token else {}
    after = scheduler.step(output, now, state, **asked).prev_sample
    return float(((after - state) / output).mean())


plain, by_token = moved(False), moved(True)
print(f"diffusers {diffusers.__version__}: a step moves by {plain:.3f} of the output, by token by {by_token:.3f}")
assert plain < -0.3
assert abs(plain + by_token) < 1e-4
PYTHON
