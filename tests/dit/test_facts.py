"""What a target's file does not say: asked for wherever a file is loaded, and known by the drafter that was trained."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from latent_models import random_dit
from safetensors.torch import load_file, save_file

from free_dit import cli
from free_dit.checkpoints import save_dit_checkpoint
from free_dit.generation import ChainSettings, DrawSettings, SampleFolder
from free_dit.loading import TargetFacts, facts_of, load_pair, load_target
from free_kernels import FeatureDrafter
from free_kernels.checkpoint import METADATA_KEY, CheckpointError

SETTINGS = (
    "num_steps=12",
    "batch_size=4",
    "trajectories=3",
    "refresh_every=3",
    "calibration_images=2",
    "loop.iterations=2",
    "drafter.width=32",
)
CHAIN = ChainSettings(steps=4, seed=3)
DRAW = DrawSettings(steps=4, seed=3, drafter="none")
HEADS = TargetFacts("dit", num_heads=2)


@pytest.fixture
def original(tmp_path):
    """A file in the original's format whose width tells no heads."""
    path = tmp_path / "dit.pt"
    save_dit_checkpoint(path, random_dit(channels=1))
    return str(path)


@pytest.mark.parametrize("command", ["sample", "compare", "generate", "feasibility", "figures", "study", "info"])
def test_every_command_asks_for_the_heads_and_takes_them(tmp_path, original, command, capsys):
    def run(out, **facts):
        small = {"num": 2, "chain": CHAIN, "device": "cpu"}
        if command == "sample":
            cli.sample(out / "x.npz", original, "none", **small, **facts)
        elif command == "compare":
            cli.compare(out, original, "frozen", timing_pairs=0, **small, **facts)
        elif command == "generate":
            cli.generate(out, 2, original, DRAW, device="cpu", **facts)
        elif command == "feasibility":
            probes = {"images": 1, "positions": 2, "timing_repeats": 2, "device": "cpu"}
            cli.feasibility(out, original, steps=4, lengths=(2,), **probes, **facts)
        elif command == "figures":
            cli.figures(out, (original, "digits"), num=1, steps=8, guidance=(1.0,), device="cpu", **facts)
        elif command == "study":
            cli.study(out, original, variants=("no skip",), images=2, set_=SETTINGS, device="cpu", **facts)
        else:
            cli.info(original, device="cpu", **facts)

    with pytest.raises(ValueError, match="num_heads must be given, because the tensors do not tell"):
        run(tmp_path / "a", facts=TargetFacts("dit"))
    run(tmp_path / "b", facts=HEADS)
    if command == "info":
        assert json.loads(capsys.readouterr().out)["num_heads"] == 2
    if command == "generate":
        assert json.loads((tmp_path / "b" / "manifest.json").read_text())["num_heads"] == 2
        with pytest.raises(ValueError, match="same settings, got num_heads 2 .now 4."):
            run(tmp_path / "b", facts=TargetFacts("dit", num_heads=4))


def trained(folder, original, **facts):
    """A drafter of the command, in a file."""
    cli.train_drafter(folder, original, set_=SETTINGS, device="cpu", num_heads=2, **facts)
    return str(folder / "drafter.safetensors")


def test_a_drafter_knows_its_target(tmp_path, original):
    drafter = trained(tmp_path / "run", original, family="sit", draws="latents")
    assert FeatureDrafter.load(drafter).target_facts == {"num_heads": 2, "family": "sit", "draws": "latents"}
    target, loaded = load_pair(original, drafter)
    assert facts_of(target) == {"num_heads": 2, "family": "sit", "draws": "latents"}
    assert isinstance(loaded, FeatureDrafter)
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([0.5, 0.25]), torch.tensor([0, 1])
    told, _ = load_target(original, num_heads=2, family="sit")
    torch.testing.assert_close(target.features(x, t, y), told.features(x, t, y), rtol=0, atol=0)
    other, _ = load_target(original, num_heads=4, family="sit")
    assert (target.features(x, t, y) - other.features(x, t, y)).abs().max() > 1e-3
    with pytest.raises(ValueError, match="^load_target: num_heads must be 2, as drafter .* was trained for, got 4"):
        load_pair(original, drafter, TargetFacts(num_heads=4))
    with pytest.raises(ValueError, match="^load_target: draws must be 'latents', as drafter .* was trained for"):
        load_pair(original, drafter, TargetFacts(draws="pixels"))
    # The drafter's heads are of no use to a file that says its own.
    digits, drafted = load_pair("digits", "bundled")
    drafted.target_facts = {"num_heads": 2, "family": "sit"}
    drafted.save(tmp_path / "digits.safetensors")
    assert facts_of(load_pair("digits", str(tmp_path / "digits.safetensors"))[0]) == facts_of(digits)


