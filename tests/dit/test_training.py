"""Training of DiT and drafter at toy size: it learns, resumes exactly, and loses nothing."""

from __future__ import annotations

import math
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from functools import reduce

import pytest
import torch
from interrupted_training import interrupted_at
from safetensors.torch import load_file

from free_dit import DiTConfig
from free_dit.configuration import CONFIGS, build, load_config
from free_dit.data import load_digits, load_photographs
from free_dit.networks.families import load_model
from free_dit.train_drafter import DrafterTrainConfig, train_drafter
from free_dit.training.acceptance import acceptance_by_lookahead, by_fifth
from free_dit.training.identity import changed_settings
from free_dit.training.logs import CsvLog
from free_dit.training.loop import LoopConfig, TrainingLoop
from free_dit.training.train_dit import TrainConfig, train
from free_dit.training.trajectories import collect
from free_kernels import DDPMSchedule, DiTTarget, DrafterConfig, FeatureDrafter, FrozenDrafter
from free_kernels.checkpoint import CheckpointError, load_checkpoint, save_checkpoint

TINY = TrainConfig(
    model=DiTConfig(8, 4, 1, 32, 2, 2, 10),
    loop=LoopConfig(iterations=12, warmup=2, checkpoint_every=4, log_every=2, ema_decay=0.9),
    batch_size=16,
)


def test_digits_split_is_fixed_and_complete():
    parts = [load_digits(split) for split in ("train", "test", "all")]
    assert [len(part.labels) for part in parts] == [1437, 360, 1797]
    assert torch.equal(parts[0].images, load_digits("train").images)
    rows = {tuple(row.tolist()) for row in parts[0].images.flatten(1)}
    shared = sum(tuple(row.tolist()) in rows for row in parts[1].images.flatten(1))
    assert shared == 0
    assert parts[2].images.min() == -1
    assert parts[2].images.max() == 1
    with pytest.raises(ValueError, match="^load_digits: split must be"):
        load_digits("validation")


def test_photograph_crops_are_fixed_and_splits_share_no_crop():
    parts = [load_photographs(split, crops_per_class=20) for split in ("train", "test")]
    assert [tuple(part.images.shape) for part in parts] == [(200, 3, 32, 32), (20, 3, 32, 32)]
    assert torch.equal(parts[0].images, load_photographs("train", crops_per_class=20).images)
    assert parts[0].labels.bincount().tolist() == [20] * 10
    assert (torch.cdist(*(part.images.flatten(1) for part in parts)) > 1e-3).all()
    assert parts[0].images.min() >= -1
    assert parts[0].images.max() <= 1
    with pytest.raises(ValueError, match="^load_photographs: split must be"):
        load_photographs("all")


def weights(path):
    return load_file(path)


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    whole = weights(train(TINY, tmp_path / "whole"))
    with interrupted_at(7):
        train(TINY, tmp_path / "parts")
    resumed = weights(train(TINY, tmp_path / "parts"))
    assert whole.keys() == resumed.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(resumed[name], tensor, rtol=1e-5, atol=1e-6)
    logs = [(tmp_path / run / "log.csv").read_text().splitlines() for run in ("whole", "parts")]
    assert [line.split(",")[0] for line in logs[0]] == [line.split(",")[0] for line in logs[1]]


def test_another_configuration_does_not_resume(tmp_path):
    train(TINY, tmp_path)
    with pytest.raises(CheckpointError, match="must be of the same configuration, got another batch_size"):
        train(replace(TINY, batch_size=8), tmp_path)


def without(path, names):
    """Take settings out of a checkpoint's identity, as an older version wrote it."""
    tensors, metadata = load_checkpoint(path, "training")
    for name in names:
        *sections, last = name.split(".")
        del reduce(dict.__getitem__, sections, metadata["identity"])[last]
    save_checkpoint(path, tensors, metadata)


def test_an_older_versions_run_goes_on_where_new_settings_have_their_defaults(tmp_path):
    whole = weights(train(TINY, tmp_path / "whole"))
    stopped = tmp_path / "parts"
    with interrupted_at(4):
        train(TINY, stopped)
    without(stopped / "checkpoint.safetensors", ["loop.accumulate", "objective", "processes"])
    shutil.copytree(stopped, tmp_path / "other")
    for changed in (
        replace(TINY, objective="velocity", model=replace(TINY.model, learn_sigma=False)),
        replace(TINY, loop=replace(TINY.loop, accumulate=2)),
    ):
        with pytest.raises(CheckpointError, match=r"got another .*(objective|loop\.accumulate)"):
            train(changed, tmp_path / "other")
    resumed = weights(train(TINY, stopped))
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())
    # What has no default is of another run where it is missing.
    assert changed_settings({"target": "a"}, {"target": "a", "target_fingerprint": "b"}, {}) == ["target_fingerprint"]


