"""The accelerated pipeline against ``DiTPipeline`` as installed, on the same noise."""

from __future__ import annotations

import functools
import json

import numpy as np
import pytest
import torch
from analytic import PerfectDrafter
from originals import randomised

pytest.importorskip("diffusers")

import diffusers.pipelines.dit.pipeline_dit as pipeline_dit
import diffusers.schedulers.scheduling_ddpm as scheduling_ddpm
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
)

from free_kernels import (
    DDPMSchedule,
    DiffusersDiTTarget,
    DrafterConfig,
    FeatureDrafter,
    ancestral_sample,
)
from free_kernels.constants import TransitionColumn
from free_kernels.integrations.diffusers import AcceleratedDiTPipeline, accelerate

STEPS = 10
LABELS = [3, 999, 0]


def make_pipe(out_channels: int = 8, **scheduler) -> DiTPipeline:
    """A pipeline of ImageNet's shape and a small network: 1000 classes, a latent of 4 x 8 x 8."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(4, 16, 4, out_channels, num_layers=2, sample_size=8, num_embeds_ada_norm=1000)
    randomised(transformer, scale=0.1)
    for parameter in transformer.proj_out_2.parameters():
        parameter.mul_(0.3)
    vae = AutoencoderKL(latent_channels=4, norm_num_groups=4, block_out_channels=(8,), sample_size=8).eval()
    settings = {"timestep_spacing": "linspace", "clip_sample": False, **scheduler}
    names = {0: "tench, Tinca tinca", 3: "white shark", 999: "toilet tissue"}
    pipe = DiTPipeline(transformer, vae, DDPMScheduler(**settings), names)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def noise(monkeypatch) -> torch.Tensor:
    """Noise ``[N, K, C, H, W]`` that DiTPipeline and its scheduler are given too, the same for both branches."""
    held = torch.randn(len(LABELS), STEPS + 1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    drawn = 0

    def next_noise(shape, **_):
        nonlocal drawn
        drawn += 1
        rows = held[:, drawn]
        return torch.cat([rows, rows]) if shape[0] == 2 * len(rows) else rows

    def initial_noise(**_):
        nonlocal drawn
        drawn = 0
        return held[:, 0]

    monkeypatch.setattr(pipeline_dit, "randn_tensor", initial_noise)
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", next_noise)
    return held


SETTINGS = [
    {},
    {"variance_type": "fixed_large"},
    {"clip_sample": True},
    {"timestep_spacing": "leading"},
    {"timestep_spacing": "leading", "steps_offset": 1},
    {"timestep_spacing": "trailing", "variance_type": "fixed_large"},
    {"prediction_type": "v_prediction", "beta_schedule": "scaled_linear"},
    {"prediction_type": "sample", "beta_schedule": "squaredcos_cap_v2"},
]


def entries(schedule: DDPMSchedule, noise: torch.Tensor) -> torch.Tensor:
    """The part of the noise that the samplers take: the last step's only where it adds some."""
    last = schedule.table(schedule.variance)[-1, TransitionColumn.LOG_STD]
    return noise[:, : STEPS + int(last > -torch.inf)]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_every_way_of_sampling_gives_the_pipelines_images(noise, settings, guidance):
    """The ordinary sampler, ordinary steps through the pipeline, and a perfect drafter."""
    pipe = make_pipe(**settings)
    call = {"guidance_scale": guidance, "num_inference_steps": STEPS, "output_type": "pt"}
    expected = pipe(LABELS, **call).images
    assert expected.std() > 0.01
    target = DiffusersDiTTarget(pipe.transformer)
    schedule = DDPMSchedule.from_diffusers(pipe.scheduler, STEPS)
    held = entries(schedule, noise)
    latents = ancestral_sample(
        target, torch.tensor(LABELS), schedule=schedule, guidance_scale=guidance, noise=held
    ).samples
    tolerance = {"rtol": 1e-3, "atol": 1e-3}
    torch.testing.assert_close(accelerate(pipe)._decoded(latents, "pt"), expected, **tolerance)
    for arguments in ({"draft_length": 1}, {"drafter": PerfectDrafter(target), "draft_length": 4}):
        fast = accelerate(pipe, **arguments)
        with held_noise(held):
            images = fast(LABELS, **call).images
        torch.testing.assert_close(images, expected, **tolerance)
    assert fast.stats.acceptance == 1
    assert fast.stats.call_reduction > 2


