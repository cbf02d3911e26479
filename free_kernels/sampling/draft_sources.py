"""Where the drafts of a round come from: the drafter alone, or the target's rows that earlier rounds refused."""

from __future__ import annotations

import enum
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from free_kernels.ops.drafting import (
    CorrectArguments,
    ErrorArguments,
    JoinArguments,
    ReplayArguments,
    RowArguments,
    correct_features,
    draft_rows,
    join_rows,
    replay_drafts,
    row_errors,
)
from free_kernels.protocols import Drafter, DrafterDefaults, DraftMemory
from free_kernels.sampling.drafting import DraftingPass
from free_kernels.sampling.job import Job
from free_kernels.sampling.options import Options
from free_kernels.sampling.refused_rows import CleanRows, FeatureRows, RefusedRows


class Source(enum.Flag):
    """What drafts a round's slots: clean samples those of the chain's first steps, the drafter those behind."""

    CLEAN = enum.auto()
    DRAFTER = enum.auto()


class DraftInputs(NamedTuple):
    """What the drafter takes for R rows of each branch; see :class:`free_kernels.protocols.Drafter`."""

    feature: Tensor
    previous: Tensor
    state: Tensor
    t: Tensor
    y: Tensor


class Fresh:
    """One draft after the other: the drafter's feature, through the target's head.

    Args:
        job: the job.
        drafter: drafts features.
        memory: the drafter's, where it has one.
    """

    def __init__(self, job: Job, drafter: Drafter, memory: DraftMemory | None = None) -> None:
        self._job, self._drafter = job, drafter
        self._remembered: dict[str, Any] = {} if memory is None else {"memory": memory}

    def draft(self, ahead: DraftingPass) -> None:
        """Make all drafts of the pass."""
        job, slots = self._job, ahead.slots
        feature, labels, backend = ahead.parent.flatten(0, 1), slots.labels, job.options.backend
        lengths, now, branches = ahead.lengths, len(slots), job.branches
        # None: every slot makes every draft.
        drafting = None if lengths is None or min(lengths) > ahead.count else _are_drafting(lengths, ahead.count)
        places = slots.numbers if drafting is None else _in_order(drafting).to(labels.device)
        if ahead.chosen is not None:
            places = places.masked_fill(~ahead.chosen.unsqueeze(1), -1)
        counts = [now] * ahead.count if drafting is None else drafting.sum(0).tolist()
        previous, y = job.doubled(slots.previous), job.branched(labels)
        # Rows of the only slot are contiguous as they are.
        alone = (
            list(zip(ahead.drafts.states.unbind(1), ahead.timesteps.unbind(1), strict=True))
            if now == branches == 1
            else None
        )
        active: Tensor | None = None
        head = job.drafting_head()
        for j in range(ahead.count):
            if not counts[j]:
                break
            if counts[j] < now:
                now = counts[j]
                kept = torch.from_numpy(drafting[:, j].nonzero()[0]).to(labels.device)
                within = kept if active is None else torch.searchsorted(active, kept)
                feature, previous = (
                    rows.unflatten(0, (branches, -1))[:, within].flatten(0, 1) for rows in (feature, previous)
                )
                y, active = job.branched(labels[kept]), kept
            if alone is not None:
                state, t = alone[j]
            else:
                state, t = draft_rows(RowArguments(ahead.drafts.states, ahead.timesteps, j, branches, active), backend)
            feature = self._draft_feature(j, DraftInputs(feature, previous, state, t, y), active)
            if head is not None:
                ahead.advance_from(head, feature, t, y, places, j)
            else:
                scales = None
                if ahead.scales is not None:
                    scales = ahead.scales[:, j] if active is None else ahead.scales[active, j]
                ahead.advance(job.mixed(job.head(feature, t, y), scales), places, j)
            previous = state

    def _draft_feature(self, j: int, inputs: DraftInputs, active: Tensor | None) -> Tensor:
        """The feature ``[B R, T, D]`` of draft ``j`` of R slots: ``active [R]``, or all if None."""
        return self._call(inputs)

    def _call(self, inputs: DraftInputs) -> Tensor:
        """The drafter's feature, of the shape that it promises."""
        states = self._job.shaped(inputs.previous), self._job.shaped(inputs.state)
        drafted = self._drafter(inputs.feature, *states, inputs.t, inputs.y, **self._remembered)
        return self._job.checked_rows("drafter's output", "[R, T, D]", drafted, inputs.t, self._job.feature_shape)


class Replayed:
    """Drafts of a drafter that repeats its feature: from the clean samples of rows that the target was asked about.

    All are made in one call of :func:`~free_kernels.ops.drafting.replay_drafts`, without a network: what such a drafter
    would add at a row is what it adds at the draft, so :class:`Corrected` would come to the row's own output.

    Args:
        job: the job.
        rows: those of earlier rounds.
    """

    def __init__(self, job: Job, rows: CleanRows) -> None:
        self._job, self._rows = job, rows

    def draft(self, ahead: DraftingPass) -> None:
        """Make all drafts of the pass, of every slot."""
        job, rows, slots = self._job, self._rows, ahead.slots
        made = *ahead.drafts, ahead.noise, job.table, slots.steps
        held = rows.states, rows.clean, rows.places, rows.before, rows.response, rows.pattern
        replay_drafts(ReplayArguments(*made, *held, job.clip), rows.backend)


