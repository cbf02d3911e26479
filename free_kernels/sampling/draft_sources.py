"""Where the drafts of a round come from: the drafter alone, or the target's rows that earlier rounds refused."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from free_kernels.protocols import Drafter, DrafterDefaults, DraftMemory
from free_kernels.sampling.job import Job
from free_kernels.sampling.refused_rows import Held, RefusedRows
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
    """Base of the sources that know refused rows.

    Args:
        job: the job.
        drafter: drafts what the rows do not.
        refused: the rows; not empty.
        steps: int64 ``[S, L]``, the steps of the round.
        lengths: rows that each slot wants; with None shapes are fixed.
    """

    def __init__(
        self, job: Job, drafter: Drafter, refused: RefusedRows, steps: Tensor, lengths: list[int] | None
    ) -> None:
        super().__init__(job, drafter)
        self._refused, self._steps, self._lengths = refused, steps, lengths

    def _rows(self, j: int, active: Tensor | None) -> Held | None:
        """The rows at the step of draft ``j``; None where the host knows that no slot has one."""
        most = min(self._refused.rows, self._steps.shape[1]) - 1
        if self._lengths is not None:
            most = min(most, max(serving_rows(self._refused.counts, self._lengths)))
        return self._refused.row_ahead(j, self._steps[:, j]).of(active) if j < most else None


class Replayed(_FromRows):
    """The target's own output at the refused row of the same step, without any call; the drafter where there is none.

    For a drafter that says the same at all states of a step: then this is what :class:`Corrected` comes to. Where the
    step was asked about twice, the output follows the line through both rows to the point nearest to the state (a
    secant), but no further from the latest row than the two are apart.
    """

    def __call__(self, j: int, inputs: DraftInputs, active: Tensor | None) -> Drafted:
        """As :meth:`Fresh.__call__`."""
        rows = self._rows(j, active)
        if rows is None:
            return super().__call__(j, inputs, active)
        feature, output = self._on_the_secant(rows, self._refused.replaced_row(j, self._steps[:, j]).of(active), inputs)
        if self._lengths is not None:
            pairs = zip(self._refused.counts, self._lengths, strict=True)
            if all(count > j for count, length in pairs if length > j + 1):
                return Drafted(feature, output)
        fresh = super().__call__(j, inputs, active)
        known = rows.known.repeat(len(rows.feature))
        return Drafted(
            torch.where(known.view(-1, 1, 1), feature.to(fresh.feature.dtype), fresh.feature),
            torch.where(known.view(-1, 1, 1, 1), output.to(fresh.output.dtype), fresh.output),
        )

    @staticmethod
    def _on_the_secant(latest: Held, earlier: Held, inputs: DraftInputs) -> Drafted:
        """Feature and output at the states, from two rows of the same step, or from the latest where there is one."""
        state = inputs.state[: len(latest.known)]
        apart = (latest.state - earlier.state).flatten(1)
        along = ((state - latest.state).flatten(1) * apart).sum(1)
        share = along / apart.square().sum(1).clamp(min=torch.finfo(apart.dtype).tiny)
        share = torch.where(earlier.known, share.clamp(-1.0, 1.0), 0.0)

        def follow(now: Tensor, before: Tensor) -> Tensor:
            scaled = share.to(now.dtype).view(1, -1, *[1] * (now.ndim - 2)) * (now - before)
            return torch.where(earlier.known.view(1, -1, *[1] * (now.ndim - 2)), now + scaled, now).flatten(0, 1)

        return Drafted(follow(latest.feature, earlier.feature), follow(latest.output, earlier.output))


class Corrected(_FromRows):
    """The drafter's feature plus what it gets wrong at the refused row of the same step: an error at both cancels.

    A row serves where it is nearer to the state than the state one step before: a drafter that is far off could
    otherwise lead itself further and further astray. One further call of the drafter, on all rows that serve in the
    round, gives their errors.
    """

    def __init__(
        self,
        job: Job,
        drafter: Drafter,
        refused: RefusedRows,
        steps: Tensor,
        lengths: list[int] | None,
        labels: Tensor,
    ) -> None:
        super().__init__(job, drafter, refused, steps, lengths)
        if lengths is None:
            serving = [min(steps.shape[1], refused.rows) - 1] * len(steps)
        else:
            serving = serving_rows(refused.counts, lengths)
        # [B, S, m, T, D]; None where no row serves.
        self._errors = self._errors_of(serving, labels) if max(serving) > 0 else None

    def _errors_of(self, serving: list[int], labels: Tensor) -> Tensor:
        """What the drafter gets wrong at the first rows of each slot, ``[B, S, m, T, D]``; zero at the rest."""
        job, most, slots, device = self._job, max(serving), len(serving), labels.device
        whole = min(serving) == most
        if whole:
            slot = torch.arange(slots, device=device).repeat_interleave(most)
            ahead = torch.arange(most, device=device).repeat(slots)
        else:
            pairs = [(slot, ahead) for slot, count in enumerate(serving) for ahead in range(count)]
            slot, ahead = torch.tensor(pairs, device=device).unbind(1)
        steps = self._steps[slot, ahead]
        previous, before = self._refused.gathered(slot, (steps - 1).clamp_(min=0))
        state, exact = self._refused.gathered(slot, steps)
        drafted = self._feature(
            DraftInputs(
                before.flatten(0, 1),
                job.doubled(previous),
                job.doubled(state),
                job.doubled(job.timesteps[steps]),
                job.branched(labels[slot]),
            )
        )
        errors = (exact.flatten(0, 1).to(drafted.dtype) - drafted).unflatten(0, (job.branches, -1))
        # What a row that is not finite leads to must not spoil a draft.
        errors = errors.nan_to_num(0.0, 0.0, 0.0)
        if whole:
            return errors.unflatten(1, (slots, most))
        full = errors.new_zeros(job.branches, slots * most, *errors.shape[2:])
        return full.index_copy_(1, slot * most + ahead, errors).unflatten(1, (slots, most))

    def __call__(self, j: int, inputs: DraftInputs, active: Tensor | None) -> Drafted:
        """As :meth:`Fresh.__call__`."""
        drafted = self._feature(inputs)
        if self._errors is not None and j < self._errors.shape[2]:
            rows = self._refused.row_ahead(j, self._steps[:, j]).of(active)
            errors = self._errors[:, :, j] if active is None else self._errors[:, active, j]
            count = len(rows.known)
            nearer = self.nearer(inputs.state[:count], inputs.previous[:count], rows.state)
            serves = (rows.known & nearer).view(-1, 1, 1)
            drafted = drafted + torch.where(serves, errors, 0.0).flatten(0, 1).to(drafted.dtype)
        return Drafted(drafted, self._job.head(drafted, inputs.t, inputs.y))

    @staticmethod
    def nearer(state: Tensor, previous: Tensor, there: Tensor) -> Tensor:
        """Whether states are nearer to refused rows than to the states before them, bool ``[R]``."""
        return (state - there).flatten(1).norm(dim=1) < (state - previous).flatten(1).norm(dim=1)


def serving_rows(counts: list[int], lengths: list[int]) -> list[int]:
    """How many drafts of each slot have a refused row, given the known rows and the round's rows of each."""
    return [max(0, min(count, length - 1)) for count, length in zip(counts, lengths, strict=True)]


def further_calls(drafter: object, refused: RefusedRows | None, lengths: list[int], dense: bool) -> int:
    """Calls of the drafter's network that a round of ``lengths`` makes besides one for each draft."""
    if refused is None or refused.is_empty or max(lengths) < 2 or DrafterDefaults.read(drafter, "repeats_feature"):
        return 0
    return int(dense or max(serving_rows(refused.counts, lengths)) > 0)


def draft_source(
    job: Job,
    drafter: Drafter,
    slots: Slots,
    steps: Tensor,
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
        steps: int64 ``[S, L]``.
        lengths: rows that each slot wants; with None shapes are fixed.
        memory: the drafter's, where it has one; it holds one call a step, so refused rows do not go with it.
        refused: rows of earlier rounds; None drafts without.
    """
    if refused is None or refused.is_empty:
        return Fresh(job, drafter, memory)
    if DrafterDefaults.read(drafter, "repeats_feature"):
        return Replayed(job, drafter, refused, steps, lengths)
    return Corrected(job, drafter, refused, steps, lengths, slots.labels)
