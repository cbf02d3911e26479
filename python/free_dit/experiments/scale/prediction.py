"""Predicted latency and throughput of speculative sampling on many GPUs, from what one call, draft and message cost.

The formulas are in ``docs/scale-model.md``. G GPUs are a mesh of D groups of V: images are split over the groups, the
rows of a group's packed calls over its GPUs. Pure arithmetic on :class:`Inputs`; nothing is timed here.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from free_dit.experiments.scale.chain import CommitChain, acceptance_table
from free_kernels.validation import check_float, check_int, fail

GPUS = (1, 2, 4, 8, 16, 32, 64)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
LENGTHS = (2, 3, 4, 6, 8, 12, 16)


@dataclass(frozen=True)
class Inputs:
    """The inputs of the model. Times in seconds; rows are network rows, of which guidance makes two of each row.

    Attributes:
        origin: where the values come from.
        measured: whether they were measured; if not, the predictions are a what-if.
        num_steps: K.
        branches: network rows of a row, 2 with guidance.
        target: ``[[rows, seconds], ...]`` of a target call with its head; linear between, and beyond with the last
            slope.
        draft: the same for one pass of drafter and head, on average over the chain: in the first part, which a drafter
            may leave to clean samples, a pass takes nothing.
        round_base, round_row, round_draft: rest of a round (noise, packing, coupling, commit): for itself, for each
            row, for each drafting pass.
        step_base, step_row: rest of an ordinary step: for itself, for each image.
        state_bytes, output_bytes, feature_bytes: of one network row.
        link_latency: of a message between two GPUs.
        link_bandwidth: bytes per second between two GPUs.
        slowdown: factor on everything that runs while other GPUs (processes) of the same machine are busy.
        acceptance: ``[bins, A]`` by part of the chain and look-ahead.
        first_step: whether drafts begin at the first step already; false where a file does not say.
    """

    origin: str
    measured: bool
    num_steps: int
    branches: int
    target: tuple[tuple[float, float], ...]
    draft: tuple[tuple[float, float], ...]
    round_base: float
    round_row: float
    round_draft: float
    step_base: float
    step_row: float
    state_bytes: int
    output_bytes: int
    feature_bytes: int
    link_latency: float
    link_bandwidth: float
    slowdown: float
    acceptance: tuple[tuple[float, ...], ...]
    first_step: bool = False

    def __post_init__(self) -> None:
        where = "scale_model"
        check_int(where, "num_steps", self.num_steps, 1)
        check_int(where, "branches", self.branches, 1, 2)
        for name in ("target", "draft"):
            points = np.asarray(getattr(self, name), np.float64)
            sound = points.ndim == 2 and points.shape[1:] == (2,) and np.isfinite(points).all() and (points >= 0).all()
            if not sound or (np.diff(points[:, 0]) <= 0).any():
                fail(where, name, "[[rows, seconds], ...] with ascending rows", str(getattr(self, name)))
        for name in ("round_base", "round_row", "round_draft", "step_base", "step_row", "link_latency"):
            check_float(where, name, getattr(self, name), 0.0)
        for name in ("state_bytes", "output_bytes", "feature_bytes"):
            check_int(where, name, getattr(self, name), 0)
        check_float(where, "slowdown", self.slowdown, 1.0)
        if not self.link_bandwidth >= 0:
            fail(where, "link_bandwidth", "a number in [0, inf]", self.link_bandwidth)
        acceptance_table(np.asarray(self.acceptance), self.num_steps)
        if not isinstance(self.first_step, bool):
            fail(where, "first_step", "true or false", repr(self.first_step), TypeError)

    def chain(self, length: int) -> CommitChain:
        """Rounds of a trajectory under a draft length."""
        return CommitChain(acceptance_table(np.asarray(self.acceptance), self.num_steps), length, self.first_step)


def read_inputs(path: Path) -> tuple[Inputs, dict[str, Any]]:
    """Inputs from a JSON or TOML file, and the ``details`` that came with them.

    Raises:
        FileNotFoundError: no such file.
        ValueError, TypeError: not JSON or TOML, or not the keys of :class:`Inputs`, or wrong values.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"read_inputs: measurements must be an existing JSON or TOML file, got {path}")
    try:
        text = path.read_text()
        values = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except ValueError as error:
        raise ValueError(f"read_inputs: {path} must be JSON or TOML, got {error}") from error
    details = values.pop("details", {}) if isinstance(values, dict) else {}
    wanted = {field.name for field in fields(Inputs)}
    if isinstance(values, dict):
        values.setdefault("first_step", False)
    if not isinstance(values, dict) or values.keys() != wanted:
        found = sorted(values.keys() ^ wanted) if isinstance(values, dict) else type(values).__name__
        raise ValueError(f"read_inputs: {path} must have the keys {sorted(wanted)}, got a difference in {found}")
    for name in ("target", "draft", "acceptance"):
        if isinstance(values[name], list) and all(isinstance(row, list) for row in values[name]):
            values[name] = tuple(map(tuple, values[name]))
    return Inputs(**values), details


