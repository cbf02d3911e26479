#!/usr/bin/env bash
# diffusers 0.42.1, DiTPipeline: the argument `generator` draws the first latents only. The noise of every step comes from
# the global random state, so two calls with equal generators give different images.
# Expected: the images depend on the generator alone, as the argument's documentation says ("to make generation
# deterministic").
# Why it matters here: a sampler that replaces the pipeline can keep its law, not its images for a seed; a comparison of the
# two by equal generators needs the global seed set as well.
# Source: DiTPipeline.__call__ calls scheduler.step without the generator: diffusers/pipelines/dit/pipeline_dit.py.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6 diffusers==0.42.1
cd "$work"
"$work/venv/bin/python" - <<'PYTHON'
import diffusers, torch, warnings

warnings.filterwarnings("ignore")
from diffusers import AutoencoderKL, DDPMScheduler, DiTPipeline, DiTTransformer2DModel, EulerDiscreteScheduler

torch.manual_seed(0)
transformer = DiTTransformer2DModel(
    num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=1, sample_size=8, patch_size=2
).eval()
vae = AutoencoderKL(
    block_out_channels=(8,), latent_channels=4, norm_num_groups=4, down_block_types=("DownEncoderBlock2D",),
    up_block_types=("UpDecoderBlock2D",),
).eval()


def images(global_seed):
    pipe = DiTPipeline(transformer, vae, DDPMScheduler())
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(global_seed)
    return torch.from_numpy(pipe([1], generator=torch.Generator().manual_seed(7), num_inference_steps=4, output_type="np").images)


first, again, other = images(1), images(1), images(2)
same, different = float((first - again).abs().max()), float((first - other).abs().max())
print(f"diffusers {diffusers.__version__}: equal generators; equal global seeds differ by {same:.3g}, unequal ones by {different:.3g}")
assert same == 0.0 and different > 0.01
PYTHON
