"""Where the drafts of a round come from: the drafter alone, or the target's rows that earlier rounds refused."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from free_kernels.ops.drafting import (
    CorrectArguments,
    ErrorArguments,
    FollowArguments,
    JoinArguments,
    RowArguments,
    correct_features,
    draft_rows,
    follow_features,
    join_rows,
    row_errors,
)
from free_kernels.protocols import Drafter, DrafterDefaults, DraftMemory
from free_kernels.sampling.drafting import DraftingPass, Places
from free_kernels.sampling.job import Job
from free_kernels.sampling.refused_rows import RefusedRows
from free_kernels.validation import fail


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
        places = _in_order(drafting, now, ahead.count, labels.device)
        counts = [now] * ahead.count if drafting is None else drafting.sum(0).tolist()
        previous, y = job.doubled(slots.previous), job.branched(labels)
        # Rows of the only slot are contiguous as they are.
        alone = (
            list(zip(ahead.drafts.states.unbind(1), ahead.timesteps.unbind(1), strict=True))
            if now == branches == 1
            else None
        )
        active: Tensor | None = None
        for j in range(ahead.count):
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
            scales = None
            if ahead.scales is not None:
                scales = ahead.scales[:, j] if active is None else ahead.scales[active, j]
            ahead.advance(job.mixed(job.head(feature, t, y), scales), places, j, j + 1)
            previous = state

    def _draft_feature(self, j: int, inputs: DraftInputs, active: Tensor | None) -> Tensor:
        """The feature ``[B R, T, D]`` of draft ``j`` of R slots: ``active [R]``, or all if None."""
        return self._call(inputs)

    def _call(self, inputs: DraftInputs) -> Tensor:
        """The drafter's feature, of the shape that it promises."""
        states = self._job.shaped(inputs.previous), self._job.shaped(inputs.state)
        drafted = self._drafter(inputs.feature, *states, inputs.t, inputs.y, **self._remembered)
        wanted = (inputs.t.shape[0], *self._job.target.feature_shape)
        if drafted.shape != wanted:
            fail(self._job.where, "drafter's output", f"[R, T, D] = {list(wanted)}", drafted)
        return drafted