def write_inputs(path: Path, inputs: Inputs, details: dict[str, Any]) -> None:
    """The file that :func:`read_inputs` reads."""
    path.write_text(json.dumps(asdict(inputs) | {"details": details}, indent=1) + "\n")


def _seconds(points: tuple[tuple[float, float], ...], rows: np.ndarray) -> np.ndarray:
    """Seconds at row counts: linear between the points, the first one below them, the last slope beyond them."""
    known, seconds = np.asarray(points, np.float64).T
    beyond = 0.0 if len(known) < 2 else (seconds[-1] - seconds[-2]) / (known[-1] - known[-2])
    return np.interp(rows, known, seconds) + beyond * np.maximum(rows - known[-1], 0.0)


def call_seconds(inputs: Inputs, rows: np.ndarray, verify: int = 1, slowdown: float = 1.0) -> np.ndarray:
    """A target call of so many network rows (on average; above 0), shared by ``verify`` GPUs."""
    rows = np.asarray(rows, np.float64)
    if verify == 1:
        return slowdown * _seconds(inputs.target, rows)
    # As in free_kernels.distributed.verify_parallel, where the leader has one of the smallest shares, at least a row.
    share = np.ceil(rows / verify - 1e-9)
    own = np.maximum(np.floor(rows / verify + 1e-9), 1.0)
    away = np.maximum(rows - own, 0.0)
    peers = np.minimum(verify - 1, np.ceil(away - 1e-9))

    def link(messages: float, size: int) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            moving = np.where(away * size > 0, away * size / inputs.link_bandwidth, 0.0)
        return messages * peers * inputs.link_latency + moving

    order = np.ceil(np.log2(verify)) * inputs.link_latency
    there = link(2, inputs.state_bytes + 16) + slowdown * _seconds(inputs.target, np.maximum(share, 1.0))
    answered = np.where(away > 0, there + link(2, inputs.output_bytes), 0.0)
    call = np.maximum(slowdown * _seconds(inputs.target, own), answered)
    return order + call + link(1, inputs.feature_bytes)


class Layout(NamedTuple):
    """D groups of V GPUs."""

    data: int
    verify: int

    @property
    def kind(self) -> str:
        """``single``, ``data``, ``verify`` or ``mixed``."""
        if self == (1, 1):
            return "single"
        return "data" if self.verify == 1 else "verify" if self.data == 1 else "mixed"


