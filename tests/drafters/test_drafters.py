"""Drafters: shapes, the hoisted form, saving and loading, damaged files."""

from __future__ import annotations

import pytest
import torch
from random_networks import random_dit
from safetensors.torch import save_file

from free_kernels import DiTTarget, DrafterConfig, FeatureDrafter, FrozenDrafter
from free_kernels.checkpoint import CheckpointError

CONFIG = DrafterConfig(width=64, depth=2, head_dim=16)


def random_drafter(seed: int = 0) -> FeatureDrafter:
    torch.manual_seed(seed)
    drafter = FeatureDrafter((4, 8, 8), (16, 48), 5, CONFIG).eval().requires_grad_(False)
    for parameter in drafter.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.2)
    drafter.set_feature_scale(torch.randn(50, 48) * 3 + 1, torch.randn(50, 48))
    return drafter


def arguments(rows: int = 5):
    generator = torch.Generator().manual_seed(2)
    feature = torch.randn(rows, 16, 48, generator=generator)
    previous, state = torch.randn(2, rows, 4, 8, 8, generator=generator)
    return feature, previous, state, torch.arange(rows) * 100, torch.arange(rows)


def test_an_untrained_drafter_is_the_frozen_one():
    drafter = FeatureDrafter((4, 8, 8), (16, 48), 5, CONFIG)
    feature, *rest = arguments()
    torch.testing.assert_close(drafter(feature, *rest), FrozenDrafter()(feature, *rest), rtol=0, atol=0)


def test_the_hoisted_form_computes_the_same():
    drafter = random_drafter()
    given = arguments()
    fast = drafter.hoisted(given[3], given[4])
    assert fast is not drafter
    expected = drafter(*given)
    assert not torch.allclose(expected, given[0], atol=0.1)
    torch.testing.assert_close(fast(*given), expected, rtol=1e-4, atol=1e-4)


def test_every_input_matters():
    drafter = random_drafter()
    feature, previous, state, t, y = arguments()
    base = drafter(feature, previous, state, t, y)
    for changed in (
        (feature + torch.randn_like(feature), previous, state, t, y),
        (feature, previous + torch.randn_like(previous), state, t, y),
        (feature, previous, state + 1, t, y),
        (feature, previous, state, t + 37, y),
        (feature, previous, state, t, (y + 1) % 6),
    ):
        assert not torch.allclose(drafter(*changed) - changed[0], base - feature, atol=1e-3)


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_saving_and_loading(tmp_path, dtype):
    drafter = random_drafter()
    path = tmp_path / "sub" / "drafter.safetensors"
    drafter.save(path, dtype=dtype)
    again = FeatureDrafter.load(path, DiTTarget(random_dit()))
    tolerance = 0 if dtype is None else 1e-2
    torch.testing.assert_close(again(*arguments()), drafter(*arguments()), rtol=tolerance, atol=5 * tolerance)
    assert not again.training
    assert [p.name for p in path.parent.iterdir()] == ["drafter.safetensors"], "no temporary file stays"


def test_a_drafter_of_another_target_is_refused(tmp_path):
    path = tmp_path / "drafter.safetensors"
    FeatureDrafter((4, 8, 8), (16, 32), 5, DrafterConfig()).save(path)
    with pytest.raises(
        ValueError, match=r"^FeatureDrafter.load: drafter must be one made for a target with feature_shape"
    ):
        FeatureDrafter.load(path, DiTTarget(random_dit()))
    with pytest.raises(
        TypeError, match=r"^FeatureDrafter.load: target must be a target such as DiTTarget.module., got DiT$"
    ):
        FeatureDrafter.load(path, random_dit())


def test_damaged_files_are_named(tmp_path):
    path = tmp_path / "drafter.safetensors"
    random_drafter().save(path)
    whole = path.read_bytes()
    for cut in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(CheckpointError, match="must be a complete safetensors file"):
            FeatureDrafter.load(path)
    path.write_bytes(b"\x80\x04pickle" + whole)
    with pytest.raises(CheckpointError, match="must be a complete safetensors file"):
        FeatureDrafter.load(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="must be a checkpoint of kind 'feature_drafter', got None"):
        FeatureDrafter.load(path)
    with pytest.raises(FileNotFoundError, match="must be an existing file"):
        FeatureDrafter.load(tmp_path / "missing.safetensors")


def test_unwritable_paths_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        random_drafter().save(tmp_path / "file" / "drafter.safetensors")


@pytest.mark.parametrize(
    ("latent", "features", "config", "message"),
    [
        ((4, 8, 8), (15, 48), CONFIG, "feature_shape must be T square patches tiling 8 x 8"),
        ((4,), (4, 48), CONFIG, r"latent_shape must be \(C, H, W\), .*, got \(4,\)"),
        ((4, 1, 2, 8, 8), (16, 48), CONFIG, r"latent_shape must be \(C, H, W\), .*, got \(4, 1, 2, 8, 8\)"),
        ((), (4, 48), CONFIG, r"latent_shape must be ints of at least 1, one or more, got \(\)"),
        ((4, 8, 8), (16,), CONFIG, r"feature_shape must be ints of at least 1, \(T, D\), got \(16,\)"),
        ((4, 8, 8), (0, 48), CONFIG, r"feature_shape must be ints of at least 1, \(T, D\), got \(0, 48\)"),
        ((4, 8, 8), (16, 48), DrafterConfig(width=65), "width must be a multiple of head_dim 32, got 65"),
        ((4, 8, 8), (16, 48), DrafterConfig(width=0), r"width must be an int in \[1, inf\), got 0"),
        ((4, 8, 8), (16, 48), DrafterConfig(width=-32), r"width must be an int in \[1, inf\), got -32"),
        ((4, 8, 8), (16, 48), DrafterConfig(depth=0), r"depth must be an int in \[1, inf\), got 0"),
        ((4, 8, 8), (16, 48), DrafterConfig(head_dim=0), r"head_dim must be an int in \[1, inf\), got 0"),
        ((4, 8, 8), (16, 48), DrafterConfig(num_timesteps=0), r"num_timesteps must be an int in \[1, inf\), got 0"),
        (
            (4, 8, 8),
            (16, 48),
            DrafterConfig(width=32, mlp_ratio=0.03),
            r"mlp_ratio must be a finite number in \[0.03125",
        ),
    ],
)
def test_impossible_shapes_are_refused(latent, features, config, message):
    with pytest.raises(ValueError, match=f"^FeatureDrafter: {message}"):
        FeatureDrafter(latent, features, 5, config)


def test_an_unhoisted_drafter_has_its_constants_on_its_own_device():
    drafter = FeatureDrafter((1, 4, 4), (4, 32), 3, DrafterConfig(depth=2)).to("meta")
    assert drafter._modulation_offsets.is_meta
    assert "_modulation_offsets" not in drafter.state_dict()
    rows = FeatureDrafter((1, 4, 4), (4, 32), 3, DrafterConfig(depth=2))._modulations(torch.zeros(1), torch.tensor([0]))
    # Untrained, modulations are shift 0, scale 1 and gate 1, then those of the head and of the skip.
    assert rows.flatten(1)[0].view(15, 32)[:, 0].tolist() == [0.0, 1.0, 1.0] * 5