def test_guidance_of_images_and_steps_passes_through(noise):
    """Each image as the pipeline draws it at its own scale; scales up to 1 are none there."""
    pipe, scales = make_pipe(), torch.linspace(0.5, 6.0, len(LABELS))
    call = {"num_inference_steps": STEPS, "output_type": "pt"}
    wanted = [pipe(LABELS, guidance_scale=float(w), **call).images[image] for image, w in enumerate(scales)]
    fast = accelerate(pipe, drafter=PerfectDrafter(DiffusersDiTTarget(pipe.transformer)), draft_length=4)
    schedule = DDPMSchedule.from_diffusers(pipe.scheduler, STEPS)
    for scale in (scales, lambda step: scales):
        with held_noise(entries(schedule, noise)):
            images = fast(LABELS, guidance_scale=scale, **call).images
        torch.testing.assert_close(images, torch.stack(wanted), rtol=1e-3, atol=1e-3)
    limited = accelerate(pipe, draft_length=1, guidance_interval=(2000, 3000))
    with held_noise(entries(schedule, noise)):
        images = limited(LABELS, guidance_scale=4.0, **call).images
    torch.testing.assert_close(images, pipe(LABELS, guidance_scale=1.0, **call).images, rtol=1e-3, atol=1e-3)


class held_noise:
    """Hands the integration a noise tensor where it would key its own."""

    def __init__(self, noise: torch.Tensor) -> None:
        self.noise = noise

    def __enter__(self) -> None:
        import free_kernels.integrations.diffusers as integration

        self.module, self.original = integration, integration._randomness
        integration._randomness = lambda *_: {"noise": self.noise}

    def __exit__(self, *_) -> None:
        self.module._randomness = self.original


def test_three_guided_channels_are_the_originals(noise):
    """``guidance_channels=3`` differs from the pipeline, which guides all four, in the way that the original does."""
    pipe = make_pipe()
    target, schedule = DiffusersDiTTarget(pipe.transformer), DDPMSchedule.from_diffusers(pipe.scheduler, STEPS)
    labels, state = torch.tensor(LABELS), noise[:, 0]
    settings = {"schedule": schedule, "guidance_scale": 4.0, "noise": noise[:, :STEPS]}
    null = torch.full_like(labels, 1000)
    pipe.scheduler.set_timesteps(STEPS)
    for k, t in enumerate(pipe.scheduler.timesteps):
        conditional, free = (pipe.transformer(state, t.expand(3), y).sample[:, :4] for y in (labels, null))
        output = torch.cat([free[:, :3] + 4.0 * (conditional - free)[:, :3], conditional[:, 3:]], dim=1)
        monkey = scheduling_ddpm.randn_tensor
        scheduling_ddpm.randn_tensor = lambda *_, k=k, **__: noise[:, k + 1]
        state = pipe.scheduler.step(output, t, state).prev_sample
        scheduling_ddpm.randn_tensor = monkey
    three = ancestral_sample(target, labels, guidance_channels=3, **settings).samples
    torch.testing.assert_close(three, state, rtol=1e-3, atol=1e-3)
    assert float((ancestral_sample(target, labels, **settings).samples - state).abs().max()) > 1e-2


def test_wrong_noise_is_seen(noise):
    """The comparison's negative control."""
    pipe = make_pipe()
    call = {"num_inference_steps": STEPS, "output_type": "pt"}
    expected = pipe(LABELS, **call).images
    with held_noise(noise[:, :STEPS].flip(0)):
        images = accelerate(pipe, draft_length=1)(LABELS, **call).images
    assert float((images - expected).abs().max()) > 1e-2


def test_a_pipeline_from_a_folder_keeps_its_outputs(tmp_path):
    make_pipe().save_pretrained(tmp_path / "dit")
    pipe = DiTPipeline.from_pretrained(tmp_path / "dit")
    pipe.labels = make_pipe().labels
    fast = accelerate(pipe, drafter="frozen", draft_length=4)
    fast.set_progress_bar_config(disable=True)
    assert isinstance(fast, DiTPipeline)
    assert fast.get_label_ids(["white shark", "tench"]) == [3, 0]
    call = {"class_labels": [3, 0], "num_inference_steps": 5}
    pictures = fast(**call).images
    assert [picture.size for picture in pictures] == [(8, 8), (8, 8)]
    arrays = fast(**call, output_type="np", return_dict=False)
    assert isinstance(arrays, tuple)
    assert (arrays[0].shape, arrays[0].dtype) == ((2, 8, 8, 3), np.float32)
    tensors = fast(**call, output_type="pt", guidance_scale=1.0).images
    assert tensors.shape == (2, 3, 8, 8)
    assert float(tensors.min()) >= 0
    assert float(tensors.max()) <= 1
    assert fast.stats.target_calls > 0
    fast.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "model_index.json").read_text())["_class_name"] == "DiTPipeline"
    again = accelerate(DiTPipeline.from_pretrained(tmp_path / "again"), draft_length=4)
    again.set_progress_bar_config(disable=True)
    one, other = (p(**call, generator=torch.Generator().manual_seed(1), output_type="np").images for p in (fast, again))
    np.testing.assert_allclose(one, other, atol=1e-5)


