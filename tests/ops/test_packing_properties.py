"""Whole lives of images through ``pack_drafts`` and ``commit_drafts`` against a model that knows lists only."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import hypothesis
import pytest
import torch
from analytic import BiasedDrafter, GaussianTarget
from hypothesis import HealthCheck, Phase, given
from hypothesis import strategies as st
from torch import Tensor

from free_kernels import DDPMSchedule, extension, sample, sample_iter
from free_kernels.ops.packing import commit_drafts, pack_drafts
from free_kernels.sampling.image_pool import ImagePool
from free_kernels.sampling.job import make_job
from free_kernels.sampling.options import Options

needs_extension = pytest.mark.skipif(
    not extension.has_extension(), reason=f"no compiled extension: {extension.why_no_extension()}"
)
BACKENDS = ["reference", pytest.param("extension", marks=needs_extension)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
Rows = list[list[float]]


@dataclass(frozen=True)
class Shape:
    """What stays the same over the life of a batch."""

    slots: int
    length: int
    num_steps: int
    images: int
    branches: int
    latent: tuple[int, int, int]
    feature: tuple[int, int]
    padding: int
    dtype: torch.dtype
    feature_dtype: torch.dtype
    seed: int


shapes = st.builds(
    Shape,
    slots=st.integers(1, 5),
    length=st.integers(1, 4),
    num_steps=st.integers(1, 7),
    images=st.integers(1, 9),
    branches=st.integers(1, 2),
    latent=st.sampled_from([(1, 1, 1), (1, 3, 1), (3, 1, 5), (4, 2, 2)]),
    feature=st.sampled_from([(1, 1), (3, 5), (4, 8)]),
    padding=st.integers(0, 3),
    dtype=st.sampled_from(DTYPES),
    feature_dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)


@dataclass
class Model:
    """The batch as lists, moved by the words of the ops' contract."""

    samples: Rows
    all_labels: list[int]
    state: Rows
    previous: Rows
    parent: list[Rows]
    steps: list[int]
    images: list[int]
    labels: list[int]
    queue: int
    num_steps: int
    finished: dict[int, list[float]] = field(default_factory=dict)
    taken: dict[int, int] = field(default_factory=dict)

    def rows(self, states: list[Rows], lengths: list[int], timesteps: list[int], padding: int, null: int | None):
        """Packed rows, timesteps, labels and offsets."""
        packed = [
            (states[slot][j], timesteps[self.steps[slot] + j], self.labels[slot])
            for slot, length in enumerate(lengths)
            for j in range(length)
        ]
        packed += [([0.0] * len(self.state[0]), timesteps[-1], 0)] * padding
        x, t, y = ([one[part] for one in packed] for part in range(3))
        if null is not None:
            x, t, y = x * 2, t * 2, y + [null] * len(y)
        return x, t, y, [sum(lengths[:slot]) for slot in range(len(lengths) + 1)]

    def commit(self, committed: list[int], after: Rows, states: list[Rows], features: list[Rows], lengths: list[int]):
        """``features`` are one list of rows for each branch."""
        first = 0
        for slot, count in enumerate(committed):
            image, row = self.images[slot], first + count - 1
            first += lengths[slot]
            if image == -1 or count == 0:
                continue
            self.previous[slot] = states[slot][count - 1]
            for branch, rows in enumerate(features):
                self.parent[branch][slot] = rows[row]
            self.state[slot] = after[slot]
            self.steps[slot] += count
            self.taken[image] = self.taken.get(image, 0) + count
            if self.steps[slot] < self.num_steps:
                continue
            assert image not in self.finished
            self.finished[image] = self.samples[image] = after[slot]
            if self.queue == len(self.samples):
                self.images[slot] = -1
                continue
            self.images[slot], self.steps[slot] = self.queue, 0
            self.state[slot], self.labels[slot] = self.samples[self.queue], self.all_labels[self.queue]
            self.queue += 1


