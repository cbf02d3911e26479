"""Files of the original's format, weights to and from diffusers, and the bundled digits DiT in both families."""

from __future__ import annotations

import argparse
import copy
import dataclasses

import pytest
import torch
from originals import OriginalDiT, random_inputs, randomised, relative_error
from safetensors.torch import save_file

import free_dit
from free_dit import DiT, DiTConfig, dit_config
from free_dit.checkpoints import (
    convert_diffusers_to_dit,
    convert_dit_to_diffusers,
    diffusers_config,
    infer_config,
    load_dit_checkpoint,
    use_original_arithmetic,
)
from free_kernels import DDPMSchedule, DiffusersDiTTarget, DiTTarget, ancestral_sample, sample
from free_kernels.checkpoint import CheckpointError

CONFIG = DiTConfig(input_size=8, patch_size=2, in_channels=4, hidden_size=48, depth=3, num_heads=4, num_classes=5)


# Of diffusers' output from the original's, over its largest element, for the bundled digits DiT's weights.
DIFFERENCE = 0.027


def small_dit(**changes) -> DiT:
    return randomised(DiT(dataclasses.replace(CONFIG, **changes)))


def same(module, other) -> bool:
    ours, theirs = module.state_dict(), other.state_dict()
    return list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    "changes",
    [{}, {"learn_sigma": False}, {"patch_size": 4, "depth": 2}, {"in_channels": 1, "mlp_ratio": 2.0}],
    ids=str,
)
def test_a_written_file_reads_back(tmp_path, changes):
    module = small_dit(**changes)
    torch.save(module.state_dict(), tmp_path / "dit.pt")
    loaded = load_dit_checkpoint(tmp_path / "dit.pt", num_heads=4)
    assert loaded.config == module.config
    assert same(loaded, module)
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())


def test_a_file_of_the_published_layout_is_the_module_it_came_from(tmp_path):
    """A state dict of timm-style parts loads strictly, and gives the same outputs."""
    original = randomised(OriginalDiT())
    torch.save(original.state_dict(), tmp_path / "dit.pt")
    loaded = load_dit_checkpoint(tmp_path / "dit.pt", num_heads=4)
    x, t, y = random_inputs(4, 8, 5)
    assert relative_error(loaded(x, t, y), original(x, t, y)) < 2e-5


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"model": {k: v * 0 for k, v in state.items()}, "ema": state, "opt": {"step": 3}},
        lambda state: {"model": state, "args": argparse.Namespace(model="DiT-XL/2", lr=1e-4)},
        lambda state: {"ema": {f"module.{name}": tensor for name, tensor in state.items()}},
        lambda state: {f"_orig_mod.{name}": tensor for name, tensor in state.items()},
        lambda state: {"state_dict": state, "epoch": 3},
    ],
    ids=["ema", "model", "distributed", "compiled", "state_dict"],
)
def test_training_checkpoints_are_unwrapped(tmp_path, wrap):
    module = small_dit()
    torch.save(wrap(module.state_dict()), tmp_path / "dit.pt")
    assert same(load_dit_checkpoint(tmp_path / "dit.pt", num_heads=4), module)


def test_safetensors_dtype_and_missing_null_label(tmp_path):
    module = small_dit(class_dropout_prob=0.0)
    save_file(module.state_dict(), tmp_path / "dit.safetensors")
    loaded = load_dit_checkpoint(tmp_path / "dit.safetensors", dtype=torch.bfloat16, num_heads=4, has_null_label=False)
    assert loaded.config == module.config
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert not DiTTarget(loaded).has_null_label


@pytest.mark.parametrize("name", ["DiT-S/2", "DiT-B/4", "DiT-L/2", "DiT-XL/2", "DiT-XL/8"])
def test_standard_sizes_are_told_by_their_shapes(name):
    """Config and strict names of every size, on the meta device."""
    with torch.device("meta"):
        module = DiT(dit_config(name))
    config = infer_config(module.state_dict())
    assert config == dit_config(name)
    with torch.device("meta"):
        DiT(config).load_state_dict(module.state_dict(), strict=True, assign=True)


def test_the_largest_size_has_the_published_parameters():
    """675 M (Peebles & Xie 2022, table 1) for XL/2; the position table is not counted as one."""
    with torch.device("meta"):
        module = DiT(dit_config("DiT-XL/2"))
    assert round(sum(p.numel() for p in module.parameters() if p.requires_grad) / 1e6) == 675
    target = DiTTarget(module.eval())
    assert (target.latent_shape, target.feature_shape) == ((4, 32, 32), (256, 1152))
    x, t, y = (
        torch.empty(2, *shape, dtype=kind, device="meta")
        for shape, kind in (((4, 32, 32), torch.float32), ((), torch.int64), ((), torch.int64))
    )
    h = target.features(x, t, y)
    assert h.shape == (2, 256, 1152)
    assert target.head(h, t, y).shape == (2, 8, 32, 32)