def test_a_generator_is_the_seed():
    fast = accelerate(make_pipe(), draft_length=3)
    call = {"num_inference_steps": 4, "output_type": "pt"}

    def images(generator, labels=LABELS):
        return fast(labels, generator=generator, **call).images

    def seeded(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    (one,) = seeded(5)
    first, second = images(one), images(one)
    assert not torch.equal(first, second), "a generator moves on, as in the pipeline"
    torch.testing.assert_close(images(*seeded(5)), first)
    torch.testing.assert_close(images(seeded(5)), first)
    torch.manual_seed(7)
    default = images(None)
    torch.manual_seed(7)
    torch.testing.assert_close(images(None), default)
    own = images(seeded(1, 2, 3))
    turned = images(seeded(3, 1, 2), [LABELS[2], LABELS[0], LABELS[1]])
    torch.testing.assert_close(turned, own[[2, 0, 1]], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(images(seeded(2), LABELS[1:2]), own[1:2], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(own[0], images(seeded(9, 2, 3))[0])


def test_progress_and_callback_see_every_step(capsys):
    seen = []
    fast = accelerate(make_pipe(), draft_length=3, callback=seen.append, max_slots=2)
    fast.set_progress_bar_config(disable=False)
    fast(LABELS, num_inference_steps=4, output_type="pt")
    assert "12/12" in capsys.readouterr().err
    assert seen[-1].images_done == 3


def test_a_learned_drafter_fits_and_another_models_does_not():
    pipe = make_pipe()
    target = DiffusersDiTTarget(pipe.transformer)
    config = DrafterConfig()
    drafter = FeatureDrafter(target.latent_shape, target.feature_shape, target.num_classes, config).eval()
    fast = accelerate(pipe, drafter, draft_length=9)
    fast(LABELS, num_inference_steps=4, output_type="pt")
    assert fast.stats.drafter_calls > 0
    with pytest.raises(ValueError, match="^accelerate: drafter"):
        accelerate(pipe, FeatureDrafter((4, 8, 8), (16, 128), 1000, config))


def test_a_compiled_transformer_stays_compiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    pipe = make_pipe()
    call = {"num_inference_steps": 4, "output_type": "pt"}
    expected = accelerate(pipe)([3, 5], generator=torch.Generator().manual_seed(1), **call).images
    pipe.transformer = torch.compile(pipe.transformer)
    fast = accelerate(pipe)
    images = fast([3, 5], generator=torch.Generator().manual_seed(1), **call).images
    assert fast._adapted[1].compile
    torch.testing.assert_close(images, expected, rtol=1e-3, atol=1e-3)


def test_half_precision_and_float32_states():
    pipe = make_pipe().to(dtype=torch.bfloat16)
    images = accelerate(pipe)([3], num_inference_steps=3, output_type="pt").images
    assert images.dtype == torch.bfloat16
    assert bool(images.isfinite().all())


@pytest.mark.parametrize("kind", [DDIMScheduler, DPMSolverMultistepScheduler])
def test_schedulers_without_noise_are_refused(kind):
    pipe = make_pipe()
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match=f"no fresh noise in their steps to speculate on.*got {kind.__name__}"):
        accelerate(pipe)
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    fast = accelerate(pipe)
    fast.scheduler = kind.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="no fresh noise"):
        fast([3])


def test_what_cannot_be_accelerated_is_refused():
    pipe = make_pipe()
    with pytest.raises(TypeError, match="^accelerate: pipe must be a diffusers DiTPipeline, got DiTTransformer2DModel"):
        accelerate(pipe.transformer)
    with pytest.raises(TypeError, match="^accelerate: settings must be among .*draft_length.*got 'seed'"):
        accelerate(pipe, seed=3)
    for name, value in (("callback", 5), ("draft_length", 0), ("drafter", None)):
        with pytest.raises((TypeError, ValueError), match=f"^accelerate: {name} must be"):
            accelerate(pipe, **{name: value})
    with pytest.raises(ValueError, match="DiTPipeline drops the learned variance"):
        accelerate(make_pipe(variance_type="learned_range"))
    pipe.transformer._hf_hook = object()
    with pytest.raises(ValueError, match="^accelerate: pipe must be without CPU offload"):
        accelerate(pipe)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"generator": 3}, TypeError, "generator must be None, a torch.Generator or a list of them"),
        (
            {"generator": [torch.Generator()] * 2},
            ValueError,
            "generator must be one, or a list of 3, one for each label",
        ),
        ({"guidance_scale": -1.0}, ValueError, "guidance_scale must be a finite number"),
        ({"class_labels": [1000]}, ValueError, r"class_labels must be int64 \[N\] in \[0, 1000\)"),
        ({"class_labels": ["a cat"]}, TypeError, r"class_labels must be N class ids .* got \['a cat'\]"),
        ({"output_type": "latent"}, ValueError, "output_type must be one of 'pil', 'np', 'pt', got 'latent'"),
        ({"num_inference_steps": 0}, ValueError, "^AcceleratedDiTPipeline: num_inference_steps must be an int in"),
    ],
)
def test_wrong_calls_are_named(call, error, message):
    fast = accelerate(make_pipe())
    assert type(fast) is AcceleratedDiTPipeline
    with pytest.raises(error, match=message):
        fast(**{"class_labels": LABELS, "num_inference_steps": 4, **call})