def live(shape: Shape, backend: str, pack: Callable = pack_drafts, commit: Callable = commit_drafts) -> Model:
    """Every image of a batch from noise to its end, ops beside model; raises AssertionError where they part."""
    dice, generator = random.Random(shape.seed), torch.Generator().manual_seed(shape.seed)

    def numbers(*size: int, dtype: torch.dtype = shape.dtype) -> Tensor:
        # Integers up to 256 are exact in all three dtypes.
        return torch.randint(-256, 257, size, generator=generator).to(dtype)

    slots, elements, num_steps = shape.slots, shape.latent, shape.num_steps
    images = [slot if slot < shape.images else -1 for slot in range(slots)]
    dice.shuffle(images)
    labels = [dice.randrange(10) for _ in range(shape.images)]
    null = 10 if shape.branches == 2 else None
    timesteps = sorted(dice.sample(range(1000), num_steps), reverse=True)
    tensors: dict[str, Any] = {
        "state": numbers(slots, *elements),
        "previous": numbers(slots, *elements),
        "parent": numbers(shape.branches, slots, *shape.feature, dtype=shape.feature_dtype),
        "steps": torch.zeros(slots, dtype=torch.int64),
        "images": torch.tensor(images),
        "labels": torch.tensor([labels[image] if image >= 0 else 0 for image in images]),
        "samples": numbers(shape.images, *elements),
        "all_labels": torch.tensor(labels),
        "queue": torch.tensor([min(slots, shape.images)]),
    }

    def lists(tensor: Tensor, kept: int = 1) -> Any:
        return tensor.flatten(kept).tolist()

    model = Model(
        lists(tensors["samples"]),
        labels,
        lists(tensors["state"]),
        lists(tensors["previous"]),
        lists(tensors["parent"], 2),
        tensors["steps"].tolist(),
        list(images),
        tensors["labels"].tolist(),
        int(tensors["queue"]),
        num_steps,
    )
    rounds = 0
    while max(model.images) >= 0:
        rounds += 1
        # A slot may sit out a round, and a round may commit nothing of it.
        lengths = [
            0 if image < 0 else dice.randint(int(rounds > 30), min(shape.length, num_steps - step))
            for image, step in zip(model.images, model.steps, strict=True)
        ]
        committed = [dice.randint(min(1, length) * (rounds > 30), length) for length in lengths]
        total = sum(lengths) + shape.padding
        states = numbers(slots, shape.length, *elements)
        packed = pack(
            states,
            torch.tensor(lengths),
            tensors["steps"],
            tensors["labels"],
            torch.tensor(timesteps),
            total,
            null,
            backend=backend,
        )
        wanted = model.rows(lists(states, 2), lengths, timesteps, shape.padding, null)
        assert packed[0].dtype == shape.dtype
        assert [lists(packed[0]), *(part.tolist() for part in packed[1:])] == list(wanted)
        if not total:
            continue
        features = numbers(shape.branches * total, *shape.feature, dtype=shape.feature_dtype)
        after = numbers(slots, *elements)
        # What no row was committed of may hold anything.
        after[torch.tensor(committed) == 0] = torch.nan
        commit(
            torch.tensor(committed),
            after,
            states,
            features,
            packed[3],
            **tensors,
            num_steps=num_steps,
            backend=backend,
        )
        model.commit(committed, lists(after), lists(states, 2), lists(features.unflatten(0, (-1, total)), 2), lengths)
        for name in ("state", "previous", "samples"):
            assert lists(tensors[name]) == getattr(model, name), name
        assert lists(tensors["parent"], 2) == model.parent
        for name in ("steps", "images", "labels"):
            assert tensors[name].tolist() == getattr(model, name), name
        assert int(tensors["queue"]) == model.queue
    assert lists(tensors["samples"]) == [model.finished[image] for image in range(shape.images)]
    assert model.taken == dict.fromkeys(range(shape.images), num_steps)
    return model


bounded = hypothesis.settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.mark.parametrize("backend", BACKENDS)
@bounded
@given(shape=shapes)
def test_lives_of_images(backend: str, shape: Shape) -> None:
    live(shape, backend)


