"""Latent models: decoded by the VAE that they are given, kept as latents, or refused; never drawn as pictures."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from latent_models import make_vae, random_dit, save_dit, save_vae

from free_dit import checkpoints, cli
from free_dit.commands.shared import VAEChoice
from free_dit.evaluation import open_images
from free_dit.evaluation.report import EvaluationSettings
from free_dit.generation import ChainSettings, DrawSettings, SampleFolder, to_pixels
from free_dit.latents import LatentDecoder, draws_latents, load_vae
from free_dit.loading import load_target
from free_kernels import DDPMSchedule, ancestral_sample
from free_kernels.checkpoint import CheckpointError

CHAIN = ChainSettings(steps=4, draft_length=2, seed=3)
DRAW = DrawSettings(steps=4, draft_length=2, seed=3, drafter="none", shard=3)


def drawn(path, count: int) -> torch.Tensor:
    """Samples of the ordinary sampler."""
    target, _ = load_target(path)
    return ancestral_sample(target, torch.arange(count) % 3, schedule=DDPMSchedule(4), seed=3).samples


@pytest.mark.parametrize(
    ("config", "scaled"),
    [
        ({}, lambda z: z / 0.18215),
        ({"scaling_factor": 0.5, "shift_factor": 0.25}, lambda z: z / 0.5 + 0.25),
        (
            {"scaling_factor": 0.5, "latents_mean": (0.0, 1.0, 2.0, 3.0), "latents_std": (1.0, 2.0, 3.0, 4.0)},
            lambda z: z * torch.arange(1.0, 5).view(1, -1, 1, 1) / 0.5 + torch.arange(4.0).view(1, -1, 1, 1),
        ),
    ],
    ids=["default factor", "factor and shift", "moments of channels"],
)
def test_latents_are_scaled_as_the_configuration_says(tmp_path, config, scaled):
    vae, latents = make_vae(**config), torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    whole = vae.decode(scaled(latents)).sample
    images = load_vae("test", save_vae(tmp_path, **config), batch=2)(latents)
    assert images.shape == (5, 3, 16, 16)
    # Parts of other sizes may sum in another order: a hundred spacings of the largest pixel.
    torch.testing.assert_close(images, whole, rtol=0, atol=100 * 2**-23 * float(whole.abs().max()))
    unscaled = vae.decode(latents).sample
    assert (images - unscaled).abs().max() > 0.01


def test_decoding_in_half_precision_returns_float32(tmp_path):
    decoder = load_vae("test", save_vae(tmp_path), dtype=torch.bfloat16)
    assert decoder.dtype == torch.bfloat16
    assert decoder(torch.zeros(1, 4, 8, 8)).dtype == torch.float32


def test_which_models_draw_latents(tmp_path):
    for channels, latents in ((1, False), (3, False), (4, True), (16, True)):
        folder = tmp_path / str(channels)
        folder.mkdir()
        path = save_dit(folder, channels)
        assert draws_latents(load_target(path)[0]) == latents
        assert draws_latents(load_target(path, draws="latents")[0])
        assert not draws_latents(load_target(path, draws="pixels")[0])
    # A file that says it is believed, and cannot be contradicted.
    path = save_dit(tmp_path, 3, draws="latents")
    assert draws_latents(load_target(path)[0])
    with pytest.raises(ValueError, match="^load_target: draws must be 'latents' for .*, which says it itself"):
        load_target(path, draws="pixels")
    with pytest.raises(ValueError, match="^load_target: draws must be one of 'pixels', 'latents', got 'audio'"):
        load_target(path, draws="audio")
    path = save_dit(tmp_path, 3, draws="audio")
    with pytest.raises(CheckpointError, match="must draw pixels or latents, got 'audio'"):
        load_target(path)


def test_without_a_vae_no_command_draws_pictures(tmp_path):
    path, out = str(save_dit(tmp_path)), tmp_path / "out"
    wanted = "vae must be the folder of the VAE that decodes the model's 4 latent channels"
    for suffix in ("png", "npz"):
        with pytest.raises(ValueError, match=f"^sample: {wanted}.*or --latents"):
            cli.sample(out / f"x.{suffix}", path, "frozen", num=2, chain=CHAIN)
    with pytest.raises(ValueError, match=f"^compare: {wanted}.*or --latents"):
        cli.compare(out, path, "frozen", num=2, chain=CHAIN)
    with pytest.raises(ValueError, match=f"^generate: {wanted}.*or --latents"):
        cli.generate(out, 2, path, DRAW, device="cpu")
    with pytest.raises(ValueError, match=rf"^evaluate: {wanted} \(--vae FOLDER\), got None"):
        cli.evaluate(out, generate_=2, model=path, drawing=DRAW, device="cpu")
    assert not list(tmp_path.rglob("*.np?")) + list(tmp_path.rglob("*.png"))


def test_sample_decodes_or_keeps_latents(tmp_path):
    path, vae = save_dit(tmp_path), save_vae(tmp_path)
    common = {"model": str(path), "drafter": "none", "num": 4, "chain": CHAIN}
    cli.sample(tmp_path / "x.npz", **common, vae=VAEChoice(vae))
    cli.sample(tmp_path / "x.png", **common, vae=VAEChoice(vae))
    cli.sample(tmp_path / "x.npy", **common, latents=True)
    latents = np.load(tmp_path / "x.npy")
    assert latents.dtype == np.float32
    np.testing.assert_array_equal(latents, drawn(path, 4).numpy())
    pixels, labels = np.load(tmp_path / "x.npz").values()
    np.testing.assert_array_equal(pixels, to_pixels(load_vae("test", vae)(torch.from_numpy(latents))))
    assert pixels.shape == (4, 16, 16, 3)
    assert labels.tolist() == [0, 1, 2, 0]
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="^sample: out must end in .npy with --latents, got"):
        cli.sample(tmp_path / "y.npz", **common, latents=True)
    with pytest.raises(ValueError, match="^sample: vae must be None with --latents"):
        cli.sample(tmp_path / "y.npy", **common, vae=VAEChoice(vae), latents=True)


def test_compare_decodes_or_keeps_latents(tmp_path):
    path, vae = save_dit(tmp_path), save_vae(tmp_path)
    common = {"model": str(path), "drafter": "frozen", "num": 3, "chain": CHAIN, "timing_pairs": 0}
    cli.compare(tmp_path / "a", **common, vae=VAEChoice(vae))
    assert (tmp_path / "a" / "samples.png").read_bytes().startswith(b"\x89PNG")
    cli.compare(tmp_path / "b", **common, latents=True)
    assert not (tmp_path / "b" / "samples.png").exists()
    np.testing.assert_array_equal(np.load(tmp_path / "b" / "ordinary.npy"), drawn(path, 3).numpy())
    assert np.load(tmp_path / "b" / "speculative.npy").shape == (3, 4, 8, 8)


def test_sets_are_decoded_and_say_by_what(tmp_path):
    path, vae = save_dit(tmp_path), save_vae(tmp_path)
    choice = VAEChoice(vae, vae_batch=2)
    cli.generate(tmp_path / "set", 5, str(path), DRAW, device="cpu", vae=choice)
    images = open_images(tmp_path / "set")
    decoder = load_vae("test", vae, batch=2)
    expected = torch.cat([decoder(part) for part in drawn(path, 5).split(3)])
    found = np.concatenate(list(images.batches(5)))
    # A level, because a shard is drawn in other batches than the whole.
    assert np.abs(found.astype(int) - to_pixels(expected)).max() <= 1
    manifest = json.loads((tmp_path / "set" / "manifest.json").read_text())
    assert manifest["vae_sha256"] == decoder.facts()["vae_sha256"]
    assert LatentDecoder(make_vae(scaling_factor=0.2)).facts()["vae_sha256"] != manifest["vae_sha256"]
    with pytest.raises(ValueError, match="same settings, got vae_batch 2 .now 8."):
        cli.generate(tmp_path / "set", 5, str(path), DRAW, device="cpu", vae=VAEChoice(vae))


def test_sets_of_latents(tmp_path):
    path = save_dit(tmp_path)
    cli.generate(tmp_path / "set", 5, str(path), DRAW, device="cpu", latents=True)
    samples = SampleFolder.open(tmp_path / "set")
    assert [path.name for path in sorted((tmp_path / "set" / "shards").glob("*.npy"))] == [
        "shard-000000.npy",
        "shard-000001.npy",
    ]
    latents = np.concatenate([samples.read(shard) for shard in range(2)])
    assert latents.dtype == np.float32
    # Shards are drawn in other batches than the whole, which may sum in another order: each of 4 steps may move a value
    # by some spacings of the largest.
    expected = drawn(path, 5).numpy()
    np.testing.assert_allclose(latents, expected, rtol=0, atol=4 * 16 * 2**-23 * np.abs(expected).max())
    with pytest.raises(ValueError, match="^evaluate: .*must be a set of images; draw it with --vae, got latents"):
        open_images(tmp_path / "set")
    with pytest.raises(ValueError, match="^generate: format must be npz with --latents"):
        cli.generate(tmp_path / "png", 5, str(path), DRAW, format_="png", device="cpu", latents=True)


def test_a_pipeline_brings_its_own_vae(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    module = random_dit()
    transformer = diffusers.DiTTransformer2DModel(**checkpoints.diffusers_config(module.config))
    transformer.load_state_dict(checkpoints.convert_dit_to_diffusers(module.state_dict()))
    diffusers.DiTPipeline(transformer, make_vae(), diffusers.DDPMScheduler()).save_pretrained(tmp_path / "pipe")
    common = {"drafter": "none", "num": 2, "chain": CHAIN}
    cli.sample(tmp_path / "own.npz", str(tmp_path / "pipe"), **common)
    cli.sample(tmp_path / "told.npz", str(tmp_path / "pipe"), **common, vae=VAEChoice(tmp_path / "pipe"))
    own, told = (np.load(tmp_path / f"{name}.npz")["arr_0"] for name in ("own", "told"))
    assert own.shape == (2, 16, 16, 3)
    np.testing.assert_array_equal(own, told)
    other = save_vae(tmp_path, scaling_factor=1.0)
    cli.sample(tmp_path / "other.npz", str(tmp_path / "pipe"), **common, vae=VAEChoice(other))
    assert (np.load(tmp_path / "other.npz")["arr_0"] != own).any()
    with pytest.raises(ValueError, match="^sample: vae must be the folder"):
        cli.sample(tmp_path / "x.npz", str(tmp_path / "pipe" / "transformer"), **common)


def test_what_is_no_vae_is_named(tmp_path):
    path, vae = str(save_dit(tmp_path)), save_vae(tmp_path, channels=16)
    common = {"model": path, "drafter": "none", "num": 2, "chain": CHAIN}

    def attempt(folder, **choice):
        cli.sample(tmp_path / "x.npz", **common, vae=VAEChoice(folder, **choice))

    with pytest.raises(ValueError, match="^sample: vae must be of 4 latent channels, as the model, got one of 16"):
        attempt(vae)
    with pytest.raises(FileNotFoundError, match="^sample: vae must be an existing folder"):
        attempt(tmp_path / "none")
    with pytest.raises(CheckpointError, match="^sample: vae must be a folder of diffusers' AutoencoderKL, got .*None"):
        attempt(tmp_path)
    with pytest.raises(ValueError, match="^sample: vae_batch must be an int in"):
        attempt(vae, vae_batch=0)
    weights = next(vae.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="^sample: vae must be a complete AutoencoderKL, got [^\n]*$"):
        attempt(vae)
    weights.unlink()
    with pytest.raises(CheckpointError, match="^sample: vae must be a complete AutoencoderKL, got [^\n]*$"):
        attempt(vae)
    pixels = save_dit(tmp_path, 3, draws="pixels")
    with pytest.raises(ValueError, match="^sample: vae must be None for a model that draws pixels"):
        cli.sample(tmp_path / "x.npz", str(pixels), "none", 2, chain=CHAIN, vae=VAEChoice(save_vae(tmp_path / "3", 3)))


def test_a_vae_without_some_weights_is_named(tmp_path):
    from safetensors.torch import load_file, save_file

    vae = save_vae(tmp_path)
    weights = next(vae.glob("*.safetensors"))
    held = load_file(weights)
    held.pop("decoder.conv_in.weight")
    save_file(held, weights, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"must be a complete AutoencoderKL, got .*decoder\.conv_in\.weight"):
        load_vae("test", vae)


def test_evaluate_draws_through_the_vae(tmp_path):
    """What it draws is images; the bundled classifier reads others, and says so."""
    path = save_dit(tmp_path)
    with pytest.raises(ValueError, match=r"uint8 \[N, 8, 8, 1\] for the digits classifier, got \[6, 16, 16, 3\]"):
        cli.evaluate(
            tmp_path / "out",
            generate_=6,
            model=str(path),
            drawing=DRAW,
            vae=VAEChoice(save_vae(tmp_path)),
            device="cpu",
            metrics=EvaluationSettings(resamples=2, permutations=0),
        )
    assert SampleFolder.open(tmp_path / "out" / "samples").read(0).shape == (3, 16, 16, 3)
