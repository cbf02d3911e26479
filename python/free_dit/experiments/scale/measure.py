"""Measures the inputs of the prediction: times of calls, drafts and the rest of a round, acceptance, the link."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from free_dit.experiments.analysis import RoundRecorder, TimelineRound
from free_dit.experiments.network_calls import NetworkCalls, timed_in_turn
from free_dit.experiments.scale.prediction import Inputs
from free_dit.experiments.wall_clock import machine
from free_dit.networks.families import device_of
from free_kernels import DDPMSchedule, FrozenDrafter, ancestral_sample, sample
from free_kernels.protocols import Drafter, DrafterDefaults, Target, first_drafted_in_rounds

ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
DRAFT_ROWS = (1, 2, 4, 8, 16, 32)
# Slots and draft lengths whose rounds are timed without networks.
ROUND_CASES = ((1, 2), (1, 8), (16, 2), (16, 8))
STEP_CASES = (1, 16)
# Parts of the chain, and the weight of their mean acceptance in that of each look-ahead, in tests.
BINS, PRIOR_TESTS = 25, 5.0


class HollowTarget:
    """A target of another's shapes that computes nothing: its runs take the time of a round without the networks.

    Args:
        target: gives shapes and device.
        rows: the most network rows of a call.
    """

    def __init__(self, target: Target, rows: int) -> None:
        self.latent_shape, self.feature_shape = target.latent_shape, target.feature_shape
        self.num_classes, self.learns_variance = target.num_classes, target.learns_variance
        channels, *sides = target.latent_shape
        self.device = device_of(target)
        dtype = getattr(target, "dtype", torch.float32)
        self._features = torch.zeros(rows, *target.feature_shape, device=self.device, dtype=dtype)
        outputs = (1 + target.learns_variance) * channels
        self._outputs = torch.zeros(rows, outputs, *sides, device=self.device, dtype=dtype)

    def features(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Zeros."""
        return self._features[: len(x)]

    def head(self, h: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Zeros."""
        return self._outputs[: len(h)]


def _round_times(run: Callable[..., object]) -> float:
    """Median seconds between two rounds of a run that takes a callback."""
    at: list[float] = []
    run(callback=lambda _: at.append(time.perf_counter()))
    return float(np.median(np.diff(at)[1:]))


def rest_of_rounds(target: Target, guidance: float, turns: int) -> dict[str, float]:
    """Seconds of a round and of an ordinary step beyond the networks' own, by their parts."""
    from scipy.optimize import nnls

    branches = 1 if guidance == 1.0 else 2
    hollow = HollowTarget(target, branches * max(slots * length for slots, length in ROUND_CASES))

    def labels(slots: int) -> Tensor:
        return torch.zeros(slots, dtype=torch.int64, device=hollow.device)

    found: dict[Any, list[float]] = {}
    for _ in range(turns):
        for slots, length in ROUND_CASES:
            settings = {"schedule": DDPMSchedule(16 * length + 1), "guidance_scale": guidance}
            settings |= {"drafter": FrozenDrafter(), "draft_length": length}
            run = lambda callback, s=slots, kw=settings: sample(hollow, labels(s), callback=callback, **kw)  # noqa: E731
            found.setdefault((slots, length), []).append(_round_times(run))
        for slots in STEP_CASES:
            settings = {"schedule": DDPMSchedule(32), "guidance_scale": guidance}
            run = lambda callback, s=slots, kw=settings: ancestral_sample(hollow, labels(s), callback=callback, **kw)  # noqa: E731
            found.setdefault(slots, []).append(_round_times(run))

    def fit(features: list[tuple[int, ...]], cases: tuple[Any, ...]) -> list[float]:
        seconds = np.array([np.median(found[case]) for case in cases])
        return nnls(np.array(features) / seconds[:, None], np.ones(len(cases)))[0].tolist()

    rounds = fit([(1, slots * length, length - 1) for slots, length in ROUND_CASES], ROUND_CASES)
    steps = fit([(1, slots) for slots in STEP_CASES], STEP_CASES)
    return dict(
        zip(("round_base", "round_row", "round_draft", "step_base", "step_row"), (*rounds, *steps), strict=True)
    )


class AcceptanceCounts(RoundRecorder):
    """Counts the drafts of a ``sample`` run by step and look-ahead."""

    @property
    def tested(self) -> np.ndarray:
        """Drafts that reached the test, int64 ``[K, L - 1]``."""
        return self._count(lambda one: one.accepted + one.refused)

    @property
    def accepted(self) -> np.ndarray:
        """Drafts that were accepted, int64 ``[K, L - 1]``."""
        return self._count(lambda one: one.accepted)

    def _count(self, drafts: Callable[[TimelineRound], int]) -> np.ndarray:
        counts = np.zeros((self.num_steps, self.length - 1), np.int64)
        for one in itertools.chain.from_iterable(self.images.values()):
            ahead = np.arange(drafts(one))
            counts[one.first_step + ahead, ahead] += 1
        return counts

    def table(self) -> np.ndarray:
        """Acceptance ``[bins, L - 1]``; the fewer tests, the nearer to the mean of its part of the chain."""
        bins = np.arange(self.num_steps) * min(BINS, self.num_steps) // self.num_steps
        tested, accepted = (np.zeros((bins[-1] + 1, self.length - 1)) for _ in range(2))
        np.add.at(tested, bins, self.tested)
        np.add.at(accepted, bins, self.accepted)
        overall = accepted.sum() / max(tested.sum(), 1)
        mean = (accepted.sum(1, keepdims=True) + PRIOR_TESTS * overall) / (tested.sum(1, keepdims=True) + PRIOR_TESTS)
        return (accepted + PRIOR_TESTS * mean) / (tested + PRIOR_TESTS)


def measure_acceptance(
    target: Target, drafter: Drafter, num_steps: int, guidance: float, images: int, length: int, seed: int
) -> np.ndarray:
    """Acceptance ``[bins, L - 1]`` by step and look-ahead in a run of its own."""
    length = min(length, num_steps)
    counts = AcceptanceCounts(num_steps, length, first_drafted_in_rounds(drafter))
    labels = torch.arange(images, device=device_of(target)) % target.num_classes
    settings = {"schedule": DDPMSchedule(num_steps), "guidance_scale": guidance, "seed": seed}
    sample(target, labels, drafter=drafter, draft_length=length, callback=counts, **settings)
    return counts.table()


def measure_link(model: str, device: torch.device, facts: dict[str, Any] | None = None) -> dict[str, Any]:
    """:func:`free_dit.experiments.scale.link.link_cost_and_slowdown` of two processes started for it.

    ``facts`` are further arguments of :func:`free_dit.loading.load_target`.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "link.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command += ["-m", "free_dit.experiments.scale.link", str(out), model, device.type, json.dumps(facts or {})]
        threads = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(command, env=os.environ | threads, capture_output=True, text=True, check=False)
        if done.returncode:
            raise OSError(f"scale_model: two processes must be able to talk, got {done.stderr.strip()[-400:]}")
        return json.loads(out.read_text())


@torch.no_grad()
def measure(
    target: Target,
    drafter: Drafter,
    link: dict[str, Any],
    *,
    model: str = "digits",
    num_steps: int = 250,
    guidance: float = 1.0,
    turns: int = 40,
    images: int = 64,
    length: int = 12,
    seed: int = 1,
) -> tuple[Inputs, dict[str, Any]]:
    """Everything that the model is told about a pair on this machine, and details for the reader.

    Args:
        target: on its device.
        drafter: on the same one.
        link: of :func:`measure_link`.
        model: name, for the record.
        num_steps: K.
        guidance: 1 is none.
        turns: timings of each call.
        images: of the run that tells acceptance.
        length: its draft length.
        seed: its seed.
    """
    device = device_of(target)
    calls = {("target", rows): NetworkCalls(target, rows).target for rows in ROWS}
    calls |= {("draft", rows): NetworkCalls(target, rows).drafting(drafter) for rows in DRAFT_ROWS}
    seconds = timed_in_turn(calls, turns, device)
    rest = rest_of_rounds(target, guidance, max(1, turns // 10))
    acceptance = measure_acceptance(target, drafter, num_steps, guidance, images, length, seed)
    hollow = HollowTarget(target, 1)
    facts = machine()
    place = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{facts['cpu']}, {facts['threads']} thread"
    )
    called = 1 - DrafterDefaults.read(drafter, "frozen_share")
    inputs = Inputs(
        origin=f"measured: {model}, {num_steps} steps, guidance {guidance:g}, on {place}, torch {facts['torch']}",
        measured=True,
        num_steps=num_steps,
        branches=1 if guidance == 1.0 else 2,
        target=tuple((rows, seconds["target", rows]) for rows in ROWS),
        draft=tuple((rows, called * seconds["draft", rows]) for rows in DRAFT_ROWS),
        **rest,
        state_bytes=4 * int(np.prod(target.latent_shape)),
        output_bytes=hollow.head(hollow._features, None, None).nbytes,  # type: ignore[arg-type]
        feature_bytes=hollow._features.nbytes,
        link_latency=link["link_latency"],
        link_bandwidth=link["link_bandwidth"],
        slowdown=link["slowdown"],
        acceptance=tuple(map(tuple, acceptance.round(5).tolist())),
        first_step=first_drafted_in_rounds(drafter) == 0,
    )
    return inputs, {"machine": facts, "turns": turns, "images": images, "draft_length": length, "link": link}