def wrong_pack(change: Callable) -> dict[str, Callable]:
    def pack(*arguments, **options):
        x, t, y, offsets = pack_drafts(*arguments, **options)
        return change(x, t, y, offsets, arguments)

    return {"pack": pack}


def wrong_commit(before: Callable = lambda a: None, after: Callable = lambda a: None) -> dict[str, Callable]:
    names = ("committed", "next_states", "draft_states", "features", "row_offsets")

    def commit(*arguments, num_steps, backend, **tensors):
        given_to_op = {**dict(zip(names, arguments, strict=True)), **tensors}
        before(given_to_op)
        commit_drafts(**given_to_op, num_steps=num_steps, backend=backend)
        after(given_to_op)

    return {"commit": commit}


def one_row_late(a: dict[str, Tensor]) -> None:
    a["features"] = a["features"].roll(-1, 0)


def first_draft_is_the_parent(a: dict[str, Tensor]) -> None:
    a["draft_states"] = a["draft_states"][:, :1].expand_as(a["draft_states"]).contiguous()


def branches_swapped(a: dict[str, Tensor]) -> None:
    if len(a["parent"]) == 2:
        a["parent"].copy_(a["parent"].flip(0))


def late_labels(a: dict[str, Tensor]) -> None:
    a["all_labels"] = a["all_labels"].roll(1)


def image_skipped(a: dict[str, Tensor]) -> None:
    if int(a["queue"]) < len(a["samples"]) - 1:
        a["queue"] += 1


def result_not_written(a: dict[str, Tensor]) -> None:
    a["samples"] = a["samples"].clone()


def idle_slot_is_written(a: dict[str, Tensor]) -> None:
    a["state"][a["images"] < 0] += 1


