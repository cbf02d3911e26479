#!/usr/bin/env bash
# diffusers 0.42.1, DiTPipeline: with a scheduler that scales the network's input (EulerAncestralDiscreteScheduler), the
# pipeline hands the scaled input to scheduler.step as the state. Every step then starts from a state that is smaller by
# sqrt(sigma^2 + 1) than the one that the step before returned, so the chain is not the scheduler's, whatever the first
# latents are.
# Expected: what scheduler.step returned goes into the next scheduler.step, as in the other pipelines of the library.
# Why it matters here: a sampler that replaces the pipeline must keep the scheduler's law, and cannot be tested against
# the pipeline's images with such a scheduler.
# Source: DiTPipeline.__call__ keeps one variable for the state and for the network's input:
# diffusers/pipelines/dit/pipeline_dit.py.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6 diffusers==0.42.1
cd "$work"
"$work/venv/bin/python" - <<'PYTHON'
import diffusers, torch, warnings

warnings.filterwarnings("ignore")
from diffusers import AutoencoderKL, DiTPipeline, DiTTransformer2DModel, EulerAncestralDiscreteScheduler

torch.manual_seed(0)
transformer = DiTTransformer2DModel(
    num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, num_layers=1, sample_size=8, patch_size=2
).eval()
vae = AutoencoderKL(
    block_out_channels=(8,), latent_channels=4, norm_num_groups=4, down_block_types=("DownEncoderBlock2D",),
    up_block_types=("UpDecoderBlock2D",),
).eval()
scheduler = EulerAncestralDiscreteScheduler()
step, taken, returned = scheduler.step, [], []


def watched(output, t, sample, **settings):
    taken.append(sample)
    result = step(output, t, sample, **settings)
    returned.append(result.prev_sample)
    return result


scheduler.step = watched
pipe = DiTPipeline(transformer, vae, scheduler)
pipe.set_progress_bar_config(disable=True)
pipe([1], guidance_scale=1.0, num_inference_steps=4, output_type="np")
sigmas = scheduler.sigmas[1:4]
ratios = [float((new / old).median()) for new, old in zip(taken[1:], returned)]
expected = [float(1 / (sigma**2 + 1).sqrt()) for sigma in sigmas]
print(f"diffusers {diffusers.__version__}: state taken over state returned {ratios}, 1 / sqrt(sigma^2 + 1) {expected}")
assert all(abs(a / b - 1) < 1e-4 for a, b in zip(ratios, expected)) and ratios[0] < 0.9
PYTHON
