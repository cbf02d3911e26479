"""Layouts of training checkpoints: averages first, names without wrappers, files that hold no weights, families."""

from __future__ import annotations

import logging
import pathlib

import numpy as np
import pytest
import torch
from random_networks import random_dit
from safetensors.torch import save_file

import free_dit
from free_dit import DiTConfig
from free_dit.bundled import MODELS
from free_dit.checkpoints import load_dit_checkpoint, save_dit_checkpoint, told_family
from free_dit.loading import load_target
from free_dit.networks.sit import SiT
from free_kernels import SiTTarget
from free_kernels.checkpoint import CheckpointError

CONFIG = DiTConfig(input_size=4, patch_size=2, in_channels=1, hidden_size=16, depth=2, num_heads=2, num_classes=3)


def weights():
    return random_dit(CONFIG).state_dict()


def zeros():
    return {name: torch.zeros_like(tensor) for name, tensor in weights().items()}


def named(prefix: str):
    return {prefix + name: tensor for name, tensor in weights().items()}


LAYOUTS = {
    "a tensor beside": lambda: {"model": zeros(), "ema": weights(), "step": torch.tensor(3)},
    "generator state": lambda: {"ema": weights(), "rng": torch.get_rng_state()},
    "model_ema": lambda: {"model": zeros(), "model_ema": weights()},
    "ema_state_dict": lambda: {"state_dict": zeros(), "ema_state_dict": weights()},
    "compiled data parallel": lambda: named("_orig_mod.module."),
    "data parallel compiled": lambda: named("module._orig_mod."),
    "averaged model": lambda: {"n_averaged": torch.tensor(9), **named("module.")},
    "lightning": lambda: {"state_dict": named("model."), "epoch": 3},
    "lightning, compiled": lambda: {"state_dict": named("model._orig_mod.")},
    "checkpointed blocks": lambda: {
        name.replace(".attn.", "._checkpoint_wrapped_module.attn."): tensor for name, tensor in weights().items()
    },
    "projections": lambda: {**weights(), "projectors.0.weight": torch.zeros(2, 2)},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_training_checkpoints(tmp_path, layout):
    torch.save(LAYOUTS[layout](), tmp_path / "c.pt")
    found = load_dit_checkpoint(tmp_path / "c.pt", num_heads=2).state_dict()
    assert found.keys() == weights().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in weights().items())


def test_which_weights_were_taken_is_said(tmp_path, caplog):
    torch.save({"model": weights(), "ema": zeros()}, tmp_path / "c.pt")
    with caplog.at_level(logging.WARNING):
        assert float(load_dit_checkpoint(tmp_path / "c.pt", num_heads=2).pos_embed.abs().max()) == 0
    assert "the weights under ema were taken, not model" in caplog.text
    raw = load_dit_checkpoint(tmp_path / "c.pt", num_heads=2, key="model")
    assert float(raw.pos_embed.abs().max()) > 0
    with pytest.raises(CheckpointError, match="must hold key 'best', got model, ema"):
        load_dit_checkpoint(tmp_path / "c.pt", num_heads=2, key="best")


def test_a_prefix_by_hand(tmp_path):
    torch.save(
        {**named("teacher."), **{f"student.{name}": tensor for name, tensor in zeros().items()}}, tmp_path / "c.pt"
    )
    found = load_dit_checkpoint(tmp_path / "c.pt", num_heads=2, prefix="teacher.")
    assert float(found.pos_embed.abs().max()) > 0
    with pytest.raises(CheckpointError, match="must hold names that begin with 'other.'"):
        load_dit_checkpoint(tmp_path / "c.pt", num_heads=2, prefix="other.")


@pytest.mark.parametrize(
    ("extra", "kind"), [({"args": {"out": pathlib.PurePosixPath("x")}}, "pathlib"), ({"fid": np.float64(3)}, "numpy")]
)
def test_a_file_that_cannot_be_read_safely_is_one_line(tmp_path, extra, kind):
    torch.save({"ema": weights(), **extra}, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match=rf"checkpoint of tensors and plain values, got a {kind}.*save the") as e:
        load_dit_checkpoint(tmp_path / "c.pt", num_heads=2)
    for wrong in ("\n", "\x1b", "weights_only", "trust"):
        assert wrong not in str(e.value)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"<!DOCTYPE html><html>", "a page of HTML"),
        (b"version https://git-lfs.github.com/spec/v1", "a pointer of Git LFS"),
    ],
)
def test_what_is_no_checkpoint_is_named(tmp_path, content, found):
    for name in ("c.pt", "c.safetensors"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=f"must be a complete checkpoint of tensors, got {found}"):
            load_dit_checkpoint(tmp_path / name)


def test_mixed_dtypes_become_one(tmp_path, caplog):
    held = {name: tensor if name == "pos_embed" else tensor.bfloat16() for name, tensor in weights().items()}
    torch.save(held, tmp_path / "c.pt")
    with caplog.at_level(logging.WARNING):
        model = load_dit_checkpoint(tmp_path / "c.pt", num_heads=2)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert "torch.bfloat16, torch.float32, all cast to torch.float32" in caplog.text


@pytest.mark.parametrize("name", ["digits", "digits_sit"])
def test_a_family_is_asked_for_and_a_wrong_one_refused(tmp_path, name):
    """Nothing is taken from the answer at pure noise but a hint, and the refusal of the other family."""
    save_dit_checkpoint(tmp_path / "c.pt", free_dit.load_bundled(name)[0].module)
    own, other = ("sit", "dit") if name == "digits_sit" else ("dit", "sit")
    wanted = rf"must be 'dit' .* or 'sit' .* by family= or --family: .* answers as a {own} does, got None"
    with pytest.raises(ValueError, match=f"^load_target: family of .*c.pt {wanted}"):
        load_target(tmp_path / "c.pt", num_heads=2)
    assert told_family(random_dit(CONFIG)) is None
    given, _ = load_target(tmp_path / "c.pt", num_heads=2, family=own)
    assert isinstance(given, SiTTarget) == (own == "sit")
    with pytest.raises(ValueError, match="predicts noise"):
        load_target(tmp_path / "c.pt", num_heads=2, family=other)


@pytest.mark.parametrize("name", ["digits", "digits_sit"])
def test_a_recorded_family_is_used(tmp_path, name):
    module, own = free_dit.load_bundled(name)[0].module, "sit" if name == "digits_sit" else "dit"
    save_dit_checkpoint(tmp_path / "c.safetensors", module)
    for family in (None, own):
        target, _ = load_target(tmp_path / "c.safetensors", num_heads=2, family=family)
        assert isinstance(target, SiTTarget) == (own == "sit")
    with pytest.raises(ValueError, match=f"^load_target: family must be '{own}' for .*, which says it itself"):
        load_target(tmp_path / "c.safetensors", num_heads=2, family="dit" if own == "sit" else "sit")
    save_file(module.state_dict(), tmp_path / "other.safetensors", {"family": "rectified"})
    with pytest.raises(CheckpointError, match="must record a family of dit, sit, got 'rectified'"):
        load_target(tmp_path / "other.safetensors", num_heads=2)
    # Files that training writes and bundled ones record it too.
    assert isinstance(load_target(MODELS / name / "model.safetensors")[0], SiTTarget) == (own == "sit")
    assert isinstance(load_target(name)[0], SiTTarget) == (own == "sit")


def test_a_family_that_a_file_says_is_not_asked_for():
    with pytest.raises(ValueError, match="^load_target: family must be None for digits, which says it itself"):
        load_target("digits", family="sit")
    assert issubclass(SiT, free_dit.DiT)
