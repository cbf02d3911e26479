"""Measurements of a DiT's feature dynamics and of speculative runs: plain numbers, no drawing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from free_dit.generation import ChainSettings, sampler_for
from free_kernels import FrozenDrafter, Schedule, ancestral_sample, sample
from free_kernels.constants import TransitionColumn
from free_kernels.ops.coupling import couple
from free_kernels.protocols import Drafter, Target, TargetDefaults, first_drafted_in_rounds
from free_kernels.results import RoundInfo, SampleStats
from free_kernels.validation import check_float, check_int, fail


@dataclass(frozen=True)
class Subject:
    """A model under analysis: its name, the target, and its learned drafter where it has one."""

    name: str
    target: Target
    drafter: Drafter | None = None

    @property
    def drafters(self) -> dict[str, Drafter | str]:
        """Drafters by kind."""
        return {"frozen": "frozen"} | ({} if self.drafter is None else {"learned": self.drafter})

    @property
    def title(self) -> str:
        """Name with parameter count."""
        count = sum(p.numel() for p in self.target.module.parameters())  # type: ignore[attr-defined]
        return f"{self.name}, {count / 1e6:.3g} M parameters"


@dataclass(frozen=True)
class Settings:
    """How the quantities of the figures are measured.

    Attributes:
        num: images of every run.
        steps: K.
        draft_length: rows of a round for one image.
        guidance: scales of the uncertainty figure.
        seed: seed of all noise.
        part: share of the chain called early, and as much called late.
        window: steps that the curves of the uncertainty figure are pooled over.
        shown: images of the timeline, at most ``num``.
        gap: distance of the means in the coupling's illustration.
        draws: its draws.
    """

    num: int = 12
    steps: int = 250
    draft_length: int = 6
    guidance: tuple[float, ...] = (1.0, 2.0, 4.0)
    seed: int = 0
    part: float = 0.2
    window: int = 9
    shown: int = 2
    gap: float = 1.5
    draws: int = 50_000


@dataclass(frozen=True)
class FeatureDynamics:
    """How the features of a DiT with B blocks change over a chain of K steps; means over images.

    Attributes:
        similarity: ``[B, K - 1]``, cosine similarity of each block's output ``[T, D]`` at steps k and k + 1.
        output_similarity: ``[K - 1]``, the same of the predicted noise ``[C, H, W]``.
        change: ``[B, K]``, ``||out - in||`` of each block at step k.
        relative_change: ``[B, K]``, ``||out - in|| / ||in||``.
    """

    similarity: np.ndarray
    output_similarity: np.ndarray
    change: np.ndarray
    relative_change: np.ndarray


class _Recorder:
    """A target that measures its blocks while a sampler drives it; keeps the features of one step only.

    It has no ``hoisted``: hoisted copies do not call the blocks' forward, and so not their hooks.

    Args:
        target: with the blocks in ``target.module.blocks``.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        for name in ("latent_shape", "feature_shape", "num_classes", "learns_variance", "device"):
            if hasattr(target, name):
                setattr(self, name, getattr(target, name))
        self._previous: dict[int | str, Tensor] = {}
        self.similarity: dict[int | str, list[float]] = defaultdict(list)
        self.change: dict[int, list[float]] = defaultdict(list)
        self.relative_change: dict[int, list[float]] = defaultdict(list)

    def features(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        blocks = self.target.module.blocks  # type: ignore[attr-defined]
        handles = [block.register_forward_hook(partial(self._see_block, i)) for i, block in enumerate(blocks)]
        try:
            return self.target.features(x, t, y)
        finally:
            for handle in handles:
                handle.remove()

    def head(self, h: Tensor, t: Tensor, y: Tensor) -> Tensor:
        output = self.target.head(h, t, y)
        # A learned variance is in the channels behind the predicted noise.
        self._compare("output", output[:, : self.latent_shape[0]])
        return output

    def _see_block(self, block: int, _module: object, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        before, after = inputs[0].flatten(1).double(), output.flatten(1).double()
        change = (after - before).norm(dim=1)
        self.change[block].append(float(change.mean()))
        self.relative_change[block].append(float((change / before.norm(dim=1)).mean()))
        self._compare(block, output)

    def _compare(self, name: int | str, value: Tensor) -> None:
        if name in self._previous:
            pair = (rows.flatten(1).double() for rows in (self._previous[name], value))
            self.similarity[name].append(float(torch.cosine_similarity(*pair).mean()))
        self._previous[name] = value.clone()


def feature_dynamics(
    target: Target, schedule: Schedule, labels: Tensor, seed: int, progress: bool = False
) -> FeatureDynamics:
    """Watch every block through forward hooks while the ordinary sampler, unguided, draws images of ``labels [N]``.

    Raises:
        TypeError: the target has no ``module.blocks``.
        ValueError: a chain of fewer than two steps, or what :func:`free_kernels.ancestral_sample` refuses.
    """
    if not hasattr(getattr(target, "module", None), "blocks"):
        fail("feature_dynamics", "target", "an adapter of a DiT, with module.blocks", type(target).__name__, TypeError)
    check_int("feature_dynamics", "num_steps", schedule.num_steps, 2)
    recorder = _Recorder(target)
    ancestral_sample(recorder, labels, schedule=schedule, seed=seed, progress=progress)
    blocks = sorted(recorder.change)

    def table(columns: dict[Any, list[float]]) -> np.ndarray:
        return np.array([columns[block] for block in blocks])

    return FeatureDynamics(
        table(recorder.similarity),
        np.array(recorder.similarity["output"]),
        table(recorder.change),
        table(recorder.relative_change),
    )


def parts_of_chain(num_steps: int, share: float) -> tuple[slice, slice]:
    """The first and the last ``share`` of K steps, at least one step each."""
    count = max(1, int(num_steps * share))
    return slice(0, count), slice(num_steps - count, num_steps)


def uncertainty_runs(subjects: Sequence[Subject], labels: Sequence[Tensor], settings: Settings) -> list[dict[str, Any]]:
    """Runs of :func:`free_kernels.sample` on each subject's labels ``[N]``, for every guidance scale and drafter.

    Returns:
        Of each run ``model``, ``drafter`` ("frozen" or "learned"), ``guidance_scale``, ``call_reduction``, the drafts
        that were ``tested`` and ``accepted`` (int64 ``[K]``), and their ``uncertainty`` (``[K]``): the mean over tested
        drafts of the squared whitened deviation between drafted and reference outputs, summed over the elements of the
        latent; NaN where no draft was tested.

    Raises:
        ValueError: no run is left.
    """
    jobs = [
        (subject, chosen, kind, scale)
        for subject, chosen in zip(subjects, labels, strict=True)
        for scale in dict.fromkeys(settings.guidance)
        for kind in subject.drafters
        # A target without a null label cannot be guided: it has no curve in the other panels.
        if scale == 1.0 or TargetDefaults.read(subject.target, "has_null_label")
    ]
    if not jobs:
        fail("figures", "guidance", "some scales, 1 for a target trained without label dropout", settings.guidance)
    runs = []
    with tqdm(jobs, desc="uncertainty", unit="run") as bar:
        for subject, chosen, kind, scale in bar:
            bar.set_postfix_str(f"{subject.name}, {kind}, guidance {scale:g}")
            chain = ChainSettings(settings.steps, settings.draft_length, scale)
            draw = sampler_for(subject.target, subject.drafters[kind], chain)
            stats = draw(chosen, seed=settings.seed).stats
            runs.append(
                {
                    "model": subject.name,
                    "drafter": kind,
                    "guidance_scale": scale,
                    "uncertainty": stats.uncertainty_by_step,
                    "tested": stats.tested_by_step,
                    "accepted": stats.accepted_by_step,
                    "call_reduction": stats.call_reduction,
                }
            )
    return runs


def pooled_mean(values: np.ndarray, weights: np.ndarray, width: int) -> np.ndarray:
    """Weighted mean of ``values [K]`` over windows of ``width`` (odd) steps around each step, ``[K]``.

    NaN before the first and after the last step with a weight, and where a whole window has none. Values without weight
    may be NaN. Windows are cut off at the ends.

    Raises:
        ValueError: the width is even or not positive.
    """
    if width < 1 or width % 2 == 0:
        fail("pooled_mean", "width", "odd and positive", width)
    window = np.ones(width)
    # "full" and a cut, because "same" has the length of the window where the window is longer.
    ends = slice(width // 2, width // 2 + len(values))
    total, weight = (
        np.convolve(part, window, mode="full")[ends]
        for part in (np.where(weights > 0, values, 0.0) * weights, weights.astype(float))
    )
    known = np.flatnonzero(weights)
    inside = np.zeros(len(values), bool)
    if len(known):
        inside[known[0] : known[-1] + 1] = True
    return np.divide(total, weight, out=np.full(len(values), np.nan), where=inside & (weight > 0))


@dataclass(frozen=True)
class CouplingDraws:
    """Draws of the one-dimensional coupling of a draft N(0, 1) with a target N(gap, 1).

    Attributes:
        gap: distance of the means, in standard deviations.
        drafts: float32 ``[M]``, draws of the draft's law p.
        committed: float32 ``[M]``, the states committed in their place; their law is the target's, q.
        accepted: bool ``[M]``, where the draft itself was committed; elsewhere it was reflected.
        expected_acceptance: ``2 Phi(-gap / 2)``, the mass under min(p, q).
    """

    gap: float
    drafts: np.ndarray
    committed: np.ndarray
    accepted: np.ndarray
    expected_acceptance: float


def coupling_draws(gap: float, count: int, seed: int, backend: str = "auto") -> CouplingDraws:
    """``count`` independent draws through :func:`free_kernels.ops.couple`, one drafted row each, latent [1, 1, 1]."""
    check_float("coupling_draws", "gap", gap, 0.0)
    check_int("coupling_draws", "count", count, 1)
    generator = torch.Generator().manual_seed(seed)
    # The second row of a slot has no draft: its step is drawn if the draft before it was accepted.
    noise = torch.randn(count, 2, 1, 1, 1, generator=generator)
    uniform = 1 - torch.rand(count, 2, generator=generator)
    columns = torch.zeros(count, 2, len(TransitionColumn))
    # The mean of the next state is the network's output, its standard deviation is 1.
    columns[..., TransitionColumn.MEAN_FROM_OUTPUT] = 1.0
    mean, std = torch.zeros(count, 1, 1, 1, 1), torch.ones(count, 1, 1, 1, 1)
    drafts = torch.addcmul(mean, std, noise[:, :1])
    outcome = couple(
        torch.cat([torch.zeros_like(drafts), drafts], dim=1),
        mean,
        std,
        noise,
        None,
        uniform,
        torch.full((2 * count, 1, 1, 1), float(gap)),
        2 * torch.arange(count + 1),
        columns,
        backend=backend,
    )
    accepted = outcome.committed == 2
    committed = torch.where(accepted, drafts.flatten(), outcome.next_states.flatten())
    expected = 2 * torch.special.ndtr(torch.tensor(-gap / 2, dtype=torch.float64))
    return CouplingDraws(gap, drafts.flatten().numpy(), committed.numpy(), accepted.numpy(), float(expected))


@dataclass(frozen=True)
class TimelineRound:
    """One round of one image.

    Attributes:
        round: rounds of the run before it.
        first_step: step of its first row.
        rows: its rows; all but the last carry a draft.
        committed: rows that became final, in ``[1, rows]``.
    """

    round: int
    first_step: int
    rows: int
    committed: int

    @property
    def accepted(self) -> int:
        """Drafts kept."""
        return self.committed - 1

    @property
    def refused(self) -> int:
        """1 if the last committed row replaced a refused draft (reflected, or drawn anew without slack), else 0."""
        return int(self.committed < self.rows)

    @property
    def discarded(self) -> int:
        """Drafts behind the refused one, which were not tested."""
        return self.rows - 1 - self.accepted - self.refused


class RoundRecorder:
    """Callback of a ``sample`` run with an integer draft length that keeps every round of every image.

    The callback is told the step of every image after every round; the committed rows are the differences. The rows of
    a round follow from the sampler's rule: ``min(L, K - k)``, but one at a step 0 that is not drafted.

    Args:
        num_steps: K.
        length: L.
        first: first step that is drafted, 0 or 1.

    Attributes:
        images: by image index, its rounds in order.
    """

    def __init__(self, num_steps: int, length: int, first: int = 1) -> None:
        self.num_steps, self.length, self.first = num_steps, length, first
        self.images: dict[int, list[TimelineRound]] = defaultdict(list)

    def __call__(self, info: RoundInfo) -> None:
        """Take in a round."""
        for image, step in zip(info.images, info.steps, strict=True):
            rounds = self.images[image]
            begin = rounds[-1].first_step + rounds[-1].committed if rounds else 0
            rows = 1 if begin < self.first else min(self.length, self.num_steps - begin)
            rounds.append(TimelineRound(info.round - 1, begin, rows, step - begin))


@dataclass(frozen=True)
class Timeline:
    """Every round of every image of a run.

    Attributes:
        num_steps: K.
        images: by image index, its rounds in order.
        stats: what the sampler itself counted.
    """

    num_steps: int
    images: list[list[TimelineRound]]
    stats: SampleStats


def timeline(
    target: Target,
    schedule: Schedule,
    labels: Tensor,
    drafter: Drafter | str,
    draft_length: int,
    seed: int,
    progress: bool = False,
) -> Timeline:
    """Follow a lossless run of :func:`free_kernels.sample`, unguided, round by round."""
    first = first_drafted_in_rounds(FrozenDrafter() if drafter == "frozen" else drafter)
    recorder = RoundRecorder(schedule.num_steps, draft_length, first)
    settings = {"schedule": schedule, "drafter": drafter, "draft_length": draft_length, "seed": seed}
    stats = sample(target, labels, progress=progress, callback=recorder, **settings).stats
    return Timeline(schedule.num_steps, [recorder.images[image] for image in range(len(labels))], stats)