class Repeated:
    """Drafts of a drafter that repeats its feature, whatever the state: all outputs are there before any state is.

    A step that an earlier round asked the target about has the target's own output at that row, which is what
    :class:`Corrected` comes to for such a drafter. Where it was asked about twice, the output follows the secant
    through both rows; see :func:`~free_kernels.ops.drafting.advance_drafts`. The steps behind repeat the feature of
    the last such row, or the parent's, in one call of the head.

    Args:
        job: the job.
        refused: rows of earlier rounds; None drafts without.
    """

    def __init__(self, job: Job, refused: RefusedRows | None) -> None:
        self._job, self._refused = job, refused

    def draft(self, ahead: DraftingPass) -> None:
        """Make all drafts of the pass."""
        refused, lengths = self._refused, ahead.lengths
        feature, serving = ahead.parent, [0] * len(ahead.slots)
        if refused is not None:
            serving = serving_rows(refused, lengths, ahead.count)
        count = max(serving)
        if count:
            places = Places(refused.latest_places, refused.states, refused.replaced_places)
            share = ahead.advance(refused.outputs, places, 0, count)
        if lengths is None:
            # The outputs of all drafts, as shapes are fixed; those of drafts that have a row are not used.
            index = torch.arange(len(serving) * ahead.count, device=ahead.steps.device)
            rows, slots = index.view(-1, ahead.count), index // ahead.count
            t, scales = (
                None if part is None else part[:, : ahead.count].flatten() for part in (ahead.timesteps, ahead.scales)
            )
            if count:
                drafted = torch.nn.functional.pad(refused.latest_places[:, :count] >= 0, (0, ahead.count - count))
                rows = rows.masked_fill(drafted, -1)
        else:
            behind = _are_drafting(lengths, ahead.count) & (np.arange(ahead.count) >= np.array(serving)[:, None])
            if not behind.any():
                return
            numbers = np.where(behind, behind.cumsum().reshape(behind.shape) - 1, -1)
            place, (slot, draft) = ahead.steps.device, behind.nonzero()
            rows, slots, index = (
                torch.from_numpy(part).to(place) for part in (numbers, slot, slot * (ahead.count + 1) + draft)
            )
            t, scales = (
                None if part is None else part.view(-1).index_select(0, index)
                for part in (ahead.timesteps, ahead.scales)
            )
        if count:
            feature = self._last_features(share, feature)
        job, y = self._job, ahead.slots.labels.index_select(0, slots)
        repeated = feature.index_select(1, slots).flatten(0, 1)
        output = job.mixed(job.head(repeated, job.doubled(t), job.branched(y)), scales)
        ahead.advance(output, Places(rows), 0, ahead.count)

    def _last_features(self, share: Tensor, parent: Tensor) -> Tensor:
        """Features ``[B, S, T, D]`` of the last row that serves each slot; the parent's where none does."""
        refused = self._refused
        places = refused.latest_places, refused.replaced_places, refused.ahead
        return follow_features(FollowArguments(refused.features, parent, *places, share), refused.backend)


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

    def __init__(self, job: Job, drafter: Drafter, refused: RefusedRows) -> None:
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
        places = refused.before, refused.latest_places, ahead.timesteps, ahead.slots.labels
        both = self._call(DraftInputs(*join_rows(JoinArguments(*given, *places, *rows), refused.backend)))
        drafted = inputs.t.shape[0]
        errors = both.contiguous(), refused.features, refused.latest_places, self._count, drafted, self._chosen
        self._errors = row_errors(ErrorArguments(*errors), refused.backend)
        return both[:drafted]

    def _draft_feature(self, j: int, inputs: DraftInputs, active: Tensor | None) -> Tensor:
        """As :meth:`Fresh._draft_feature`."""
        drafted = self._with_errors(inputs) if j == 0 and self._count else self._call(inputs)
        if j >= self._count:
            return drafted
        asked, latest = self._refused.states, self._refused.latest_places
        states = inputs.state, inputs.previous
        if self._job.branches > 1:
            states = tuple(rows[: rows.shape[0] // self._job.branches] for rows in states)
        given = CorrectArguments(drafted.contiguous(), self._errors, *states, asked, latest, j, active)
        return correct_features(given, self._refused.backend)


def _are_drafting(lengths: list[int], drafts: int) -> np.ndarray:
    """Whether slots of so many rows make each of the pass's drafts, bool ``[S, drafts]``."""
    return np.arange(1, drafts + 1) < np.array(lengths)[:, None]


def _in_order(drafting: np.ndarray | None, slots: int, drafts: int, device: torch.device) -> Places:
    """Outputs of one draft of each slot: those of the slots that make it, one after the other; of all slots if None."""
    if drafting is None:
        return Places(torch.arange(slots, device=device).unsqueeze(1).expand(-1, drafts).contiguous())
    return Places(torch.from_numpy(np.where(drafting, drafting.cumsum(0) - 1, -1)).to(device))


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


def draft_source(
    job: Job, drafter: Drafter, *, memory: DraftMemory | None, refused: RefusedRows | None
) -> Fresh | Repeated:
    """The source of a round's drafts: refused rows with the drafter's correction, or as they are where it has none.

    Args:
        job: the job.
        drafter: drafts features.
        memory: the drafter's, where it has one; it holds one call a step, so refused rows do not go with it.
        refused: rows of earlier rounds; None drafts without.
    """
    known = None if refused is None or refused.is_empty else refused
    if DrafterDefaults.read(drafter, "repeats_feature"):
        return Repeated(job, known)
    return Fresh(job, drafter, memory) if known is None else Corrected(job, drafter, known)