def layouts(gpus: int) -> Iterator[Layout]:
    """All meshes of so many GPUs."""
    return (Layout(gpus // verify, verify) for verify in range(1, gpus + 1) if gpus % verify == 0)


def _round_seconds(inputs: Inputs, layout: Layout, slots: int, more: np.ndarray) -> np.ndarray:
    """Expected seconds ``[R]`` of a group's rounds whose slots have more than j rows with ``more [R, L]``.

    A call without rows costs nothing; the rows of a call are their expectation given that there are any.
    """
    shared, beside = (inputs.slowdown if x > 1 else 1.0 for x in (layout.data * layout.verify, layout.data))
    more = more.clip(0.0, 1.0)
    taken = 1 - (1 - more) ** slots
    likely = np.maximum(taken, 1e-12)
    count = np.maximum(slots * more / likely, 1.0)
    rows = np.maximum(slots * more.sum(1) / likely[:, 0], 1.0)
    call = call_seconds(inputs, inputs.branches * rows, layout.verify, shared)
    rest = beside * (inputs.round_base + inputs.round_row * rows)
    passes = beside * (_seconds(inputs.draft, inputs.branches * count[:, 1:]) + inputs.round_draft)
    return call + rest + (taken[:, 1:] * passes).sum(1) / likely[:, 0]


@dataclass(frozen=True)
class Prediction:
    """One way to sample a batch.

    Attributes:
        gpus: G.
        batch: images in the making at a time, over all groups.
        data: D.
        verify: V.
        length: L; 1 is the ordinary chain.
        latency_s: until the last image of a batch is finished, all of them begun together.
        images_per_s: while finished images make room for waiting ones.
        call_reduction: steps committed per round.
    """

    gpus: int
    batch: int
    data: int
    verify: int
    length: int
    latency_s: float
    images_per_s: float
    call_reduction: float


def predict(inputs: Inputs, layout: Layout, batch: int, chain: CommitChain) -> Prediction:
    """A batch on a mesh; groups without an image are idle, and the batch ends with the group that has most images."""
    groups = min(layout.data, batch)
    slots, used = -(-batch // groups), Layout(groups, layout.verify)
    gpus, length, num_steps = layout.data * layout.verify, chain.length, chain.num_steps
    if length == 1:
        shared, beside = (inputs.slowdown if x > 1 else 1.0 for x in (groups * layout.verify, groups))
        step = float(call_seconds(inputs, np.array(inputs.branches * slots), layout.verify, shared))
        latency = num_steps * (step + beside * (inputs.step_base + inputs.step_row * slots))
        return Prediction(gpus, batch, *layout, 1, latency, batch / latency, 1.0)
    running = 1 - (1 - chain.profile[:, 0]) ** batch
    rounds = running > 1e-9
    latency = float(running[rounds] @ _round_seconds(inputs, used, slots, chain.profile[rounds]))
    busy = float(_round_seconds(inputs, used, slots, chain.drafting[None])[0])
    return Prediction(gpus, batch, *layout, length, latency, batch / (chain.rounds * busy), chain.call_reduction)


def sweep(
    inputs: Inputs,
    gpus: Iterable[int] = GPUS,
    batches: Iterable[int] = BATCHES,
    lengths: Iterable[int] = LENGTHS,
) -> list[Prediction]:
    """Every mesh, batch and draft length, the ordinary chain (length 1) among them."""
    chains = [inputs.chain(length) for length in (1, *lengths) if length <= inputs.num_steps]
    batches = tuple(batches)
    return [
        predict(inputs, layout, batch, chain)
        for count in gpus
        for layout in layouts(check_int("scale_model", "gpus", count, 1))
        for batch in batches
        for chain in chains
    ]


@dataclass(frozen=True)
class Choice:
    """The best ways to sample a batch on so many GPUs, for a goal.

    Attributes:
        goal: ``"latency_s"`` or ``"images_per_s"``.
        speculative: the best prediction with drafts.
        ordinary: the best one without.
        speed_up: of the former over the latter.
        by_kind: speed-up over the same ``ordinary`` of the best speculative layout of each kind.
    """

    goal: str
    speculative: Prediction
    ordinary: Prediction
    speed_up: float
    by_kind: dict[str, float]


def _speed(prediction: Prediction, goal: str) -> float:
    return prediction.images_per_s if goal == "images_per_s" else 1 / prediction.latency_s


def choices(predictions: Iterable[Prediction], goal: str) -> list[Choice]:
    """The best ways for a goal, for each number of GPUs and batch, in their order."""
    grouped: dict[tuple[int, int], list[Prediction]] = {}
    for one in predictions:
        grouped.setdefault((one.gpus, one.batch), []).append(one)
    found = []
    for group in grouped.values():
        ordinary = max((one for one in group if one.length == 1), key=lambda one: _speed(one, goal))
        best: dict[str, Prediction] = {}
        for one in group:
            kind = Layout(one.data, one.verify).kind
            if one.length > 1 and (kind not in best or _speed(one, goal) > _speed(best[kind], goal)):
                best[kind] = one
        ratios = {kind: _speed(one, goal) / _speed(ordinary, goal) for kind, one in best.items()}
        winner = max(ratios, key=lambda kind: ratios[kind])
        found.append(Choice(goal, best[winner], ordinary, ratios[winner], ratios))
    return found


def crossover(batches: Iterable[int], speed_ups: Iterable[float]) -> int | None:
    """The batch from which on speculation no longer pays; None if it still does at the largest."""
    lost = None
    for batch, speed_up in sorted(zip(batches, speed_ups, strict=True), reverse=True):
        if speed_up > 1:
            break
        lost = batch
    return lost
