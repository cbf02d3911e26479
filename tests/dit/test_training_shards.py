"""Shards of trajectories on disk, precision, accumulation and logs of drafter training."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fresh_process import STATM, evaluate_alone, resident
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from training_worker import CONFIG, tiny_target

from free_dit.bundled import load_bundled
from free_dit.data import load_digits
from free_dit.train_drafter import calibrate, train_drafter
from free_dit.training.drafter_loss import DrafterLoss
from free_dit.training.loop import LoopConfig, TrainingLoop
from free_dit.training.shards import ShardStore, target_fingerprint
from free_dit.training.trajectories import Storage, Trajectories, collect, make_schedule, noised_chains
from free_kernels import DDPMSchedule, DrafterConfig, FeatureDrafter, sample
from free_kernels.checkpoint import CheckpointError

SHORT = replace(CONFIG, loop=replace(CONFIG.loop, iterations=6, log_every=2), calibration_images=0)


def trajectories(count: int = 5, **settings) -> Trajectories:
    guidance = torch.linspace(1.0, 3.0, count)
    return collect(tiny_target(), DDPMSchedule(14), torch.arange(count) % 3, guidance, seed=7, **settings)


def test_trajectories_in_parts_are_those_in_one():
    whole = trajectories()
    for settings in ({"max_rows": 4}, {"max_rows": 5}, {"storage": Storage(images_first=True)}):
        parts = trajectories(**settings)
        for name in ("states", "features", "mean", "std"):
            torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=1e-4, atol=1e-5)
    halves = trajectories(storage=Storage(torch.bfloat16))
    assert halves.features.dtype == torch.bfloat16
    assert torch.equal(halves.features, whole.features.bfloat16())
    assert torch.equal(halves.states, whole.states)
    with pytest.raises(ValueError, match="^collect: max_rows must be an int in"):
        trajectories(max_rows=1)


def test_rows_of_a_chunk_are_bounded():
    target, seen = tiny_target(), []
    features = target.features
    target.features = lambda x, t, y: seen.append(len(x)) or features(x, t, y)
    target.hoisted = lambda *_: target
    collect(target, DDPMSchedule(5), torch.arange(7) % 3, torch.ones(7), 0, max_rows=4)
    assert max(seen) == 4
    assert sum(seen) == 2 * 7 * 5


class Store:
    """A store whose makes are counted."""

    def __init__(self, folder, keep: int = 3, **settings) -> None:
        self.made: list[int] = []
        self.store = ShardStore(folder, {"seed": 1, **settings}, self.make, keep, {"schedule": "DDPM"})

    def make(self, number: int) -> Trajectories:
        self.made.append(number)
        guidance = torch.full((2,), 1.5)
        return collect(
            tiny_target(), DDPMSchedule(6), torch.tensor([0, 2]), guidance, number, storage=Storage(images_first=True)
        )


def test_whole_shards_are_used_again_and_missing_ones_made_again(tmp_path):
    first = Store(tmp_path)
    for number in range(5):
        first.store.latest(number)
        assert len(list(tmp_path.glob("*.safetensors"))) <= 3
    assert first.made == [0, 1, 2, 3, 4]
    assert json.loads((tmp_path / "manifest.json").read_text()) == {"seed": 1}
    before = {n: first.store.path(n).read_bytes() for n in (2, 3, 4)}

    first.store.path(3).unlink()
    torn = first.store.path(4)
    torn.write_bytes(torn.read_bytes()[:-50])
    leftover = tmp_path / ".shard-000004.safetensors.1.tmp"
    leftover.write_bytes(b"half")
    again = Store(tmp_path)
    again.store.latest(4)
    assert again.made == [3, 4]
    assert not leftover.exists()
    assert {n: again.store.path(n).read_bytes() for n in (2, 3, 4)} == before
    # A run that goes on from an older checkpoint.
    back = Store(tmp_path)
    back.store.latest(3)
    assert back.made == [1]
    assert len(list(tmp_path.glob("*.safetensors"))) == 3

    with pytest.raises(CheckpointError, match="manifest.json must be of the same target and settings, .* num_steps"):
        Store(tmp_path, num_steps=7)
    # A setting that the version before did not have: with its default the shards are the same.
    newer = Store(tmp_path, schedule="DDPM")
    newer.store.latest(3)
    assert newer.made == []
    with pytest.raises(CheckpointError, match="got another schedule"):
        Store(tmp_path, schedule="flow")
    (tmp_path / "manifest.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="manifest.json must be of the same target and settings"):
        Store(tmp_path)
    with pytest.raises(ValueError, match="^train_drafter: keep_shards must be"):
        Store(tmp_path, keep=0)


def test_a_window_of_shards_reads_what_memory_holds(tmp_path):
    one = Store(tmp_path, keep=2)
    window = one.store.latest(1)
    sets = [one.make(number) for number in (0, 1)]
    assert window.labels.tolist() == [0, 2, 0, 2]
    image, step = torch.tensor([0, 3, 2, 1, 3]), torch.tensor([0, 5, 4, 3, 2])
    for name in ("states", "mean", "std"):
        joint = torch.cat([getattr(one, name) for one in sets], dim=1)
        assert torch.equal(window.at(name, step, image), joint[step, image])
    features = torch.cat([one.features for one in sets], dim=2)
    rows = features[step, :, image]
    assert torch.equal(window.at("features", step, image), torch.cat([rows[:, 0], rows[:, 1]]))
    assert torch.equal(window.states, sets[0].states)
    sampled, changes = window.scale_samples()
    assert sampled.shape == changes.shape == (10, 2, 4, 32)
    assert torch.equal(sampled[0], sets[0].features[0, :, 0])
    torch.testing.assert_close(changes[9], sets[0].features[5, :, 1] - sets[0].features[4, :, 1])


def shard_of(steps: int, folder: Path) -> None:
    """A shard whose features take 1 MiB a step, 2 images of 2 feature layers."""

    def made(_: int) -> Trajectories:
        states = torch.zeros(steps, 2, 1, 8, 8)
        features = torch.ones(steps, 2, 2, 64, 1024)
        return Trajectories(states, features, states, states, torch.zeros(2).long(), torch.ones(2))

    ShardStore(folder, {}, made, 1).latest(0)


def memory_of_reading(whole: bool, folder: str) -> int:
    """Bytes by which this process grows when it reads a shard of 100 steps: two rows of it, or all."""

    def unused(_: int) -> Trajectories:
        raise AssertionError("the shard is whole")

    def read(name: str, steps: int) -> Tensor:
        path = Path(folder, name)
        if whole:
            with safe_open(path / "shard-000000.safetensors", framework="pt") as handle:
                everything = handle.get_tensor("features").clone()
            assert everything.numel() * 4 == steps * 2**20
            return everything
        window = ShardStore(path, {}, unused, 1).latest(0)
        rows = window.at("features", torch.tensor([3, steps * 7 // 10]), torch.tensor([1, 0]))
        assert rows.shape == (4, 64, 1024)
        return rows

    # What the first read loads is code.
    read("small", 10)
    before = resident()
    kept = read("large", 100)
    grown = resident() - before
    del kept
    return grown


@pytest.mark.skipif(not STATM.exists(), reason="reads resident memory from /proc")
def test_a_batch_of_windows_leaves_the_rest_of_a_shard_on_disk(tmp_path):
    shard_of(10, tmp_path / "small")
    shard_of(100, tmp_path / "large")
    size = 100 * 2**20
    # Each alone: memory that this process freed, or frees meanwhile, would hide what is read.
    batch, whole = (
        evaluate_alone("test_training_shards", f"memory_of_reading({whole}, {str(tmp_path)!r})")
        for whole in (False, True)
    )
    assert batch < 0.2 * size
    # Negative control: all of it.
    assert whole > 0.9 * size


def test_the_fingerprint_sees_weights_dtype_and_shapes():
    target = tiny_target()
    assert target_fingerprint(target) == target_fingerprint(tiny_target())
    assert target_fingerprint(tiny_target(torch.bfloat16)) != target_fingerprint(target)
    with torch.no_grad():
        target.module.final_layer.linear.weight[0, 0] += 0.01
    assert target_fingerprint(target) != target_fingerprint(tiny_target())


def test_the_same_name_with_other_weights_does_not_resume(tmp_path):
    train_drafter(tiny_target(), SHORT, tmp_path, "tiny")
    other = tiny_target()
    other.module.final_layer.linear.weight.data.mul_(1.1)
    with pytest.raises(CheckpointError, match="got another target_fingerprint"):
        train_drafter(other, SHORT, tmp_path, "tiny")
    with pytest.raises(CheckpointError, match="got another precision"):
        train_drafter(tiny_target(), replace(SHORT, precision="bfloat16"), tmp_path, "tiny")


@pytest.mark.parametrize("store", ["memory", "shards"])
@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize(("precision", "tolerance"), [("bfloat16", 0.05), ("float16", 0.01)])
def test_mixed_precision_is_close_to_float32(tmp_path, precision, tolerance, window, store):
    """The same windows and weights; delta is float32, so that the loss keeps its digits."""
    target = tiny_target()
    results = []
    for kind in ("float32", precision):
        config = replace(CONFIG, precision=kind, store=store, drafter=replace(CONFIG.drafter, window=window))
        torch.manual_seed(3)
        drafter = FeatureDrafter(target.latent_shape, target.feature_shape, 3, config.drafter)
        for parameter in drafter.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        torch.manual_seed(4)
        loss, _ = DrafterLoss(target, drafter, config, folder=tmp_path)(0)
        loss.backward()
        assert loss.dtype == torch.float32
        gradients = [p.grad for p in drafter.parameters()]
        assert all(g is not None and g.dtype == torch.float32 for g in gradients)
        results.append((loss.item(), torch.cat([g.flatten() for g in gradients])))
    (exact, gradient), (mixed, rough) = results
    assert exact != mixed
    assert mixed == pytest.approx(exact, rel=tolerance)
    assert torch.nn.functional.cosine_similarity(gradient, rough, dim=0) > 0.99


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_target_and_drafter_train_load_and_sample(tmp_path, precision):
    target = tiny_target(getattr(torch, precision))
    config = replace(SHORT, precision=precision, feature_dtype=precision, store="shards", max_rows=4)
    config = replace(config, calibration_images=3)
    path = train_drafter(target, config, tmp_path, "tiny")
    drafter = FeatureDrafter.load(path, target)
    assert drafter.positions.dtype == torch.float32
    assert drafter.calibration is not None
    with safe_open(tmp_path / "trajectories" / "rank0" / "shard-000000.safetensors", framework="pt") as handle:
        assert handle.get_tensor("features").dtype == target.dtype
    result = sample(target, torch.arange(3), schedule=DDPMSchedule(14), drafter=drafter, guidance_scale=2.0)
    assert result.samples.isfinite().all()
    # Done already: the same file again.
    first = load_file(path)
    second = load_file(train_drafter(target, config, tmp_path, "tiny"))
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items())


def test_calibration_in_parts_is_that_in_one():
    target = tiny_target()
    drafter = FeatureDrafter(target.latent_shape, target.feature_shape, 3, CONFIG.drafter).eval()
    config = replace(CONFIG, calibration_images=5)
    whole = torch.tensor(calibrate(target, drafter, config))
    parts = torch.tensor(calibrate(target, drafter, replace(config, max_rows=4)))
    torch.testing.assert_close(parts, whole, rtol=0, atol=2e-4)


NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)


def linear_loop(out, loss, accumulate: int = 1, scaler=NO_SCALER, iterations: int = 4) -> TrainingLoop:
    torch.manual_seed(0)
    module = torch.nn.Linear(3, 1)
    config = LoopConfig(iterations=iterations, warmup=1, accumulate=accumulate, log_every=1)
    return TrainingLoop(module, lambda step: loss(module, step), config, out, {}, scaler=scaler)


def test_accumulated_batches_are_drawn_apart_and_averaged(tmp_path):
    seen = []

    def loss(module, step):
        seen.append(torch.randn(2, 3))
        return module(seen[-1]).square().mean(), {"value": float(len(seen))}

    loop = linear_loop(tmp_path / "two", loss, accumulate=2)
    loop.run()
    assert len(seen) == 8
    assert not torch.equal(seen[0], seen[1])
    assert "value" in (tmp_path / "two" / "log.csv").read_text()
    batches = list(seen)

    def joint(module, step):
        return module(torch.cat(batches[2 * step : 2 * step + 2])).square().mean(), {}

    whole = linear_loop(tmp_path / "one", joint)
    whole.run()
    for a, b in zip(loop.parameters, whole.parameters, strict=True):
        torch.testing.assert_close(a, b)


def test_the_loss_scale_finds_its_size_and_is_kept(tmp_path):
    """Overflowing iterations are left out, the scale falls, and a resumed run starts from it."""

    def loss(module, step):
        return (module(torch.full((1, 3), 1e34)) * 1e1).sum(), {}

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    loop = linear_loop(tmp_path, loss, scaler=scaler, iterations=3)
    before = [p.detach().clone() for p in loop.parameters]
    loop.run()
    assert scaler.get_scale() == 2.0**13
    assert all(torch.equal(a, b) for a, b in zip(before, loop.parameters, strict=True))
    assert float(loop.ema.n_averaged) == 0
    fresh = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    linear_loop(tmp_path, loss, scaler=fresh, iterations=3)
    assert fresh.get_scale() == 2.0**13
    # At scale 1 nothing is left to lower: the gradient itself is at fault.
    hopeless = torch.amp.GradScaler("cpu", init_scale=1.0)

    def bad(module, step):
        return (module.weight * math.inf).nan_to_num(0.0, 0.0, 0.0).sum(), {}

    with pytest.raises(FloatingPointError, match="^train: gradient must be finite"):
        linear_loop(tmp_path / "bad", bad, scaler=hopeless).run()


def test_logs(tmp_path, monkeypatch):
    def loss(module, step):
        return module(torch.ones(1, 3)).sum(), {}

    loop = linear_loop(tmp_path, loss)
    object.__setattr__(loop.config, "log", "tensorboard")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="^train: log must be 'csv', or 'tensorboard' with the package"):
        loop.run()
    monkeypatch.undo()
    pytest.importorskip("tensorboard")
    loop.run()
    assert list((tmp_path / "tensorboard").glob("events*"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"precision": "half"}, "precision must be one of 'float32', 'bfloat16', 'float16', got 'half'"),
        ({"store": "disk"}, "store must be one of 'memory', 'shards', got 'disk'"),
        ({"feature_dtype": "int8"}, "feature_dtype must be one of"),
        ({"schedule": "ode"}, "schedule must be one of 'auto', 'ddpm', 'policy', got 'ode'"),
        ({"max_rows": 1}, "max_rows must be an int in"),
        ({"keep_shards": 0}, "keep_shards must be an int in"),
        ({"batch_size": 0}, "batch_size must be an int in"),
        ({"late": 7.0}, "late must be a finite number in"),
        ({"first": -1.0}, "first must be a finite number in"),
        ({"feature_weight": -1.0}, "feature_weight must be a finite number in"),
        ({"loss": "none"}, "feature_weight must be above 0 for loss 'none', got 0.0"),
        ({"calibration_images": -2}, "calibration_images must be an int in"),
        ({"loop": LoopConfig(clip_norm=-1.0)}, "clip_norm must be a finite number in"),
        ({"drafter": DrafterConfig(num_timesteps=600)}, "num_timesteps must be at least .*, got 600"),
        ({"forward_dataset": "photographs"}, "forward_dataset must be empty, or images of the target's shape"),
    ],
)
def test_wrong_settings_are_named(tmp_path, change, message):
    with pytest.raises(ValueError, match=f"^train_drafter: {message}"):
        train_drafter(tiny_target(), replace(SHORT, **change), tmp_path, "tiny")


def test_schedules_by_name():
    assert make_schedule("ddpm", tiny_target(), 20) == DDPMSchedule(20)


def test_noised_chains_have_the_forward_law():
    """Means and variances of every state in closed form, and of a change; 4,000 images of one value.

    Two tests for each of 50 states at 5.6 standard errors: chance of a false alarm 2e-6.
    """
    schedule, count, limit = DDPMSchedule(50), 4000, 5.6
    chains = noised_chains(schedule, torch.full((count, 1, 1, 1), 0.7), 3).flatten(1).double()
    alpha = torch.from_numpy(schedule.train_alphas_cumprod)[schedule.timesteps]
    mean, std = 0.7 * alpha.sqrt(), (1 - alpha).sqrt()

    def has_the_marginals(states: torch.Tensor) -> bool:
        means = ((states.mean(1) - mean).abs() < limit * std / count**0.5).all()
        return bool(means & ((states.var(1) / std.square() - 1).abs() < limit * (2 / count) ** 0.5).all())

    def shares_noise(states: torch.Tensor) -> bool:
        return bool((states[20] - states[21]).var() < 0.5 * (std[20].square() + std[21].square()))

    assert has_the_marginals(chains)
    assert shares_noise(chains)
    # Negative controls: states a step too early, and draws of the right marginals that have nothing to do with another.
    assert not has_the_marginals(chains.roll(1, 0))
    independent = (
        mean[:, None] + std[:, None] * torch.randn(50, count, generator=torch.Generator().manual_seed(4)).double()
    )
    assert has_the_marginals(independent)
    assert not shares_noise(independent)


def test_windows_of_forward_noised_data():
    target, _ = load_bundled("digits")
    config = replace(SHORT, num_steps=10, trajectories=4, forward_dataset="digits", batch_size=4, unroll=2)
    drafter = FeatureDrafter(target.latent_shape, target.feature_shape, target.num_classes)
    loss = DrafterLoss(target, drafter, config)
    data, again, other = (loss.main.trajectories(number) for number in (0, 0, 1))
    assert torch.equal(data.states, again.states)
    assert not torch.equal(data.states, other.states)
    # The state before the last step is nearly a real digit of its label, which the sampler's own chains are not yet.
    real = load_digits("train")
    for image in range(4):
        of_class = real.images[real.labels == data.labels[image]]
        assert (of_class - data.states[-1, image]).flatten(1).norm(dim=1).min() < 1.0
    t, y = loss.main.timesteps[3].expand(4), data.labels
    expected = target.features(data.states[3], t, y)
    torch.testing.assert_close(data.features[3, 0], expected, rtol=1e-4, atol=1e-4)
    assert torch.isfinite(loss(0)[0])
    with pytest.raises(ValueError, match="forward_dataset must be one of"):
        replace(config, forward_dataset="imagenet").check()