# Bugs that a batch of one slot, one branch or equal lengths would not show.
WRONG = {
    "timestep of the slot's first row everywhere": wrong_pack(
        lambda x, t, y, offsets, given: (x, t.roll(1), y, offsets)
    ),
    "padding at the first timestep": wrong_pack(
        lambda x, t, y, offsets, given: (x, torch.where(t == given[4][-1], given[4][0], t), y, offsets)
    ),
    "null label in the first half": wrong_pack(lambda x, t, y, offsets, given: (x, t, y.flip(0), offsets)),
    "offsets end with the padding": wrong_pack(
        lambda x, t, y, offsets, given: (x, t, y, torch.cat([offsets[:-1], offsets.new_tensor([given[5]])]))
    ),
    "parent's feature one row late": wrong_commit(one_row_late),
    "first draft is the parent": wrong_commit(first_draft_is_the_parent),
    "guidance branches swapped": wrong_commit(after=branches_swapped),
    "label of another image": wrong_commit(late_labels),
    "an image is skipped": wrong_commit(after=image_skipped),
    "a result is not written": wrong_commit(result_not_written),
    "an idle slot is written": wrong_commit(after=idle_slot_is_written),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_wrong_ops_are_found(wrong: dict[str, Callable], fault_log) -> None:
    """Negative control: the examples that the property is tested with find each of these bugs."""

    @hypothesis.settings(bounded, phases=[Phase.generate], derandomize=True, database=None, report_multiple_bugs=False)
    @given(shape=shapes)
    def lives(shape: Shape) -> None:
        try:
            live(shape, "reference", **wrong)
        except (ValueError, IndexError) as error:
            # The op's own checks count as found.
            raise AssertionError(str(error)) from error

    with pytest.raises(AssertionError):
        lives()
    fault_log("a wrong packing or committing op (negative control)", "found by the model in lists")


TARGET = GaussianTarget()


@bounded
@given(slots=st.integers(1, 5), spare=st.integers(0, 12), count=st.integers(1, 40), seed=st.integers(0, 2**31))
def test_pool_hands_out_every_image_once(slots: int, spare: int, count: int, seed: int) -> None:
    """The pool's rows under random lives, against the list of images that have not entered yet."""
    slots = min(slots, count)
    dice = random.Random(seed)
    labels = torch.tensor([dice.randrange(3) for _ in range(count)])
    job = make_job("sample", TARGET, labels, Options(schedule=DDPMSchedule(2), draft_length=1, seed=seed))
    noise = job.initial_states(torch.arange(count)).flatten(1).tolist()
    pool = ImagePool(job, slots, 2 * slots + spare)
    waiting, finished = list(range(slots, count)), []
    rows, held = list(range(slots)), list(range(slots))
    while max(rows) >= 0:
        for slot in range(slots):
            if rows[slot] < 0:
                continue
            row, image = rows[slot], held[slot]
            assert (pool.images[row], int(pool.indices[row]), int(pool.labels[row])) == (image, image, labels[image])
            if dice.random() < 0.6:
                continue
            finished.append(image)
            rows[slot], queue = -1, int(pool.queue)
            if queue < pool.rows:
                rows[slot], held[slot] = queue, waiting.pop(0)
                assert pool.samples[queue].flatten().tolist() == noise[held[slot]]
                pool.queue += 1
        if max(rows) >= 0:
            moved = pool.advance(rows)
            rows = rows if moved is None else moved
    assert sorted(finished) == list(range(count))
    assert not waiting


class Counting(GaussianTarget):
    """Counts the network rows that it is asked for."""

    rows = calls = 0

    def features(self, x, t, y):
        self.rows, self.calls = self.rows + len(x), self.calls + 1
        return super().features(x, t, y)


@hypothesis.settings(bounded, max_examples=25)
@given(
    count=st.integers(1, 9),
    slots=st.integers(1, 6),
    num_steps=st.integers(1, 8),
    length=st.integers(1, 8),
    bias=st.sampled_from([0.0, 0.3, 2.0]),
    guidance=st.sampled_from([1.0, 3.0]),
    learned=st.booleans(),
    verification=st.sampled_from(["token", "block"]),
    one_by_one=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_the_sampler_counts_every_step_once(
    count, slots, num_steps, length, bias, guidance, learned, verification, one_by_one, seed
) -> None:
    """From what a callback and the network see, every figure of the stats, for any drafter and any settings."""
    target, seen = Counting(learns_variance=learned), []
    settings = {
        "schedule": DDPMSchedule(num_steps),
        "drafter": BiasedDrafter(GaussianTarget(), eps_bias=bias),
        "draft_length": min(length, num_steps),
        "guidance_scale": guidance,
        "verification": verification,
        "max_slots": slots,
        "seed": seed,
        "callback": seen.append,
    }
    labels = torch.arange(count) % 3
    if one_by_one:
        images = sample_iter(target, labels, **settings)
        assert sorted(index for index, _ in images) == list(range(count))
        stats = images.stats
    else:
        result = sample(target, labels, **settings)
        assert result.samples.isfinite().all()
        stats = result.stats
    at, rounds, rows, entered, done = {}, [0] * count, 0, [], 0
    for number, info in enumerate(seen, 1):
        assert info.round == number
        assert len(info.images) == len(set(info.images)) == min(slots, count - done)
        for image, step in zip(info.images, info.steps, strict=True):
            if image not in at:
                entered.append(image)
            before = at.get(image, 0)
            offered = 1 if before == 0 else min(settings["draft_length"], num_steps - before)
            assert 1 <= step - before <= offered
            at[image], rows = step, rows + offered
            rounds[image] += 1
            done += step == num_steps
        assert info.images_done == done
    assert at == dict.fromkeys(range(count), num_steps)
    assert entered == list(range(count))
    assert stats.rounds_per_image.tolist() == rounds
    assert (stats.target_calls, stats.target_rows) == (len(seen), rows)
    assert (target.calls, target.rows) == (len(seen), rows * (1 if guidance == 1.0 else 2))
    # A round of an image commits its accepted drafts and one step more.
    assert int(stats.accepted_by_step.sum()) == count * num_steps - sum(rounds)
    assert (stats.accepted_by_step <= stats.tested_by_step).all()