def test_a_drafter_knows_that_there_is_no_null_label(tmp_path, original):
    target, _ = load_target(original, num_heads=2, family="dit", has_null_label=False)
    assert target.num_classes == 4
    drafter = FeatureDrafter(target.latent_shape, target.feature_shape, target.num_classes)
    drafter.target_facts = facts_of(target)
    drafter.save(tmp_path / "drafter.safetensors")
    again, _ = load_pair(original, str(tmp_path / "drafter.safetensors"))
    assert again.num_classes == 4
    told, _ = load_pair(original, "none", TargetFacts(num_heads=2, family="dit", null_label=False))
    assert told.num_classes == 4
    with pytest.raises(ValueError, match="has_null_label must be True for digits, which says it itself"):
        load_pair("digits", "bundled", TargetFacts(null_label=False))


def test_commands_do_not_ask_what_the_drafter_knows(tmp_path, original):
    drafter = trained(tmp_path / "run", original, family="dit")
    cli.sample(tmp_path / "x.npz", original, drafter, 2, chain=CHAIN, device="cpu")
    drawing = DrawSettings(steps=4, seed=3, drafter=drafter)
    cli.generate(tmp_path / "set", 2, original, drawing, device="cpu")
    assert SampleFolder.open(tmp_path / "set").missing() == []


def test_facts_of_another_kind_are_refused(tmp_path):
    _, drafter = load_pair("digits", "bundled")
    drafter.target_facts = {"num_heads": 2}
    path = tmp_path / "drafter.safetensors"
    drafter.save(path)
    assert FeatureDrafter.load(path).target_facts == {"num_heads": 2}
    from safetensors import safe_open

    with safe_open(path, "pt") as handle:
        metadata = json.loads(handle.metadata()[METADATA_KEY])
    for wrong in ([2], {"num_heads": [2]}, {"num_heads": 2.5}, {"num_heads": None}):
        save_file(load_file(path), path, metadata={METADATA_KEY: json.dumps(metadata | {"target": wrong})})
        with pytest.raises(CheckpointError, match="facts of a target that are no names with strings, ints or truths"):
            FeatureDrafter.load(path)


@pytest.mark.parametrize("steps", [1, 2, 4, 6])
def test_few_steps_are_sampled_with_the_default_draft_length(tmp_path, steps):
    chain = ChainSettings(steps=steps)
    assert chain.length == min(6, steps)
    cli.sample(tmp_path / "x.npz", num=2, chain=chain, device="cpu")
    assert np.load(tmp_path / "x.npz")["arr_0"].shape == (2, 8, 8, 1)
    cli.generate(tmp_path / "set", 2, drawing=DrawSettings(steps=steps), device="cpu")
    assert json.loads((tmp_path / "set" / "manifest.json").read_text())["draft_length"] == min(6, steps)


def test_a_draft_length_that_is_asked_for_is_not_cut(tmp_path):
    with pytest.raises(ValueError, match=r"draft_length must be an int in \[1, 4\], got 6"):
        cli.sample(tmp_path / "x.npz", num=2, chain=ChainSettings(steps=4, draft_length=6), device="cpu")


def test_few_steps_of_the_other_commands(tmp_path):
    cli.compare(tmp_path / "compare", num=2, chain=ChainSettings(steps=4), timing_pairs=0, device="cpu")
    assert json.loads((tmp_path / "compare" / "compare.json").read_text())["settings"]["draft_length"] == 4
    cli.feasibility(tmp_path / "feasibility", steps=4, images=1, positions=2, timing_repeats=2, device="cpu")
    cli.figures(tmp_path / "figures", num=1, steps=4, guidance=(1.0,), device="cpu")
