"""The drafter's memory: what a call sees of earlier ones, what a rewind leaves, and how training meets it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from interrupted_training import interrupted_at
from random_networks import small_target
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from free_dit import DiT, DiTConfig
from free_dit.train_drafter import DrafterLoss, DrafterTrainConfig, train_drafter
from free_dit.training.acceptance import acceptance_by_lookahead
from free_dit.training.loop import LoopConfig, iteration_seed
from free_dit.training.trajectories import collect
from free_dit.training.windows import NetworkRows, Windows
from free_kernels import DDPMSchedule, DiTTarget, DrafterConfig, FeatureDrafter, FrozenDrafter, sample
from free_kernels.checkpoint import CheckpointError
from free_kernels.drafters.memory import FeatureMemory
from free_kernels.protocols import Drafter, DraftMemory, new_memory
from free_kernels.steering.length_policy import DraftLengthPolicy

WINDOW, DRAFTS, SLOTS, BRANCHES = 3, 2, 3, 2
ROWS = BRANCHES * SLOTS
CONFIG = DrafterConfig(width=32, depth=2, head_dim=16, window=WINDOW)
Call = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def random_drafter(config: DrafterConfig = CONFIG, dtype: torch.dtype = torch.float64) -> FeatureDrafter:
    torch.manual_seed(0)
    drafter = FeatureDrafter((4, 8, 8), (16, 24), 5, config).eval().requires_grad_(False).to(dtype)
    for parameter in drafter.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.3)
    drafter.set_feature_scale(torch.randn(50, 24) * 3 + 1, torch.randn(50, 24))
    return drafter


def call(number: int, rows: int = ROWS, dtype: torch.dtype = torch.float64) -> Call:
    """Arguments of the drafter's call ``number``, one timestep lower than those of the call before."""
    generator = torch.Generator().manual_seed(number)
    feature = torch.randn(rows, 16, 24, generator=generator, dtype=dtype)
    previous, state = torch.randn(2, rows, 4, 8, 8, generator=generator, dtype=dtype)
    return feature, previous, state, torch.full((rows,), 900 - 100 * number), torch.arange(rows) % 6


def concatenated(drafter: FeatureDrafter, past: list[list[tuple[Tensor, Tensor]]], given: Call) -> Tensor:
    """The drafter's output with its past as a plain list (call by call, block by block), to which it is added."""
    feature, previous, state, t, y = given
    weights, modulations = drafter._fold(), drafter._modulations(t, y).unbind(1)
    enter, positions, *layers, leave, leave_bias = weights.weights
    x = F.linear(drafter._tokens(feature, previous, state, t), enter) + positions
    embedded = x
    seen, own = past[len(past) - min(len(past), drafter.config.window - 1) :], []
    blocks = enumerate(zip(*[iter(layers)] * 8, strict=True))
    for index, (qkv, qkv_bias, proj, proj_bias, fc1, fc1_bias, fc2, fc2_bias) in blocks:
        shift1, scale1, gate1, shift2, scale2, gate2 = modulations[6 * index : 6 * index + 6]
        inner = F.layer_norm(x, x.shape[-1:], eps=1e-6) * scale1 + shift1
        q, k, v = F.linear(inner, qkv, qkv_bias).unflatten(-1, (3, weights.heads, -1)).permute(2, 0, 3, 1, 4)
        own.append((k, v))
        keys, values = (torch.cat([*(kv[index][which] for kv in seen), own[-1][which]], dim=2) for which in (0, 1))
        p = (q @ keys.mT / q.shape[-1] ** 0.5).softmax(-1)
        x = x + gate1 * F.linear((p @ values).transpose(1, 2).flatten(2), proj, proj_bias)
        inner = F.layer_norm(x, x.shape[-1:], eps=1e-6) * scale2 + shift2
        x = x + gate2 * F.linear(F.gelu(F.linear(inner, fc1, fc1_bias)), fc2, fc2_bias)
    past.append(own)
    shift, scale, gain = modulations[-3:]
    x = F.layer_norm(x, x.shape[-1:], eps=1e-6) * scale + shift + embedded * gain
    return feature + F.linear(x, leave, leave_bias)