def test_lines_of_an_older_log_are_kept(tmp_path):
    (tmp_path / "log.csv").write_text("step,loss\n1,0.5\n2,0.25\n3,0.1\n")
    log = CsvLog(tmp_path, 2)
    log.write(3, {"loss": 0.125, "accept_1": 0.75})
    log.write(4, {"accept_1": 1.0})
    log.close()
    assert (tmp_path / "log.csv").read_text().splitlines() == [
        "step,loss,accept_1",
        "1,0.5,",
        "2,0.25,",
        "3,0.125,0.75",
        "4,,1",
    ]
    assert CsvLog(tmp_path, 4)._names == ["step", "loss", "accept_1"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"iterations": 0}, "iterations must be an int in"),
        ({"checkpoint_every": 0}, "checkpoint_every must be an int in"),
        ({"log_every": 0}, "log_every must be an int in"),
        ({"accumulate": 0}, "accumulate must be an int in"),
        ({"warmup": -5}, "warmup must be an int in"),
        ({"seed": -1}, "seed must be an int in"),
        ({"seed": 2**32}, "seed must be an int in"),
        ({"clip_norm": -1.0}, "clip_norm must be a finite number in"),
        ({"clip_norm": 0.0}, "clip_norm must be above 0, got 0.0"),
        ({"learning_rate": math.nan}, "learning_rate must be a finite number in"),
        ({"weight_decay": -0.1}, "weight_decay must be a finite number in"),
        ({"ema_decay": 1.5}, "ema_decay must be a finite number in"),
    ],
)
def test_wrong_loops_are_named_before_anything_is_made(tmp_path, changed, message):
    config = replace(TINY, loop=replace(TINY.loop, **changed))
    with pytest.raises(ValueError, match=f"^train: {message}"):
        train(config, tmp_path / "run")
    assert not list(tmp_path.glob("run/*"))


def test_an_interrupt_of_the_last_iteration_is_one(tmp_path):
    """The weights are kept, and the command that trains does not go on to what follows."""

    def loss(step):
        if step == TINY.loop.iterations - 1:
            signal.raise_signal(signal.SIGINT)
        return module(torch.ones(1, 2)).sum(), {}

    module = torch.nn.Linear(2, 2)
    with pytest.raises(KeyboardInterrupt):
        TrainingLoop(module, loss, TINY.loop, tmp_path, {}).run()
    again = TrainingLoop(torch.nn.Linear(2, 2), loss, TINY.loop, tmp_path, {})
    assert again.step == TINY.loop.iterations
    again.run()


def test_a_damaged_checkpoint_is_named_and_kept(tmp_path):
    train(TINY, tmp_path)
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"checkpoint.safetensors must be a complete safetensors file"):
        train(TINY, tmp_path)
    assert path.stat().st_size == 1000


def test_a_non_finite_loss_keeps_the_last_good_checkpoint(tmp_path):
    train(replace(TINY, loop=replace(TINY.loop, iterations=12)), tmp_path)
    module = torch.nn.Linear(2, 2)

    def loss(step):
        value = module(torch.ones(1, 2)).sum()
        return (value / 0 if step == 5 else value), {}

    loop = TrainingLoop(module, loss, TINY.loop, tmp_path / "bad", {})
    with pytest.raises(FloatingPointError, match="^train: loss must be finite, got .* at iteration 5"):
        loop.run()
    again = TrainingLoop(torch.nn.Linear(2, 2), loss, TINY.loop, tmp_path / "bad", {})
    assert again.step == 5
    assert all(p.isfinite().all() for p in again.parameters)


def test_unwritable_output_is_named_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="^train: out must be a writable file path"):
        train(TINY, tmp_path / "file")


def test_a_model_file_is_checked(tmp_path):
    path = train(TINY, tmp_path)
    model = load_model(path)
    assert not model.training
    assert model.config == TINY.model
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError):
        load_model(path)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["interrupt", "kill"])