class _Trap:
    def __reduce__(self):
        return (pytest.fail, ("a pickled function was run",))


def write_garbage(path):
    path.write_bytes(b"not a checkpoint")


def write_truncated(path):
    torch.save(small_dit().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-2000])


BROKEN = {
    "garbage": (write_garbage, "must be a complete checkpoint of tensors"),
    "empty": (lambda path: path.write_bytes(b""), "must be a complete checkpoint of tensors"),
    "truncated": (write_truncated, "must be a complete checkpoint of tensors"),
    "code": (lambda path: torch.save({"model": _Trap()}, path), "must be a complete checkpoint of tensors"),
    "numbers": (lambda path: torch.save({"step": 3}, path), "must hold a state dict"),
    "list": (lambda path: torch.save([torch.ones(2)], path), "must hold a state dict"),
    "other": (lambda path: torch.save({"weight": torch.ones(2, 2)}, path), "x_embedder.proj.weight must be among"),
}


@pytest.mark.parametrize("kind", list(BROKEN))
def test_other_files_are_refused(tmp_path, kind):
    write, message = BROKEN[kind]
    write(tmp_path / "dit.pt")
    with pytest.raises(
        CheckpointError,
        match=rf"^load_dit_checkpoint: \S+dit\.pt {'must hold an orig.*' if kind == 'other' else ''}{message}",
    ):
        load_dit_checkpoint(tmp_path / "dit.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("blocks.1.attn.qkv.bias"), "Missing key.*blocks.1.attn.qkv.bias"),
        (lambda s: s.update({"blocks.0.extra.weight": torch.ones(3)}), "Unexpected key.*blocks.0.extra.weight"),
        (
            lambda s: s.update({"blocks.2.mlp.fc2.weight": torch.ones(3, 3)}),
            "size mismatch for blocks.2.mlp.fc2.weight",
        ),
        (lambda s: s.update({"pos_embed": torch.ones(1, 15, 48)}), "pos_embed must be of a square number of tokens"),
        (lambda s: s.update({"pos_embed": torch.ones(16, 48)}), "pos_embed must have 3 dimensions"),
        (
            lambda s: s.update({"final_layer.linear.weight": torch.ones(20, 48)}),
            "final_layer must have 4 or 8 channels",
        ),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, change, message):
    state = small_dit().state_dict()
    change(state)
    torch.save(state, tmp_path / "dit.pt")
    with pytest.raises(CheckpointError, match=f"(?s)must hold an original-style DiT; .*{message}"):
        load_dit_checkpoint(tmp_path / "dit.pt", num_heads=4)


def test_heads_are_asked_for_where_no_size_tells_them(tmp_path):
    torch.save(small_dit().state_dict(), tmp_path / "dit.pt")
    with pytest.raises(ValueError, match="num_heads must be given, .* no standard size has width 48 and depth 3"):
        load_dit_checkpoint(tmp_path / "dit.pt")
    with pytest.raises(FileNotFoundError, match="^load_dit_checkpoint: path must be an existing file"):
        load_dit_checkpoint(tmp_path / "none.pt")


def diffusers_copy(module: DiT):
    diffusers = pytest.importorskip("diffusers")
    transformer = diffusers.DiTTransformer2DModel(**diffusers_config(module.config))
    transformer.load_state_dict(convert_dit_to_diffusers(module.state_dict()), strict=True)
    return transformer.eval().requires_grad_(False)


def test_weights_go_to_diffusers_and_back():
    module = DiT(CONFIG)
    positions = module.pos_embed.clone()
    randomised(module)
    module.pos_embed.copy_(positions)
    transformer = diffusers_copy(module)
    back = DiT(CONFIG)
    back.load_state_dict(convert_diffusers_to_dit(transformer.state_dict(), 8), strict=True)
    assert same(back, module)
    torch.testing.assert_close(transformer.pos_embed.pos_embed, module.pos_embed, rtol=0, atol=1e-6)


def test_only_two_values_keep_a_copy_from_the_originals_outputs():
    module = DiT(CONFIG)
    positions = module.pos_embed.clone()
    randomised(module)
    module.pos_embed.copy_(positions)
    transformer = diffusers_copy(module)
    x, t, y = random_inputs(4, 8, 5)
    expected = module(x, t, y)

    def error(network):
        return relative_error(network(x, timestep=t, class_labels=y).sample, expected)

    assert error(transformer) > 1e-3, "diffusers' own arithmetic is another"
    halfway = copy.deepcopy(transformer)
    for block in halfway.transformer_blocks:
        block.norm3.eps = 1e-6
    assert error(halfway) > 1e-3, "one of the two is not enough"
    use_original_arithmetic(transformer)
    assert error(transformer) < 2e-5