def poison(memory: FeatureMemory) -> None:
    """NaN into every slot that is out of use, in every block."""
    for length, position, *ring in zip(memory._length, memory._position, memory._keys, memory._values, strict=True):
        age = (position[:, None] - torch.arange(memory.capacity)) % memory.capacity
        for buffer in ring:
            buffer[age >= length[:, None]] = torch.nan


@pytest.mark.parametrize("window", [2, 3, 5])
def test_a_call_sees_the_latest_calls_of_its_window(window):
    drafter = random_drafter(replace(CONFIG, window=window))
    memory, past = drafter.new_memory(SLOTS, BRANCHES, DRAFTS), []
    for number in range(8):
        poison(memory)
        got = drafter(*call(number), memory)
        torch.testing.assert_close(got, concatenated(drafter, past, call(number)), rtol=1e-9, atol=1e-9)
        alone = drafter(*call(number))
        if number == 0:
            torch.testing.assert_close(got, alone, rtol=1e-9, atol=1e-9)
        else:
            assert not torch.allclose(got, alone, atol=1e-2), "the past matters"


def test_the_hoisted_form_remembers_the_same():
    drafter = random_drafter()
    fast = drafter.hoisted(torch.arange(10) * 100, torch.arange(6))
    assert fast is not drafter
    memories = [one.new_memory(SLOTS, BRANCHES, DRAFTS) for one in (drafter, fast)]
    with torch.no_grad():
        for number in range(5):
            expected, got = (one(*call(number), m) for one, m in zip((drafter, fast), memories, strict=True))
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_a_rewound_memory_never_saw_what_was_discarded():
    """Rounds of DRAFTS calls; each slot keeps a number of its own, in both branches, as after refusals."""
    drafter = random_drafter()
    memory, generator = drafter.new_memory(SLOTS, BRANCHES, DRAFTS), torch.Generator().manual_seed(7)
    pasts: list[list[list[tuple[Tensor, Tensor]]]] = [[] for _ in range(ROWS)]
    for round_ in range(12):
        poison(memory)
        for draft in range(DRAFTS):
            given = call(DRAFTS * round_ + draft)
            given = (*given[:3], given[3].clamp(min=0), given[4])
            got = drafter(*given, memory)
            for row, past in enumerate(pasts):
                expected = concatenated(drafter, past, tuple(x[row : row + 1] for x in given))
                torch.testing.assert_close(got[row : row + 1], expected, rtol=1e-9, atol=1e-9)
        steps = torch.randint(0, DRAFTS + 1, (SLOTS,), generator=generator)
        if round_ == 7:
            steps[1] = 100
        memory.rewind(steps)
        for row, past in enumerate(pasts):
            del past[max(0, len(past) - int(steps[row % SLOTS])) :]
    assert pasts[1]
    assert len(pasts[0]) != len(pasts[1])


