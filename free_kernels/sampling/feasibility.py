"""``feasibility``: whether lossless speculation will pay for a target, before anything is trained."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from free_kernels.conditions import Condition
from free_kernels.drafters import as_drafter
from free_kernels.protocols import Drafter, Schedule, first_drafted_in_rounds
from free_kernels.sampling.feasibility_costs import RowCosts, measure
from free_kernels.sampling.feasibility_probes import Observations, Places, probe, reach_places
from free_kernels.sampling.job import make_job
from free_kernels.sampling.options import Options
from free_kernels.sampling.target_call import TargetCall
from free_kernels.schedules import DDPMSchedule
from free_kernels.steering.acceptance_field import AcceptanceField
from free_kernels.steering.round_chain import CLASSES, RoundChain
from free_kernels.targets import as_target
from free_kernels.validation import check_float, check_int, fail

LENGTHS = (2, 3, 4, 6, 8, 12, 16, 24, 32)
_REPLICATES = 400
Interval = tuple[float, float]


@dataclass(frozen=True)
class LengthForecast:
    """Rounds of one draft length.

    Attributes:
        draft_length: L.
        steps_per_call: what ``stats.call_reduction`` will be.
        steps_interval: 95 % of a bootstrap over images and positions.
        steps_without_reuse: with ``reuse_refused=False``.
        speed_up: time of the ordinary chain over that of speculation, one image at a time.
        speed_interval: 95 %; measured times vary along.
    """

    draft_length: int
    steps_per_call: float
    steps_interval: Interval
    steps_without_reuse: float
    speed_up: float
    speed_interval: Interval


@dataclass(frozen=True)
class GapReading:
    """Drafts of one kind whose rounds began at one step.

    Attributes:
        step: where the rounds began.
        kind: ``"new"``, ``"seen once"`` or ``"seen again"``: how often the target was asked about the step before.
        drafts: how many.
        gap: median of delta.
        acceptance: mean of ``2 Phi(-delta / 2)``, each draft weighted by how likely its test is to be reached.
    """

    step: int
    kind: str
    drafts: int
    gap: float
    acceptance: float


@dataclass(frozen=True)
class DrafterForecast:
    """One drafter: ``lengths`` and ``gaps``, and the length with the largest speed-up, ``best``."""

    lengths: list[LengthForecast]
    gaps: list[GapReading]

    @property
    def best(self) -> LengthForecast:
        """The length with the largest speed-up."""
        return max(self.lengths, key=lambda forecast: forecast.speed_up)


@dataclass(frozen=True)
class Feasibility:
    """What :func:`feasibility` found.

    Attributes:
        num_steps: K.
        guidance_scale: as asked for.
        images: probed.
        positions: of the chain.
        rows: rows of target calls that the forecast took, without those that only timed (a row is two network rows
            with guidance).
        drafters: forecasts by ``"frozen"`` and, where a drafter was given, ``"learned"``.
        costs: given or measured.
    """

    num_steps: int
    guidance_scale: float
    images: int
    positions: int
    rows: int
    drafters: dict[str, DrafterForecast]
    costs: RowCosts

    @property
    def best(self) -> tuple[str, LengthForecast]:
        """Drafter and length with the largest speed-up."""
        name = max(self.drafters, key=lambda one: self.drafters[one].best.speed_up)
        return name, self.drafters[name].best

    @property
    def pays(self) -> bool:
        """Whether the best forecast is faster than the ordinary chain all over its interval."""
        return self.best[1].speed_interval[0] > 1.0

    @property
    def verdict(self) -> str:
        """One sentence that begins with yes or no."""
        name, best = self.best
        low, high = best.speed_interval
        sure = "yes" if self.pays else "no"
        why = "" if self.pays or high <= 1.0 else ", which may be none"
        return (
            f"{sure}: {name} drafts, draft length {best.draft_length}: {best.steps_per_call:.2f} steps a call, "
            f"{best.speed_up:.2f}x the ordinary chain's speed ({low:.2f} to {high:.2f}{why})"
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON; a gap that is not finite is None."""
        found = asdict(self)
        for forecast in found["drafters"].values():
            for reading in forecast["gaps"]:
                reading["gap"] = reading["gap"] if np.isfinite(reading["gap"]) else None
        return {"verdict": self.verdict, "pays": self.pays, **found}


