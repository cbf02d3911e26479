"""Where the drafts of a round come from: the drafter alone, or the target's rows that earlier rounds refused."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from free_kernels.protocols import Drafter, DrafterDefaults, DraftMemory
from free_kernels.sampling.job import Job
from free_kernels.sampling.refused_rows import HeldRows, RefusedRows
from free_kernels.sampling.slots import Slots
from free_kernels.validation import fail


class DraftInputs(NamedTuple):
    """What the drafter takes for R rows of each branch; see :class:`free_kernels.protocols.Drafter`."""

    feature: Tensor
    previous: Tensor
    state: Tensor
    t: Tensor
    y: Tensor


class Drafted(NamedTuple):
    """What a draft's transition is made of: ``feature [B R, T, D]`` and the head's ``output [B R, C or 2C, H, W]``."""

    feature: Tensor
    output: Tensor


class Fresh:
    """The drafter's own feature, through the target's head.

    Args:
        job: the job.
        drafter: drafts features.
        memory: the drafter's, where it has one.
    """

    def __init__(self, job: Job, drafter: Drafter, memory: DraftMemory | None = None) -> None:
        self._job, self._drafter = job, drafter
        self._remembered: dict[str, Any] = {} if memory is None else {"memory": memory}

    def __call__(self, j: int, inputs: DraftInputs, active: Tensor | None) -> Drafted:
        """Draft ``j`` of the slots.

        Args:
            j: number of the draft.
            inputs: of R rows a branch.
            active: int64 ``[R]``, the slots that they belong to; all if None.
        """
        feature = self._feature(inputs)
        return Drafted(feature, self._job.head(feature, inputs.t, inputs.y))

    def _feature(self, inputs: DraftInputs) -> Tensor:
        """The drafter's feature, of the shape that it promises."""
        drafted = self._drafter(*inputs, **self._remembered)
        wanted = (len(inputs.t), *self._job.target.feature_shape)
        if drafted.shape != wanted:
            fail(self._job.where, "drafter's output", f"[R, T, D] = {list(wanted)}", drafted)
        return drafted


class _FromRows(Fresh):
    """Base of the sources that take refused rows.

    Args:
        job: the job.
        drafter: drafts what the rows do not.
        refused: the rows; not empty.
        slots: where the images are.
        drafts: how many drafts the round makes, at most.
        lengths: rows that each slot wants; with None shapes are fixed.
    """

    def __init__(
        self, job: Job, drafter: Drafter, refused: RefusedRows, slots: Slots, drafts: int, lengths: list[int] | None
    ) -> None:
        super().__init__(job, drafter)
        self._serving = serving_rows(refused, lengths, drafts)
        self._count = max(self._serving)
        if self._count:
            self._begin(refused, slots, drafts, lengths)

    def _begin(self, refused: RefusedRows, slots: Slots, drafts: int, lengths: list[int] | None) -> None:
        """Take the rows of the round; called where there are any."""
        raise NotImplementedError


class Replayed(_FromRows):
    """The target's own output at the refused row of the same step, without any call; the drafter where there is none.

    For a drafter that says the same at all states of a step: then this is what :class:`Corrected` comes to. Where the
    step was asked about twice, the output follows the line through both rows to the point nearest to the state (a
    secant), but no further from the latest row than the two are apart.
    """

    def _begin(self, refused: RefusedRows, slots: Slots, drafts: int, lengths: list[int] | None) -> None:
        # For drafts before this number every slot that drafts has a row, so that the drafter is not called.
        self._without_drafter = 0
        if lengths is not None:
            pairs = zip(self._serving, lengths, strict=True)
            self._without_drafter = min(self._count, *(drafts if n >= length - 1 else n for n, length in pairs))
        self._latest = refused.latest(slots.steps, self._count)
        self._replaced = refused.replaced(slots.steps, self._count)

    def __call__(self, j: int, inputs: DraftInputs, active: Tensor | None) -> Drafted:
        """As :meth:`Fresh.__call__`."""
        if j >= self._count:
            return super().__call__(j, inputs, active)
        latest, replaced = (rows_at(rows, j + 1, active) for rows in (self._latest, self._replaced))
        share = self._share(inputs.state[: len(latest.known)], latest, replaced)
        feature, output = (
            _follow(share, replaced.known, *pair).flatten(0, 1)
            for pair in ((latest.features, replaced.features), (latest.outputs, replaced.outputs))
        )
        if j < self._without_drafter:
            return Drafted(feature, output)
        fresh = super().__call__(j, inputs, active)
        known = latest.known.repeat(len(latest.features))
        return Drafted(
            torch.where(known.view(-1, 1, 1), feature.to(fresh.feature.dtype), fresh.feature),
            torch.where(known.view(-1, 1, 1, 1), output.to(fresh.output.dtype), fresh.output),
        )

    @staticmethod
    def _share(state: Tensor, latest: HeldRows, replaced: HeldRows) -> Tensor:
        """How far states ``[R, C, H, W]`` lie along the way from replaced to latest rows, in its lengths, ``[R]``."""
        way = (latest.states - replaced.states).flatten(1)
        along = ((state - latest.states).flatten(1) * way).sum(1)
        return (along / way.square().sum(1).clamp(min=torch.finfo(way.dtype).tiny)).clamp(-1.0, 1.0)