def test_a_memory_fits_its_drafter_only():
    drafter = random_drafter()
    memory = drafter.new_memory(SLOTS, BRANCHES, DRAFTS)
    assert isinstance(memory, DraftMemory)
    assert isinstance(drafter, Drafter)
    assert memory.capacity == WINDOW - 1 + DRAFTS
    assert new_memory(FrozenDrafter(), 1, 1, 1) is None
    with pytest.raises(ValueError, match=r"^FeatureDrafter: memory must be .* for 4 rows, got one for 6 rows"):
        drafter(*call(0, 4), memory)
    with pytest.raises(ValueError, match=r"^FeatureDrafter: memory must be .*got one for 6 rows, window 3, depth 2"):
        random_drafter(replace(CONFIG, window=2))(*call(0), memory)
    with pytest.raises(TypeError, match=r"^FeatureDrafter: memory must be .*got list"):
        drafter(*call(0), [])
    with pytest.raises(ValueError, match=r"^FeatureMemory.rewind: steps must be int64 \[S\] = \[3\], got int64 \[6\]"):
        memory.rewind(torch.zeros(6, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"^FeatureMemory.rewind: steps must be int64 \[S\] = \[3\], got 1"):
        memory.rewind(1)
    with pytest.raises(ValueError, match=r"^rewind_features: steps must be at least 0, got -1"):
        memory.rewind(torch.tensor([0, -1, 0]))
    for wrong in ((0, 2, 2), (3, 0, 2), (3, 2, 0)):
        with pytest.raises(ValueError, match=r"^FeatureDrafter.new_memory: \w+ must be an int in \[1, inf\), got 0"):
            drafter.new_memory(*wrong)


@pytest.mark.parametrize(("window", "error"), [(0, ValueError), (2.0, TypeError), (True, TypeError)])
def test_an_impossible_window_is_refused(window, error):
    with pytest.raises(error, match=r"^FeatureDrafter: window must be an int in \[1, inf\), got"):
        FeatureDrafter((4, 8, 8), (16, 24), 5, replace(CONFIG, window=window))


def test_the_window_is_saved_with_the_drafter(tmp_path):
    drafter, path = random_drafter(dtype=torch.float32), tmp_path / "drafter.safetensors"
    drafter.save(path)
    again = FeatureDrafter.load(path)
    assert again.config == CONFIG
    memories = [one.new_memory(SLOTS, BRANCHES, DRAFTS) for one in (drafter, again)]
    for number in range(3):
        expected, got = (
            one(*call(number, dtype=torch.float32), memory)
            for one, memory in zip((drafter, again), memories, strict=True)
        )
        assert torch.equal(got, expected)


def test_a_file_without_a_window_holds_a_drafter_without_memory(tmp_path):
    drafter, path = random_drafter(replace(CONFIG, window=1), torch.float32), tmp_path / "drafter.safetensors"
    drafter.save(path)
    with safe_open(path, framework="pt") as handle:
        metadata = json.loads(handle.metadata()["free_kernels"])
    assert metadata["config"].pop("window") == 1
    save_file(load_file(path), path, metadata={"free_kernels": json.dumps(metadata)})
    again = FeatureDrafter.load(path)
    assert again.config == drafter.config
    assert again.new_memory(SLOTS, BRANCHES, DRAFTS) is None
    given = call(1, dtype=torch.float32)
    assert torch.equal(again(*given), drafter(*given))


def test_gradients_reach_remembered_calls():
    drafter = random_drafter().requires_grad_(True)
    # The stand-in for a first parent has no part in a call.
    parameters = [value for name, value in drafter.named_parameters() if not name.startswith("first_")]
    memory, past = drafter.new_memory(SLOTS, BRANCHES, DRAFTS), []
    results = []
    for run in (lambda given: drafter(*given, memory), lambda given: concatenated(drafter, past, given)):
        outputs = [run(call(number)) for number in range(6)]
        results.append(torch.autograd.grad(sum((o * o.detach().cos()).sum() for o in outputs[4:]), parameters))
    alone = [drafter(*call(number)) for number in (4, 5)]
    alone = torch.autograd.grad(sum((o * o.detach().cos()).sum() for o in alone), parameters)
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-7)
    assert not all(torch.allclose(a, b, rtol=1e-2) for a, b in zip(alone, results[0], strict=True))


@pytest.fixture(scope="module")
def target() -> DiTTarget:
    return small_target()


TRAIN = DrafterTrainConfig(
    drafter=DrafterConfig(width=32, head_dim=16, window=3),
    loop=LoopConfig(iterations=60, warmup=5, learning_rate=3e-3, ema_decay=0.9, checkpoint_every=20, log_every=10),
    num_steps=12,
    batch_size=32,
    trajectories=16,
    refresh_every=30,
)