def _checked_lengths(where: str, lengths: object, num_steps: int) -> list[int]:
    """Draft lengths, ascending, that fit into the chain."""
    if not isinstance(lengths, Iterable) or isinstance(lengths, str):
        fail(where, "draft_lengths", "ints of at least 2", lengths, TypeError)
    fitting = sorted({length for length in lengths if check_int(where, "draft_lengths", length, 2) < num_steps})
    if not fitting:
        fail(where, "draft_lengths", f"ints in [2, {num_steps - 1}], one at least", repr(lengths))
    return fitting


@torch.no_grad()
def feasibility(
    target: object,
    schedule: Schedule = DDPMSchedule(num_steps=250),
    class_labels: Tensor | None = None,
    *,
    conditions: Condition | None = None,
    null_condition: Condition | None = None,
    drafter: str | Drafter | None = None,
    guidance_scale: float = 1.0,
    guidance_channels: int | None = None,
    draft_lengths: Iterable[int] = LENGTHS,
    images: int = 2,
    positions: int = 8,
    rounds: int = 4,
    probe_length: int = 12,
    chain_calls: int = 24,
    seed: int = 0,
    row_costs: RowCosts | None = None,
    timing_repeats: int = 5,
    backend: str = "auto",
    progress: bool = False,
) -> Feasibility:
    """Tell whether lossless speculation will pay for a target, from a few hundred rows and without training.

    A coarse chain of ``chain_calls`` calls reaches ``positions`` steps of the chain, where real rounds are played. The
    whitened gap delta of every draft gives its acceptance ``2 Phi(-delta / 2)``, tested or not. An exact Markov chain
    over step and refused rows turns that into steps per call for every draft length, and times into a speed-up.

    This looks at discarded rows. It must not steer a run with the same seed: such a run would no longer have the
    target's law. A run with another seed may use it.

    Args:
        target: a :class:`Target`, or a DiT module that an adapter recognises.
        schedule: the Gaussian transitions, K >= 4.
        class_labels: int64 ``[N]``, cycled through; None without conditions: classes evenly spread.
        conditions: of N images, as in :func:`sample`, cycled through likewise.
        null_condition: as in :func:`sample`.
        drafter: a learned drafter, which is forecast beside the frozen one.
        guidance_scale: one number, of all images and steps.
        guidance_channels: as in :func:`sample`.
        draft_lengths: L of the forecasts; lengths from K on are left out.
        images: I, images that are probed.
        positions: P, places of the chain, at most K - 2 of them.
        rounds: played at each place: one shows new drafts, two rows seen once, three rows seen again.
        probe_length: their L.
        chain_calls: calls of the coarse chain; with K or more it is the ordinary chain.
        seed: of the noise and of the bootstrap.
        row_costs: times of the parts of a round; measured here, for one image at a time, if None.
        timing_repeats: of those measurements, at least 2, whose spread is part of the interval.
        backend: as in :func:`sample`.
        progress: show a progress bar.

    Returns:
        The forecasts, with ``verdict`` and ``pays``.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it.
        FloatingPointError: a network output is not finite.
    """
    where = "feasibility"
    for name, value in (
        ("images", images),
        ("positions", positions),
        ("rounds", rounds),
        ("chain_calls", chain_calls),
    ):
        check_int(where, name, value, 1)
    check_int(where, "timing_repeats", timing_repeats, 2)
    options = Options(
        schedule=schedule,
        guidance_scale=guidance_scale,
        guidance_channels=guidance_channels,
        draft_length=1,
        seed=seed,
        backend=backend,
    )
    check_float(where, "guidance_scale", guidance_scale, 0.0)
    options.check(where)
    num_steps = check_int(where, "schedule.num_steps", schedule.num_steps, 4)
    lengths = _checked_lengths(where, draft_lengths, num_steps)
    check_int(where, "probe_length", probe_length, 2)
    probe_length = min(probe_length, num_steps - 1)
    positions = min(positions, num_steps - 2)
    if row_costs is not None:
        if not isinstance(row_costs, RowCosts):
            fail(where, "row_costs", "RowCosts or None", row_costs, TypeError)
        row_costs.check(where)
    target = as_target(where, target)
    if class_labels is None and conditions is None:
        if target.num_classes < 1:
            fail(where, "conditions", f"given for {type(target).__name__}, which takes them", "None")
        class_labels = torch.arange(images, device="cpu") * target.num_classes // images
    job = make_job(where, target, class_labels, options, conditions, null_condition)
    if job.is_deterministic:
        fail(where, "schedule", "one whose steps add noise", "steps without")
    job = replace(job, labels=job.labels.repeat(-(-images // len(job.labels)))[:images]).hoisted()
    drafters = {"frozen": as_drafter(where, "frozen", job.target)}
    if drafter is not None and not (isinstance(drafter, str) and drafter == "frozen"):
        drafters["learned"] = as_drafter(where, drafter, job.target)

    network, asked = TargetCall(job), 0
    at_places = replace(job, labels=job.labels.repeat_interleave(positions))
    most = images * min(num_steps, chain_calls + positions) + len(drafters) * rounds * images * positions * probe_length
    seen: dict[str, tuple[Observations, bool]] = {}
    with tqdm(total=most, desc=where, unit="row", disable=not progress) as bar:

        def tick(rows: int) -> None:
            nonlocal asked
            asked += rows
            bar.update(rows)

        places = reach_places(job, network, images, positions, chain_calls, tick)
        for name, drafts in drafters.items():
            seen[name] = probe(at_places, places, drafts, network, probe_length, rounds, tick)
        if row_costs is None:
            bar.set_postfix_str("timing")
            timings = measure(job, places, drafters, network, lengths, timing_repeats)
    generator = np.random.default_rng(seed)
    if row_costs is None:
        row_costs = timings.costs(np.arange(timing_repeats))
        varied = [timings.costs(generator.integers(timing_repeats, size=timing_repeats)) for _ in range(_REPLICATES)]
    else:
        varied = [row_costs] * _REPLICATES
    # The Bayesian bootstrap (Rubin 1981): no place drops out, as the chain needs all of its parts.
    weights = generator.exponential(size=(_REPLICATES, images * positions))
    forecasts = {
        name: _forecast(
            name, *seen[name], places, num_steps, first_drafted_in_rounds(drafts), lengths, weights, row_costs, varied
        )
        for name, drafts in drafters.items()
    }
    return Feasibility(num_steps, job.guidance_scale, images, positions, asked, forecasts, row_costs)


def _forecast(
    name: str,
    seen: Observations,
    reuse: bool,
    places: Places,
    num_steps: int,
    first: int,
    lengths: list[int],
    weights: np.ndarray,
    costs: RowCosts,
    varied: list[RowCosts],
) -> DrafterForecast:
    """From the drafts that were seen to a forecast for every length."""
    positions, acceptance = len(places.steps), seen.acceptance
    field = AcceptanceField(
        num_steps,
        positions,
        lengths[-1],
        seen.image * positions + seen.position,
        seen.step,
        seen.kind,
        seen.place,
        acceptance,
        seen.reached,
    )
    table = field.table(np.ones(weights.shape[1]))
    changes = np.stack([field.table(one) - table for one in weights])
    forecasts = []
    for length in lengths:
        rounds, gradient = RoundChain(num_steps, length, first, reuse).expected_rounds(table)
        without = rounds
        if reuse:
            without, _ = RoundChain(num_steps, length, first, reuse=False).expected_rounds(table)
        # To first order, on the scale of the logarithm.
        spread = num_steps / (rounds * np.exp(np.einsum("nkcm,kcm->n", changes, gradient) / rounds))
        steps = num_steps / rounds
        speeds = [one.speed_up(name, length, value) for one, value in zip(varied, spread, strict=True)]
        forecasts.append(
            LengthForecast(
                length,
                steps,
                _interval(spread),
                num_steps / without,
                float(costs.speed_up(name, length, steps)),
                _interval(np.array(speeds)),
            )
        )
    readings, kinds = [], np.array(CLASSES)[seen.kind]
    for position, step in enumerate(places.steps.tolist()):
        for kind in dict.fromkeys(CLASSES):
            chosen = (seen.position == position) & (kinds == kind)
            if chosen.any():
                mean = np.average(acceptance[chosen], weights=seen.reached[chosen] + 1e-12)
                readings.append(
                    GapReading(step, kind, int(chosen.sum()), float(np.median(seen.gap[chosen])), float(mean))
                )
    return DrafterForecast(forecasts, readings)


def _interval(values: np.ndarray) -> Interval:
    low, high = np.quantile(values, [0.025, 0.975]).tolist()
    return low, high
