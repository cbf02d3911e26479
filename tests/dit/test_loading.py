"""Every format of a target: read it, train a drafter for it, sample with both; what is wrong with a file is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from training_worker import tiny_target

from free_dit import DiT, cli, loading
from free_dit.checkpoints import (
    convert_dit_to_diffusers,
    diffusers_config,
    use_original_arithmetic,
)
from free_dit.generation import ChainSettings
from free_dit.loading import load_target
from free_dit.networks.families import save_model
from free_kernels import DiTTarget, FeatureDrafter
from free_kernels.checkpoint import CheckpointError

FORMATS = ["ours", "original.pt", "original.safetensors", "transformer folder", "pipeline folder"]
SETTINGS = (
    "num_steps=12",
    "batch_size=4",
    "trajectories=3",
    "refresh_every=3",
    "calibration_images=2",
    "loop.iterations=5",
    "loop.checkpoint_every=2",
    "drafter.width=32",
)
NARROW = ("store=shards", "feature_dtype=bfloat16", "precision=bfloat16", "max_rows=2", "loop.accumulate=2")


def module() -> DiT:
    return tiny_target().module


def saved(kind: str, folder: Path) -> Path:
    """The tiny DiT in one of the formats."""
    if kind == "ours":
        save_model(folder / "model.safetensors", module())
        return folder / "model.safetensors"
    if kind == "original.pt":
        torch.save(module().state_dict(), folder / "DiT-tiny.pt")
        return folder / "DiT-tiny.pt"
    if kind == "original.safetensors":
        save_file(
            {name: tensor.contiguous() for name, tensor in module().state_dict().items()}, folder / "dit.safetensors"
        )
        return folder / "dit.safetensors"
    diffusers = pytest.importorskip("diffusers")
    transformer = diffusers.DiTTransformer2DModel(**diffusers_config(module().config))
    transformer.load_state_dict(convert_dit_to_diffusers(module().state_dict()))
    if kind == "transformer folder":
        transformer.save_pretrained(folder / "transformer")
        return folder / "transformer"
    autoencoder = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=1)
    diffusers.DiTPipeline(transformer, autoencoder, diffusers.DDPMScheduler()).save_pretrained(folder / "pipe")
    return folder / "pipe"


def heads(kind: str) -> int | None:
    """The original's files do not tell the heads of a width that is none of the published ones."""
    return 2 if kind.startswith("original") else None


@pytest.mark.parametrize("kind", FORMATS)
def test_each_format_is_read_and_trained_for_and_sampled(tmp_path, kind):
    path = saved(kind, tmp_path)
    family = "dit" if kind.startswith("original") else None
    if family is not None:
        with pytest.raises(
            ValueError,
            match="^load_target: family of .* must be 'dit' .* by family= or --family: both have its tensors",
        ):
            load_target(path, num_heads=heads(kind))
    target, drafter = load_target(path, num_heads=heads(kind), family=family)
    assert drafter is None
    x, t, y = torch.randn(3, 1, 8, 8), torch.tensor([0, 500, 999]), torch.tensor([0, 2, 3])
    if "folder" in kind:
        # Of the copy that is compared here; trained for is diffusers' own, which differs by more than rounding.
        use_original_arithmetic(target.module)
    torch.testing.assert_close(target.head(target.features(x, t, y), t, y), module()(x, t, y), rtol=1e-4, atol=1e-5)
    half, _ = load_target(path, dtype=torch.bfloat16, num_heads=heads(kind), family=family)
    assert half.features(x, t, y).dtype == torch.bfloat16

    run = tmp_path / "run"
    for settings, dtype in ((SETTINGS, None), (SETTINGS + NARROW, "bfloat16")):
        out = run / str(dtype)
        cli.train_drafter(
            out, str(path), set_=settings, device="cpu", dtype=dtype, num_heads=heads(kind), family=family
        )
        FeatureDrafter.load(out / "drafter.safetensors", target)
        assert (out / "trajectories").exists() == (dtype is not None)
    if heads(kind) is None:
        picture = tmp_path / "sample.png"
        drawn = str(run / "None" / "drafter.safetensors")
        cli.sample(picture, str(path), drawn, num=4, chain=ChainSettings(steps=12, guidance=2.0))
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_bundled_names_bring_their_drafter():
    target, drafter = load_target("digits", dtype=torch.float16)
    assert isinstance(target, DiTTarget)
    assert target.dtype == torch.float16
    assert drafter.positions.dtype == torch.float32


def test_what_is_no_target_is_named(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="path must be an existing file or folder, got none.pt; it may be a bund"
    ):
        load_target("none.pt")
    (tmp_path / "picture.png").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="picture.png must be a bundled model's name"):
        load_target(tmp_path / "picture.png")
    with pytest.raises(CheckpointError, match="must be a bundled model's name .*folder of diffusers"):
        load_target(tmp_path)
    target = tiny_target()
    FeatureDrafter(target.latent_shape, target.feature_shape, 3).save(tmp_path / "drafter.safetensors")
    with pytest.raises(CheckpointError, match="must hold a target, got 'feature_drafter'"):
        load_target(tmp_path / "drafter.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(CheckpointError, match="must be a complete safetensors file"):
        load_target(tmp_path / "torn.safetensors")
    with pytest.raises(ValueError, match="num_heads must be None for digits"):
        load_target("digits", num_heads=4)
    folder = tmp_path / "pipe" / "transformer"
    folder.mkdir(parents=True)
    (folder.parent / "model_index.json").write_text("{}")
    (folder / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    with pytest.raises(CheckpointError, match="must hold a DiTTransformer2DModel, got 'UNet2DModel'"):
        load_target(folder.parent)


def test_an_incomplete_folder_of_diffusers_is_named(tmp_path):
    path = saved("transformer folder", tmp_path)
    next(path.glob("*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match="must be a complete folder of diffusers"):
        load_target(path)


def test_facts_reach_the_loader(tmp_path, monkeypatch):
    """What ``--family`` and ``--no-null-label`` of the commands say."""
    asked = []

    def seen(*arguments, **keywords):
        asked.append((arguments, keywords))
        raise FileNotFoundError("seen")

    monkeypatch.setattr(loading, "load_target", seen)
    facts = loading.TargetFacts("sit", null_label=False)
    for command in (
        lambda: cli.sample(tmp_path / "x.png", "x.pt", facts=facts),
        lambda: cli.compare(tmp_path, "x.pt", facts=facts),
        lambda: cli.generate(tmp_path / "set", 2, "x.pt", facts=facts),
        lambda: cli.evaluate(tmp_path / "e", generate_=2, model="x.pt", facts=facts),
    ):
        with pytest.raises(FileNotFoundError, match="seen"):
            command()
    assert [arguments[0] for arguments, _ in asked] == ["x.pt"] * 4
    told = {"family": "sit", "has_null_label": False, "num_heads": None, "draws": None}
    assert all(keywords == told for _, keywords in asked)