def learner(target: DiTTarget, config: DrafterTrainConfig) -> FeatureDrafter:
    torch.manual_seed(1)
    drafter = FeatureDrafter(target.latent_shape, target.feature_shape, target.num_classes, config.drafter)
    for parameter in drafter.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return drafter


def test_a_training_window_remembers_the_steps_before_it(target):
    """Rows that start at steps 0, 1, 2 and 7 remember 0, 1, 2 and 2 drafts, from exact features but for step 0."""
    drafter = learner(target, TRAIN)
    loss = DrafterLoss(target, drafter, TRAIN)
    data = loss.main.data(0)
    image, start = torch.arange(4), torch.tensor([0, 1, 2, 7])
    y = torch.cat([data.labels[:4], torch.full((4,), 10)])
    rows = NetworkRows(data.guidance[:4], True, torch.device("cpu"))
    windows = Windows(loss.main, data, image, y, rows)
    memory = loss._past(windows, start)
    assert memory._length.tolist() == [[0, 1, 2, 2] * 2]
    parents = loss.parents(windows, start)
    poison(memory)
    got = loss.draft(windows, parents, start, memory)
    for row in range(8):
        past, i = [], row % 4
        for k in range(max(0, int(start[i]) - 2), int(start[i]) + 1):
            given = (
                data.features[k - 1, row // 4, i][None] if k else drafter.initial_feature(data.states[0, i][None]),
                data.states[max(k - 1, 0), i][None],
                data.states[k, i][None],
                loss.main.schedule.timesteps[k][None],
                y[row][None],
            )
            expected = concatenated(drafter, past, given)
        torch.testing.assert_close(got[row : row + 1], expected, rtol=1e-4, atol=1e-5)


def test_a_windowed_drafter_trains_and_resumes_exactly(target, tmp_path):
    whole = load_file(train_drafter(target, TRAIN, tmp_path / "whole", "tiny"))
    lines = (tmp_path / "whole" / "log.csv").read_text().splitlines()
    losses = [float(line.split(",")[lines[0].split(",").index("loss")]) for line in lines[1:]]
    assert losses[-1] < 0.9 * losses[0]
    with interrupted_at(33):
        train_drafter(target, TRAIN, tmp_path / "parts", "tiny")
    resumed = load_file(train_drafter(target, TRAIN, tmp_path / "parts", "tiny"))
    for name, tensor in whole.items():
        torch.testing.assert_close(resumed[name], tensor, rtol=1e-5, atol=1e-6)
    with pytest.raises(CheckpointError, match="got another drafter"):
        train_drafter(target, replace(TRAIN, drafter=replace(TRAIN.drafter, window=1)), tmp_path / "parts", "tiny")


def test_a_window_of_one_trains_as_if_there_were_none(target):
    """The same initial weights and random stream; the loss sees each draft without a past."""
    config = replace(TRAIN, drafter=replace(TRAIN.drafter, window=1))
    losses = []
    for one in (config, TRAIN):
        loss = DrafterLoss(target, learner(target, one), one)
        if one is TRAIN:
            loss._past = lambda *_: None
        with iteration_seed(0, 5):
            losses.append(loss(5)[0])
            losses.append(torch.rand(()))
    assert torch.equal(losses[0], losses[2])
    assert torch.equal(losses[1], losses[3])


def test_acceptance_by_lookahead_remembers_exact_steps_and_its_own_drafts(target):
    """Against a run for each start and look-ahead that begins with an empty past."""
    drafter, schedule = learner(target, TRAIN).eval().requires_grad_(False), DDPMSchedule(12)
    data = collect(target, schedule, torch.arange(3), torch.tensor([1.0, 2.0, 3.0]), seed=4)
    seen: list[Tensor] = []

    class Recorder:
        """The drafter, noting what it returns."""

        new_memory = staticmethod(drafter.new_memory)

        def __call__(self, *given: Tensor, memory: DraftMemory) -> Tensor:
            seen.append(drafter(*given, memory))
            return seen[-1]

    acceptance = acceptance_by_lookahead(target, Recorder(), schedule, data, lookahead=3)
    assert acceptance[0, 1:-1].isfinite().all()
    assert acceptance[2, 3:-1].isfinite().all()
    y = torch.cat([data.labels, torch.full_like(data.labels, 10)])
    outputs = iter(seen)
    for start in range(1, 11):
        past: list[list[tuple[Tensor, Tensor]]] = []

        def draft(k: int, feature: Tensor, past: list) -> Tensor:
            previous, state = (data.states[i].repeat(2, 1, 1, 1) for i in (k - 1, k))
            return concatenated(drafter, past, (feature, previous, state, schedule.timesteps[k].expand(6), y))

        for k in range(1, start):
            draft(k, data.features[k - 1].flatten(0, 1), past)
        feature = data.features[start - 1].flatten(0, 1)
        for k in range(start, min(start + 3, 11)):
            feature = draft(k, feature, past)
            torch.testing.assert_close(next(outputs), feature, rtol=1e-4, atol=1e-5)
    assert next(outputs, None) is None


def windowed_pair() -> tuple[DiTTarget, FeatureDrafter]:
    torch.manual_seed(1)
    target = DiTTarget(DiT(DiTConfig(8, 2, 4, 24, 2, 2, 5)).eval().requires_grad_(False))
    drafter = FeatureDrafter(target.latent_shape, target.feature_shape, 5, DrafterConfig(width=32, window=3))
    for parameter in (*target.module.parameters(), *drafter.parameters()):
        torch.nn.init.normal_(parameter, std=0.05)
    return target, drafter.eval().requires_grad_(False)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_windowed_drafter_in_the_sampler(guidance):
    """Slots that are refilled start without a past, and refused calls leave none: images keep to themselves."""
    target, drafter = windowed_pair()
    labels, settings = torch.arange(5), {"schedule": DDPMSchedule(20), "drafter": drafter, "guidance_scale": guidance}
    whole = sample(target, labels, **settings)
    assert 0.0 < whole.stats.acceptance < 1.0
    for slots in (1, 2):
        few = sample(target, labels, max_slots=slots, **settings)
        torch.testing.assert_close(few.samples, whole.samples, rtol=1e-4, atol=1e-4)
        assert (few.stats.rounds_per_image == whole.stats.rounds_per_image).all()


def test_an_image_that_enters_after_ordinary_steps_has_no_past(monkeypatch):
    """Several ordinary steps at once, the last of an image among them, hand the slot on as a round does."""
    target, drafter = windowed_pair()
    num_steps, ordinary_from = 20, 12

    def choose(self, live, steps, seen):
        self.steps = steps
        one = [step == 0 or step >= ordinary_from for step in steps]
        return [(1 if alone else 3) if holds else 0 for holds, alone in zip(live, one, strict=True)]

    monkeypatch.setattr(DraftLengthPolicy, "choose", choose)
    monkeypatch.setattr(DraftLengthPolicy, "observe", lambda *figures: None)
    ahead = property(lambda self: num_steps if min(self.steps) >= ordinary_from else 1)
    monkeypatch.setattr(DraftLengthPolicy, "ordinary_ahead", ahead)
    settings = {"schedule": DDPMSchedule(num_steps), "drafter": drafter, "draft_length": "auto"}
    whole = sample(target, torch.arange(3), **settings)
    assert 0.0 < whole.stats.acceptance < 1.0

    def alone():
        return sample(target, torch.arange(3), max_slots=1, **settings)

    torch.testing.assert_close(alone().samples, whole.samples, rtol=1e-4, atol=1e-4)
    rewind = FeatureMemory.rewind
    monkeypatch.setattr(FeatureMemory, "rewind", lambda self, count: rewind(self, count.clamp(max=2)))
    assert (alone().samples[1:] - whole.samples[1:]).abs().max() > 0.01