class Corrected(Fresh):
    """The drafter's feature plus what it gets wrong at the refused row of the same step: an error at both cancels.

    A row serves where it is nearer to the state than the state one step before: a drafter that is far off could
    otherwise lead itself further and further astray. The drafter's first call in the round has all rows that serve as
    further rows, which gives their errors.

    Args:
        job: the job.
        drafter: drafts features.
        refused: the rows; not empty.
    """

    def __init__(self, job: Job, drafter: Drafter, refused: FeatureRows) -> None:
        super().__init__(job, drafter)
        self._refused = refused

    def draft(self, ahead: DraftingPass) -> None:
        """As :meth:`Fresh.draft`."""
        lengths = ahead.lengths
        serving = serving_rows(self._refused, lengths, ahead.count)
        self._ahead, self._count = ahead, max(serving)
        # Which of the rows, numbered by draft and then by slot, serve; None: all of them.
        self._chosen: Tensor | None = None
        if lengths is not None and min(serving) < self._count:
            chosen = np.arange(self._count)[:, None] < np.array(serving)
            self._chosen = torch.from_numpy(chosen.ravel().nonzero()[0]).to(ahead.steps.device)
        # [B, n, S, T, D], set by the first call.
        self._errors: Tensor | None = None
        super().draft(ahead)

    def _with_errors(self, inputs: DraftInputs) -> Tensor:
        """The drafter's feature at ``inputs``; sets its errors at the rows that serve, zero at the others."""
        ahead, refused, rows = self._ahead, self._refused, (self._count, self._job.null, self._chosen)
        given = *(part.contiguous() for part in inputs), refused.states, refused.features
        places = refused.before, refused.places, ahead.timesteps, ahead.slots.labels
        both = self._call(DraftInputs(*join_rows(JoinArguments(*given, *places, *rows), refused.backend)))
        drafted = inputs.t.shape[0]
        errors = both.contiguous(), refused.features, refused.places, self._count, drafted, self._chosen
        self._errors = row_errors(ErrorArguments(*errors), refused.backend)
        return both[:drafted]

    def _draft_feature(self, j: int, inputs: DraftInputs, active: Tensor | None) -> Tensor:
        """As :meth:`Fresh._draft_feature`."""
        drafted = self._with_errors(inputs) if j == 0 and self._count else self._call(inputs)
        if j >= self._count:
            return drafted
        asked, latest = self._refused.states, self._refused.places
        states = inputs.state, inputs.previous
        if self._job.branches > 1:
            states = tuple(rows[: rows.shape[0] // self._job.branches] for rows in states)
        given = CorrectArguments(drafted.contiguous(), self._errors, *states, asked, latest, j, active)
        return correct_features(given, self._refused.backend)


def _are_drafting(lengths: list[int], drafts: int) -> np.ndarray:
    """Whether slots of so many rows make each of the pass's drafts, bool ``[S, drafts]``."""
    return np.arange(1, drafts + 1) < np.array(lengths)[:, None]


def _in_order(drafting: np.ndarray) -> Tensor:
    """Outputs of the slots that make each draft, one after the other; int64 ``[S, drafts]``, -1 for the other slots."""
    return torch.from_numpy(np.where(drafting, drafting.cumsum(0) - 1, -1))


def serving_rows(refused: RefusedRows, lengths: list[int] | None, drafts: int) -> list[int]:
    """How many drafts of each slot may have a refused row.

    Args:
        refused: the rows.
        lengths: rows that each slot wants; with None shapes are fixed, and so is the number.
        drafts: how many drafts the round makes, at most.
    """
    if lengths is None:
        return [min(drafts, refused.rows - 1)] * len(refused.counts)
    return [max(0, min(count, length - 1)) for count, length in zip(refused.counts, lengths, strict=True)]


def refused_rows(
    job: Job, drafter: Drafter, slots: int, length: int, *, memory: DraftMemory | None, backend: str
) -> RefusedRows | None:
    """What rounds of a drafter keep of their rows; None if nothing drafts again.

    Of a drafter with a ``frozen_share`` these are the rows of the rounds that call it; see :func:`clean_rows`.

    Args:
        job: the job.
        drafter: drafts features.
        slots: S.
        length: L.
        memory: the drafter's, where it has one; it holds one call a step, so there is none for a refused row.
        backend: of the drafting ops.
    """
    repeats = DrafterDefaults.read(drafter, "repeats_feature")
    if length == 1 or memory is not None or not (repeats or job.options.reuse_refused):
        return None
    if repeats:
        return clean_rows(job, slots, length, backend)
    return FeatureRows(slots, rows_used(job.options, length), job.labels.device, backend, branches=job.branches)


def clean_rows(job: Job, slots: int, length: int, backend: str) -> CleanRows:
    """What rounds that clean samples draft keep of their rows; arguments as of :func:`refused_rows`."""
    return CleanRows(slots, rows_used(job.options, length), job.labels.device, backend, job=job)


def rows_used(options: Options, length: int) -> int:
    """How many rows of a round may draft in the next ones, the last committed one among them."""
    # Blocks have new noise every round, so only the refused draft's own row is near the next round's states.
    return 1 if not options.reuse_refused else 2 if options.block else length


def draft_source(
    job: Job, drafter: Drafter, *, memory: DraftMemory | None, refused: RefusedRows | None
) -> Fresh | Replayed:
    """The source of a round's drafts: refused rows with the drafter's correction, or as they are where it has none.

    Args:
        job: the job.
        drafter: drafts features.
        memory: the drafter's, where it has one.
        refused: rows of earlier rounds; None drafts without.
    """
    if isinstance(refused, CleanRows):
        return Replayed(job, refused)
    known = refused is not None and not refused.is_empty
    return Corrected(job, drafter, refused) if known else Fresh(job, drafter, memory)