def test_the_largest_size_converts_on_the_meta_device():
    diffusers = pytest.importorskip("diffusers")
    config = dit_config("DiT-XL/2")
    with torch.device("meta"):
        module = DiT(config)
        transformer = diffusers.DiTTransformer2DModel(**diffusers_config(config))
    transformer.load_state_dict(convert_dit_to_diffusers(module.state_dict()), strict=True, assign=True)
    target = DiffusersDiTTarget(transformer.eval())
    assert (target.latent_shape, target.feature_shape, target.num_classes) == ((4, 32, 32), (256, 1152), 1000)


def test_state_dicts_that_cannot_be_converted_are_refused():
    module = small_dit()
    ours = module.state_dict()
    theirs = convert_dit_to_diffusers(ours)
    with pytest.raises(CheckpointError, match=r"the state dict must hold transformer_blocks\.1\.attn1\.to_k\.weight"):
        convert_diffusers_to_dit({k: v for k, v in theirs.items() if k != "transformer_blocks.1.attn1.to_k.weight"}, 8)
    with pytest.raises(CheckpointError, match="must be a DiTTransformer2DModel's, got also extra"):
        convert_diffusers_to_dit({**theirs, "extra": torch.ones(1)}, 8)
    with pytest.raises(CheckpointError, match="must be an original-style DiT's, got also extra"):
        convert_dit_to_diffusers({**ours, "extra": torch.ones(1)})
    name = "transformer_blocks.2.norm1.emb.timestep_embedder.linear_1.bias"
    with pytest.raises(CheckpointError, match="must be as in block 0: a DiT has one embedder"):
        convert_diffusers_to_dit({**theirs, name: theirs[name] + 1}, 8)
    with pytest.raises(ValueError, match="input_size must be a multiple of the patch size 2, got 9"):
        convert_diffusers_to_dit(theirs, 9)
    with pytest.raises(TypeError, match="^use_original_arithmetic: transformer must be a DiTTransformer2DModel"):
        use_original_arithmetic(module)
    with pytest.raises(ValueError, match="^diffusers_config: config must be with mlp_ratio 4"):
        diffusers_config(dataclasses.replace(CONFIG, mlp_ratio=2.0))


@pytest.fixture(scope="module")
def digits():
    return free_dit.load_bundled("digits")


def copies(target, folder):
    """The bundled DiT as a file of the original's format, and as a diffusers folder."""
    torch.save(target.module.state_dict(), folder / "digits.pt")
    yield "original", load_dit_checkpoint(folder / "digits.pt", num_heads=2)
    transformer = diffusers_copy(target.module)
    transformer.save_pretrained(folder / "digits")
    loaded = type(transformer).from_pretrained(folder / "digits").eval().requires_grad_(False)
    use_original_arithmetic(loaded)
    yield "diffusers", loaded


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_copies_of_the_bundled_digits_give_its_images(digits, tmp_path, guidance):
    target, drafter = digits
    labels = torch.tensor([3, 7, 1])
    settings = {"schedule": DDPMSchedule(100), "guidance_scale": guidance, "seed": 4}
    speculative = {**settings, "drafter": drafter, "draft_length": 6}
    ordinary = ancestral_sample(target, labels, **settings).samples
    expected = sample(target, labels, **speculative)
    assert 0.3 < expected.stats.acceptance < 1
    for family, module in copies(target, tmp_path):
        images = ancestral_sample(module, labels, **settings).samples
        torch.testing.assert_close(images, ordinary, rtol=0, atol=2e-3, msg=lambda m, f=family: f"{f}: {m}")
        result = sample(module, labels, **speculative)
        torch.testing.assert_close(result.samples, expected.samples, rtol=0, atol=2e-3)
        assert result.stats.rounds_per_image.tolist() == expected.stats.rounds_per_image.tolist()


def test_a_diffusers_copy_in_its_own_arithmetic_gives_other_images(digits):
    """Negative control: what `use_original_arithmetic` sets is seen in the images."""
    target, _ = digits
    labels, settings = torch.tensor([3, 7, 1]), {"schedule": DDPMSchedule(40), "seed": 4}
    native = ancestral_sample(target, labels, **settings).samples
    copied = diffusers_copy(target.module)
    x, t, y = random_inputs(1, 8, 10)
    error = relative_error(copied(x, timestep=t, class_labels=y).sample, target.module(x, t, y))
    assert error == pytest.approx(DIFFERENCE, rel=0.05), "docs/diffusers.md says how much"
    other = ancestral_sample(copied, labels, **settings).samples
    assert float((other - native).abs().max()) > 1e-2
