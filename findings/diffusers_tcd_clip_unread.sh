#!/usr/bin/env bash
# diffusers 0.42.1, TCDScheduler: the arguments `clip_sample` (with `clip_sample_range`) and `thresholding` are accepted,
# documented and stored in the configuration, and no step reads them: the predicted clean sample is never bounded.
# Expected: a step bounds the clean sample, as DDPMScheduler and DDIMScheduler do with the same arguments.
# Why it matters here: a schedule that is read from the scheduler's configuration must leave the bound out, or it samples
# another law than the scheduler.
# Source: TCDScheduler.step in diffusers/schedulers/scheduling_tcd.py, where the clean sample is used as predicted.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6 diffusers==0.42.1
cd "$work"
"$work/venv/bin/python" - <<'PYTHON'
import diffusers, torch
from diffusers import DDIMScheduler, TCDScheduler

torch.manual_seed(0)
state, output = torch.randn(2, 1, 4, 8, 8)


def clean(kind, **settings):
    scheduler = kind(**settings)
    scheduler.set_timesteps(4)
    t = scheduler.timesteps[0]
    result = scheduler.step(output, t, state, generator=torch.Generator().manual_seed(0))
    return float((result.pred_original_sample if kind is DDIMScheduler else result.pred_noised_sample).abs().max())


bounded = {"clip_sample": True, "clip_sample_range": 0.5}
plain = {"clip_sample": False}
for settings in (bounded, {"clip_sample": False, "thresholding": True}):
    tcd, tcd_plain = clean(TCDScheduler, **settings), clean(TCDScheduler, **plain)
    ddim, ddim_plain = clean(DDIMScheduler, **settings), clean(DDIMScheduler, **plain)
    print(f"diffusers {diffusers.__version__}: {settings}: TCD {tcd_plain:.4g} -> {tcd:.4g}, DDIM {ddim_plain:.4g} -> {ddim:.4g}")
    assert tcd == tcd_plain and ddim < ddim_plain and ddim <= 1.0
PYTHON