def test_training_survives_signals(tmp_path, number):
    """Interrupted or killed mid-run, the same command goes on from its last checkpoint to the same weights."""
    settings = ["loop.iterations=60", "loop.checkpoint_every=5", "model.depth=2", "batch_size=16", "compile=false"]
    command = [sys.executable, "-m", "free_dit", "train", "--out", str(tmp_path / "run"), "--set", *settings]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    checkpoint = tmp_path / "run" / "checkpoint.safetensors"
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode in ((130, 0) if number == signal.SIGINT else (-9, 0)), errors
    if process.returncode == 130:
        assert "run the same command again" in errors
        assert "Traceback" not in errors
    subprocess.run(command, check=True, capture_output=True, timeout=240)
    config = load_config(TrainConfig, CONFIGS / "digits.toml", tuple(settings))
    expected = weights(train(config, tmp_path / "whole"))
    for name, tensor in weights(tmp_path / "run" / "model.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def tiny_target(tmp_path_factory):
    config = replace(TINY, loop=replace(TINY.loop, iterations=150, learning_rate=3e-3), batch_size=64)
    return DiTTarget(load_model(train(config, tmp_path_factory.mktemp("target"))))


DRAFTER = DrafterTrainConfig(
    drafter=DrafterConfig(width=32, head_dim=16),
    loop=LoopConfig(iterations=200, warmup=10, learning_rate=3e-3, ema_decay=0.95, checkpoint_every=50),
    num_steps=40,
    batch_size=64,
    trajectories=32,
    refresh_every=100,
)


def test_drafter_training_beats_the_frozen_drafter(tiny_target, tmp_path):
    path = train_drafter(tiny_target, DRAFTER, tmp_path, "tiny")
    drafter = FeatureDrafter.load(path, tiny_target)
    schedule = DDPMSchedule(40)
    labels = torch.arange(16) % 10
    data = collect(tiny_target, schedule, labels, torch.ones(16), seed=99)
    learned, frozen = (
        acceptance_by_lookahead(tiny_target, d, schedule, data, lookahead=3) for d in (drafter, FrozenDrafter())
    )
    assert learned.shape == (3, 40)
    # The learned one drafts the first step too.
    assert learned[:, 0].isnan().tolist() == [False, True, True]
    assert frozen[:, 0].isnan().all()
    assert learned[:, 39].isnan().all()
    assert by_fifth(learned).shape == (3, 5)
    assert float(learned[0].nanmean()) > float(frozen[0].nanmean()) + 0.02
    with pytest.raises(CheckpointError, match="got another target"):
        train_drafter(tiny_target, DRAFTER, tmp_path, "other")


def test_trajectories_are_the_ordinary_samplers(tiny_target):
    """The last mean of a collected chain is the image that ``ancestral_sample`` returns for the same seed."""
    from free_kernels import ancestral_sample

    schedule, labels = DDPMSchedule(40), torch.arange(6)
    for scale in (1.0, 3.0):
        data = collect(tiny_target, schedule, labels, torch.full((6,), scale), seed=5)
        expected = ancestral_sample(tiny_target, labels, schedule=schedule, guidance_scale=scale, seed=5).samples
        torch.testing.assert_close(data.mean[-1], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("batch_size = 3.5", (), "batch_size must be int, got 3.5"),
        ("batchsize = 3", (), "must only have keys"),
        ("[model]\ndepht = 3", (), "must only have keys"),
        ("batch_size = ", (), "must be TOML"),
        ("", ("batch_size",), "an override must read key=value"),
        ("", ("loop.iterations=fast",), "iterations must be int, got 'fast'"),
    ],
)
def test_wrong_configs_are_named(tmp_path, text, overrides, message):
    path = tmp_path / "config.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"^load_config: .*{message}"):
        load_config(TrainConfig, path, overrides)


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.glob("*_drafter*.toml")))
def test_drafter_configs_of_the_package_are_right(name):
    load_config(DrafterTrainConfig, CONFIGS / name).check()


def test_overrides_win_over_the_file(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text("batch_size = 4\n[loop]\niterations = 5\nlearning_rate = 1\n")
    config = load_config(TrainConfig, path, ("loop.iterations=7", "dataset=digits"))
    assert (config.batch_size, config.loop.iterations, config.loop.learning_rate) == (4, 7, 1.0)
    # What a section does not give is the whole's own default, not that of the section's class.
    deeper = load_config(TrainConfig, None, ("model.depth=4",))
    assert deeper == replace(TrainConfig(), model=replace(TrainConfig().model, depth=4))


def test_defaults_of_a_whole_reach_sections_of_sections():
    @dataclass(frozen=True)
    class Outer:
        inner: TrainConfig = field(default_factory=lambda: replace(TINY, dataset="photographs"))

    built = build(Outer, {"inner": {"model": {"depth": 4}}}, "test")
    assert built.inner == replace(TINY, dataset="photographs", model=replace(TINY.model, depth=4))
