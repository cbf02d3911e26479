"""Files of arbitrary content: always one named error with the path, never another model that nobody asked for."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from free_dit import DiTConfig
from free_dit.configuration import load_config
from free_dit.experiments.drafter_study import LENGTHS, LOOKAHEAD, _read_study
from free_dit.experiments.sweep import read_sweep
from free_dit.experiments.sweep_page import write_report
from free_dit.files import read_json
from free_dit.model import DiT
from free_dit.networks.families import load_model, save_model
from free_dit.training.loop import LoopConfig, TrainingLoop
from free_dit.training.train_dit import TrainConfig
from free_kernels import DrafterConfig, FeatureDrafter
from free_kernels.checkpoint import METADATA_KEY, CheckpointError, load_checkpoint

LOOP = LoopConfig(iterations=4, warmup=1, checkpoint_every=2, log_every=2)


def new_loop(folder: Path) -> TrainingLoop:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    return TrainingLoop(module, lambda step: (module(torch.ones(1, 3)).square().sum(), {}), LOOP, folder, {"size": 3})


def loop_state(folder: Path) -> dict[str, torch.Tensor]:
    loop = new_loop(folder)
    return loop.module.state_dict() | {"step": torch.tensor(loop.step)}


def drafter_state(path: Path) -> dict[str, torch.Tensor]:
    drafter = FeatureDrafter.load(path)
    return drafter.state_dict() | {"shape": torch.tensor(drafter.latent_shape + drafter.feature_shape)}


# What is read, how it is made, and what reading gives: weights, whose names and shapes are the model's.
Made = tuple[Path, Callable[[], dict[str, torch.Tensor]]]


def make(kind: str, folder: Path) -> Made:
    torch.manual_seed(0)
    if kind == "drafter":
        path = folder / "drafter.safetensors"
        drafter = FeatureDrafter((1, 4, 4), (4, 6), 3, DrafterConfig(width=8, head_dim=4, num_timesteps=20))
        drafter.calibration = [[0.5, 0.4], [0.3, 0.2]]
        drafter.save(path)
        return path, lambda: drafter_state(path)
    if kind == "model":
        path = folder / "model.safetensors"
        save_model(path, DiT(DiTConfig(4, 2, 1, 8, 1, 2, 3)))
        return path, lambda: load_model(path).state_dict()
    new_loop(folder).run()
    return folder / "checkpoint.safetensors", lambda: loop_state(folder)


KINDS = ("drafter", "model", "training")


@pytest.fixture(params=KINDS)
def made(request, tmp_path) -> Made:
    return make(request.param, tmp_path)


def ends(made: Made, allowed: tuple[type[Exception], ...] = (ValueError, FileNotFoundError)) -> str:
    """Reads the file: the kind of the named error, or what became of the weights."""
    path, read = made
    try:
        state = read()
    except allowed as error:
        kind, message = type(error).__name__, str(error)
    else:
        return "read: " + str(sorted((name, tuple(value.shape), value.dtype) for name, value in state.items()))
    assert str(path) in message, f"{kind} without the path: {message}"
    assert len(message.splitlines()[0]) < 600
    return kind


def header(data: bytes) -> tuple[dict[str, Any], bytes]:
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def with_header(changed: dict[str, Any], body: bytes) -> bytes:
    text = json.dumps(changed).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + body


def test_sound_files_are_read(made):
    assert ends(made).startswith("read: ")


def test_truncations(made, fault_log):
    """Cut at every length of the header and at random ones behind it."""
    path, data = made[0], made[0].read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    dice = random.Random(0)
    for length in [*range(0, size + 8, 7), *(dice.randrange(size, len(data)) for _ in range(60))]:
        path.write_bytes(data[:length])
        assert ends(made) == "CheckpointError"
        fault_log("checkpoint file cut short", "CheckpointError with the path")
    path.unlink()
    if path.name != "checkpoint.safetensors":
        assert ends(made) == "FileNotFoundError"


@pytest.mark.parametrize("length", [0, 1, 7, 2**20, 2**31, 2**40, 2**63, 2**64 - 1])
def test_header_lengths(made, length, fault_log):
    path, data = made[0], made[0].read_bytes()
    path.write_bytes(struct.pack("<Q", length) + data[8:])
    assert ends(made) == "CheckpointError"
    fault_log("header length of a checkpoint forged", "CheckpointError with the path")


def test_flipped_bytes(made, fault_log):
    """A flipped bit gives a named error, or the names, shapes and dtypes of the sound file.

    A bit of a weight, or of a number in the config that no shape depends on, cannot be noticed without a hash; see
    ``test_hashes`` for the shipped ones.
    """
    path, data = made[0], made[0].read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    sound, dice = ends(made), random.Random(1)
    for trial in range(250):
        spoilt = bytearray(data)
        # Most of a file is weights: three of four flips go where the structure is.
        place = dice.randrange(size + 8) if trial % 4 else dice.randrange(len(data))
        spoilt[place] ^= 1 << dice.randrange(8)
        path.write_bytes(spoilt)
        end = ends(made)
        assert end in (sound, "CheckpointError"), f"byte {place}"
        where = "header" if place < size + 8 else "weights"
        outcome = (
            "CheckpointError with the path" if end == "CheckpointError" else "read; shapes and dtypes as they were"
        )
        fault_log(f"bit flipped in the {where} of a checkpoint", outcome)


def test_random_bytes(made, fault_log):
    dice = random.Random(2)
    for size in (0, 1, 8, 9, 100, 5000):
        for _ in range(5):
            made[0].write_bytes(dice.randbytes(size))
            assert ends(made) == "CheckpointError"
            fault_log("checkpoint of random bytes", "CheckpointError with the path")


WRONG = (None, True, -1, 0, 1.5, "8", "", [], [3], {}, {"a": 1}, 10**6, 10**30, 1e300, [[[]]])


def paths_in(value: Any, at: tuple = ()) -> list[tuple]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(path for key, one in inner for path in paths_in(one, (*at, key)))] if at or inner else [at]


def replaced(value: Any, at: tuple, new: Any) -> Any:
    """A copy with the value at ``at`` replaced; removed where ``new`` is Ellipsis."""
    if not at:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    if len(at) == 1 and new is ...:
        del copy[at[0]]
    else:
        copy[at[0]] = replaced(value[at[0]], at[1:], new)
    return copy


def test_wrong_metadata(made, fault_log):
    """Every value of the metadata replaced by values of other types and sizes, and removed."""
    path = made[0]
    top, body = header(path.read_bytes())
    metadata, sound = json.loads(top["__metadata__"][METADATA_KEY]), ends(made)
    for at in paths_in(metadata):
        for value in (*WRONG, *([...] if at else [])):
            changed = json.dumps(replaced(metadata, at, value))
            path.write_bytes(with_header({**top, "__metadata__": {METADATA_KEY: changed}}, body))
            end = ends(made)
            assert end in (sound, "CheckpointError"), (at, value)
            outcome = (
                "CheckpointError with the path" if end == "CheckpointError" else "read; of no consequence to shapes"
            )
            fault_log("metadata of a checkpoint of another type or size, or missing", outcome)
    for text in ("[" * 100_000, "{", "", "\\ud800", "NaN"):
        path.write_bytes(with_header({**top, "__metadata__": {METADATA_KEY: text}}, body))
        assert ends(made) == "CheckpointError"
        fault_log("metadata of a checkpoint that is no JSON", "CheckpointError with the path")


def test_tensors_that_do_not_belong(made, fault_log):
    """Each tensor missing, renamed, of another shape of the same size, and of integers of the same size."""
    path = made[0]
    top, _ = header(path.read_bytes())
    tensors = load_file(path)
    for name, tensor in tensors.items():
        others = {key: value for key, value in tensors.items() if key != name}
        variants = [others, {**others, name + "_": tensor}, {**others, name: tensor[None]}]
        if tensor.dtype == torch.float32:
            variants.append({**others, name: tensor.view(torch.int32)})
        for variant in variants:
            save_file(variant, path, metadata=top["__metadata__"])
            assert ends(made) == "CheckpointError", name
            fault_log("a tensor missing, renamed, reshaped or of integers", "CheckpointError with the path")


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_another_kind(kind, tmp_path, fault_log):
    path, _ = make(kind, tmp_path)
    for other in KINDS:
        wanted = {"drafter": "feature_drafter", "model": "dit", "training": "training"}[other]
        if other != kind:
            with pytest.raises(CheckpointError, match="must be a checkpoint of kind"):
                load_checkpoint(path, wanted)
            fault_log("a checkpoint of another kind", "CheckpointError with the path")


def test_a_parameter_without_gradient_resumes(tmp_path):
    """It has no moments in the checkpoint, which is not taken for a loss of them."""

    def loop() -> TrainingLoop:
        module = torch.nn.ModuleDict({"used": torch.nn.Linear(2, 1), "spare": torch.nn.Linear(2, 1)})
        return TrainingLoop(module, lambda step: (module["used"](torch.ones(1, 2)).sum(), {}), LOOP, tmp_path, {})

    loop().run()
    assert loop().step == LOOP.iterations


def row() -> dict[str, Any]:
    reductions = {f"{kind} {length}": 2.0 for kind in ("token", "block") for length in LENGTHS}
    return {
        "by_lookahead": [0.5] * LOOKAHEAD,
        "last_fifth": [0.5] * LOOKAHEAD,
        "call_reduction": reductions,
        "call_cost": 0.1,
        "parameters": 10,
        "train_s": 1.0,
    }


STUDY = {
    "frame": {"model": "toy", "overrides": [], "images": 2, "num_steps": 20},
    "machine": {"cpu": "x", "threads": 1, "torch": "2"},
    "rows": {"frozen": row(), "as configured": row()},
}


def sweep_cell(**changes: Any) -> dict[str, Any]:
    cell = {"drafter": "learned", "verification": "token", "draft_length": 4, "relaxation": 0.0, "num_steps": 20}
    interval = {"value": 0.5, "low": 0.4, "high": 0.6}
    return {
        "cell": {**cell, "guidance": 1.0, **changes},
        "call_reduction": 2.0,
        "call_reduction_se": 0.1,
        "calls_per_image": 10.0,
        "bias_bound": 0.0,
        "wall_clock": {"median": 1.0, "low": 0.9, "high": 1.1},
        "quality": {"images": 20, "accuracy": interval, "frechet": interval, "frechet_sampled": 1.0},
    }


SWEEP = {
    "settings": {
        "cpu": "x",
        "threads": 1,
        "torch": "2",
        "version": "0",
        "seed": 0,
        "num": 20,
        "num_calls": 4,
        "model_sha256": "a" * 64,
        "drafter_sha256": "b" * 64,
        "timing_pairs": 1,
        "resamples": 10,
    },
    "real": {
        "held_out_accuracy": {"value": 0.9, "low": 0.8, "high": 1.0},
        "held_out_images": 360,
        "training_digits": sweep_cell()["quality"],
    },
    "cells": [sweep_cell(), sweep_cell(relaxation=1.0), sweep_cell(drafter="none")],
}


def spoilt_texts(value: Any, types: int, trials: int) -> list[bytes]:
    """JSON of every value removed or of another type, and random flips and cuts of the text."""
    text, dice = json.dumps(value, indent=1).encode(), random.Random(3)
    texts = []
    for at in paths_in(value):
        for new in dice.sample(WRONG, types) + ([...] if at else []):
            texts.append(json.dumps(replaced(value, at, new)).encode())
    for _ in range(trials):
        flipped = bytearray(text)
        flipped[dice.randrange(len(text))] ^= 1 << dice.randrange(8)
        texts += [bytes(flipped), text[: dice.randrange(len(text))]]
    return [*texts, b"", b"[" * 100_000, b"\xff\xfe", b"null", b"NaN"]


@pytest.mark.parametrize("kind", ["study", "sweep", "sweep record"])
def test_reports_of_earlier_runs(kind, tmp_path, monkeypatch, fault_log):
    """study.json, sweep.json and a sweep's records: rendered, or refused with the path."""
    path = tmp_path / ("study.json" if kind == "study" else "sweep.json")
    # Drawing is not what is tested here, and takes most of the time.
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: None)
    readers = {
        "study": lambda: _read_study(path),
        "sweep": lambda: write_report(read_sweep(tmp_path), tmp_path),
        "sweep record": lambda: read_json("sweep", path),
    }
    sound = STUDY if kind == "study" else SWEEP
    texts = spoilt_texts(sound, *((1, 15) if kind == "sweep" else (3, 50)))
    for number, text in enumerate([json.dumps(sound).encode(), *texts]):
        path.write_bytes(text)
        try:
            readers[kind]()
            message, outcome = str(path), "rendered: still whole, perhaps with other figures"
        except ValueError as error:
            message, outcome = str(error), "ValueError with the path"
        assert str(path) in message
        assert number > 0 or outcome.startswith("rendered")
        fault_log("JSON of a study or sweep cut, flipped, or of other types", outcome)


def test_configs(tmp_path, fault_log):
    path, dice = tmp_path / "config.toml", random.Random(4)
    sound = b"batch_size = 4\n[loop]\niterations = 5\nlearning_rate = 1e-3\n[model]\ndepth = 2\nhidden_size = 64\n"
    for _ in range(300):
        text = bytearray(sound)
        for _ in range(dice.randrange(1, 4)):
            text[dice.randrange(len(text))] = dice.choice([dice.randrange(256), *b"0123456789"])
        path.write_bytes(text[: dice.randrange(len(text)) if dice.random() < 0.3 else None])
        try:
            load_config(TrainConfig, path)
            message, outcome = str(path), "read: still a valid config"
        except ValueError as error:
            message, outcome = str(error), "ValueError with the path"
        assert str(path) in message
        fault_log("TOML config of random changes", outcome)