def _follow(share: Tensor, known: Tensor, latest: Tensor, replaced: Tensor) -> Tensor:
    """What the line through two rows says at ``share [R]``; the latest ``[B, R, ...]`` where the other is not known."""
    shape = (1, -1, *[1] * (latest.ndim - 2))
    ahead = latest + share.to(latest.dtype).view(shape) * (latest - replaced)
    return torch.where(known.view(shape), ahead, latest)


class Corrected(_FromRows):
    """The drafter's feature plus what it gets wrong at the refused row of the same step: an error at both cancels.

    A row serves where it is nearer to the state than the state one step before: a drafter that is far off could
    otherwise lead itself further and further astray. The drafter's first call in the round has all rows that serve as
    further rows, which gives their errors.
    """

    def _begin(self, refused: RefusedRows, slots: Slots, drafts: int, lengths: list[int] | None) -> None:
        self._rows = refused.latest(slots.steps, self._count, outputs=False)
        # Which of the rows [n S] serve; None: all of them.
        self._index: Tensor | None = None
        if lengths is not None and min(self._serving) < self._count:
            pairs = ((ahead, slot) for ahead in range(self._count) for slot in range(len(lengths)))
            chosen = [ahead * len(lengths) + slot for ahead, slot in pairs if self._serving[slot] > ahead]
            self._index = torch.tensor(chosen, device=slots.steps.device)
        self._steps = slots.steps_ahead(self._count).T.flatten()
        self._labels = slots.labels.repeat(self._count)
        # [B, n, S, T, D], set by the first call.
        self._errors: Tensor | None = None

    def _with_errors(self, inputs: DraftInputs) -> Tensor:
        """The drafter's feature at ``inputs``; sets its errors at the rows that serve, zero at the others."""
        job, rows, index = self._job, self._rows, self._index
        previous, state = rows.states[:-1].flatten(0, 1), rows.states[1:].flatten(0, 1)
        before, exact = rows.features[:, :-1].flatten(1, 2), rows.features[:, 1:].flatten(1, 2)
        labels, t = self._labels, job.timesteps[self._steps]
        if index is not None:
            previous, state, labels, t = previous[index], state[index], labels[index], t[index]
            before, exact = before[:, index], exact[:, index]
        further = DraftInputs(
            before.flatten(0, 1).to(inputs.feature.dtype),
            job.doubled(previous),
            job.doubled(state),
            job.doubled(t),
            job.branched(labels),
        )
        both = self._feature(DraftInputs(*(torch.cat(pair) for pair in zip(inputs, further, strict=True))))
        drafted, there = both[: len(inputs.t)], both[len(inputs.t) :]
        # A row that is not finite has an error that is not; it counts as none.
        errors = (exact.flatten(0, 1).to(both.dtype) - there).nan_to_num(0.0, 0.0, 0.0).unflatten(0, (job.branches, -1))
        if index is not None:
            full = errors.new_zeros(job.branches, len(self._labels), *errors.shape[2:])
            errors = full.index_copy_(1, index, errors)
        self._errors = errors.unflatten(1, (self._count, -1))
        return drafted

    def __call__(self, j: int, inputs: DraftInputs, active: Tensor | None) -> Drafted:
        """As :meth:`Fresh.__call__`."""
        drafted = self._with_errors(inputs) if j == 0 and self._count else self._feature(inputs)
        if j < self._count:
            known, there, errors = self._rows.known[j + 1], self._rows.states[j + 1], self._errors[:, j]
            if active is not None:
                known, there, errors = known[active], there[active], errors[:, active]
            nearer = self.nearer(inputs.state[: len(known)], inputs.previous[: len(known)], there)
            serves = (known & nearer).view(-1, 1, 1)
            drafted = drafted + torch.where(serves, errors, 0.0).flatten(0, 1).to(drafted.dtype)
        return Drafted(drafted, self._job.head(drafted, inputs.t, inputs.y))

    @staticmethod
    def nearer(state: Tensor, previous: Tensor, there: Tensor) -> Tensor:
        """Whether states are nearer to refused rows than to the states before them, bool ``[R]``."""
        return (state - there).flatten(1).norm(dim=1) < (state - previous).flatten(1).norm(dim=1)


def rows_at(rows: HeldRows, number: int, active: Tensor | None) -> HeldRows:
    """One row of R slots, all or ``active [R]``: ``known [R]``, ``states [R, ...]``, the rest ``[B, R, ...]``."""
    known, states = rows.known[number], rows.states[number]
    features, outputs = rows.features[:, number], rows.outputs[:, number]
    if active is None:
        return HeldRows(known, states, features, outputs)
    return HeldRows(known[active], states[active], features[:, active], outputs[:, active])


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
    job: Job,
    drafter: Drafter,
    slots: Slots,
    drafts: int,
    lengths: list[int] | None,
    *,
    memory: DraftMemory | None,
    refused: RefusedRows | None,
) -> Fresh:
    """The source of a round's drafts: refused rows with the drafter's correction, or as they are where it has none.

    Args:
        job: the job.
        drafter: drafts features.
        slots: where the images are.
        drafts: how many drafts the round makes, at most.
        lengths: rows that each slot wants; with None shapes are fixed.
        memory: the drafter's, where it has one; it holds one call a step, so refused rows do not go with it.
        refused: rows of earlier rounds; None drafts without.
    """
    if refused is None or refused.is_empty or not drafts:
        return Fresh(job, drafter, memory)
    kind = Replayed if DrafterDefaults.read(drafter, "repeats_feature") else Corrected
    return kind(job, drafter, refused, slots, drafts, lengths)
