"""The drafting pass of a round: the drafter's features through the target's frozen head, one step after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from free_kernels.protocols import Drafter, DraftMemory
from free_kernels.sampling.job import Job
from free_kernels.sampling.slots import Slots
from free_kernels.validation import fail


class RefusedDrafts:
    """The refused draft of each slot's last round, and the exact feature that the target has there.

    The round that refused a draft had already asked the target about it. It mostly lies a reflection away from the
    state that took its place, at the same step, where the parent lies a step away: so the next round's first draft is
    this feature plus the drafter's own difference between the two states, and what the drafter gets wrong at both
    cancels.

    It serves where it is nearer than the parent's state; a drafter that is far off could otherwise lead itself further
    and further astray.

    Of all that was computed behind a refusal only this steers later rounds. It hangs on the noise of the refused step,
    which is spent; the noise of the steps behind, which will be used again, did not enter.

    Args:
        state: ``[S, C, H, W]``, the slots' states.
        branches: B, of guidance.

    Attributes:
        slots: those whose last round ended with a refusal, for the host.
        known: bool ``[S]``, whether the refused draft serves.
    """

    def __init__(self, state: Tensor, branches: int) -> None:
        self.slots: list[int] = []
        self.known = torch.zeros(len(state), dtype=torch.bool, device=state.device)
        self._branches = branches
        self._state = torch.zeros_like(state)
        self._feature: Tensor | None = None

    def keep(
        self,
        drafts: Tensor,
        features: Tensor,
        row_offsets: Tensor,
        committed: Tensor,
        lengths: Tensor,
        next_states: Tensor,
    ) -> None:
        """Take in a round.

        Args:
            drafts: ``[S, L, C, H, W]``.
            features: ``[B R, T, D]`` of the packed rows.
            row_offsets: int64 ``[S + 1]``.
            committed: int64 ``[S]``.
            lengths: int64 ``[S]``, rows of each slot; one without keeps what it has.
            next_states: ``[S, C, H, W]``.
        """
        rows = features.unflatten(0, (self._branches, -1))
        if self._feature is None:
            self._feature = rows.new_zeros(self._branches, len(lengths), *rows.shape[2:])
        refused, slots = committed < lengths, torch.arange(len(lengths), device=lengths.device)
        there = drafts[slots, committed.clamp(max=drafts.shape[1] - 1)]
        parent = drafts[slots, (committed - 1).clamp(min=0)]
        nearer = (next_states - there).flatten(1).norm(dim=1) < (next_states - parent).flatten(1).norm(dim=1)
        exact = rows[:, (row_offsets[:-1] + committed).clamp(max=rows.shape[1] - 1)]
        self._state.copy_(torch.where(refused.view(-1, 1, 1, 1), there, self._state))
        self._feature.copy_(torch.where(refused.view(-1, 1, 1), exact, self._feature))
        self.known.copy_(torch.where(lengths > 0, refused & nearer, self.known))

    def forget(self) -> None:
        """Steps were taken without drafts: what was kept is of an earlier one."""
        self.slots = []
        self.known.zero_()

    def first_drafts(
        self, drafter: Drafter, inputs: tuple[Tensor, ...], lengths: list[int] | None, active: Tensor | None
    ) -> Tensor:
        """The drafter's features ``[B R, T, D]`` at its ``inputs``, corrected where a draft was refused.

        Args:
            drafter: called once, with the refused drafts as further rows.
            inputs: feature, previous state, state, timestep and label of R rows a branch.
            lengths: rows that each slot wants in this round; with None shapes are fixed and every slot has a row.
            active: int64 ``[R]``, the slots that have a row; all if None.
        """
        slots = torch.arange(len(self.known), device=self.known.device)
        if lengths is not None:
            slots = slots[[slot for slot in self.slots if lengths[slot] > 1]]
        if self._feature is None or not len(slots):
            return drafter(*inputs)
        within = slots if active is None else torch.searchsorted(active, slots)
        count = len(inputs[0]) // self._branches
        rows = (within + count * torch.arange(self._branches, device=within.device).unsqueeze(1)).flatten()
        feature, previous, _, t, y = inputs
        there = self._state[slots].repeat(self._branches, 1, 1, 1)
        further = (feature[rows], previous[rows], there, t[rows], y[rows])
        drafted = drafter(*(torch.cat(pair) for pair in zip(inputs, further, strict=True)))
        if drafted.shape != (len(feature) + len(rows), *feature.shape[1:]):
            return drafted
        # A row behind a refusal may hold anything; it must not spoil a draft.
        correction = (self._feature[:, slots].flatten(0, 1) - drafted[len(feature) :]).nan_to_num(0.0, 0.0, 0.0)
        known = self.known[slots].repeat(self._branches).view(-1, 1, 1)
        return drafted[: len(feature)].index_add(0, rows, torch.where(known, correction, 0.0).to(drafted.dtype))


class Drafts(NamedTuple):
    """What the drafting pass of a round leaves: ``states [S, L, ...]``, ``mean`` and ``std [S, L - 1, ...]``."""

    states: Tensor
    mean: Tensor
    std: Tensor


def draft_states(
    job: Job,
    drafter: Drafter,
    slots: Slots,
    steps: Tensor,
    columns: Tensor,
    lengths: list[int] | None,
    noise: Callable[[Tensor, int], Tensor],
    *,
    memory: DraftMemory | None,
    refused: RefusedDrafts | None,
) -> Drafts:
    """Draft L - 1 steps of every slot.

    Args:
        job: the job.
        drafter: drafts features.
        slots: where the images are.
        steps: int64 ``[S, L]``.
        columns: ``[S, L, 8]``, transition coefficients at ``steps``.
        lengths: rows that each slot wants, so that a shorter one drafts no further; None drafts all of all slots.
        noise: maps ``steps`` and a draft's number to standard normals ``[S, C, H, W]``.
        memory: the drafter's, where it has one.
        refused: drafts of the last round, which improve the first ones; not with a memory.
    """
    count, longest = steps.shape
    state, previous, labels = slots.state, slots.previous, slots.labels
    states, means, stds = [state], [], []
    if longest == 1:
        none = state.new_zeros(count, 0, *state.shape[1:])
        return Drafts(torch.stack(states, dim=1), none, none)
    timesteps = job.timesteps[steps]
    remembered = {} if memory is None else {"memory": memory}
    active: Tensor | None = None
    # Only the calls before a capture come without a parent: no image has one yet.
    feature = slots.parent
    if feature is None:
        feature = state.new_zeros(job.branches, count, *job.target.feature_shape)
    for j in range(longest - 1):
        drafting = None if lengths is None else [slot for slot, length in enumerate(lengths) if length > j + 1]
        if drafting is not None and len(drafting) < (count if active is None else len(active)):
            now = torch.tensor(drafting, device=steps.device)
            within = now if active is None else torch.searchsorted(active, now)
            feature, previous, state, labels = feature[:, within], previous[within], state[within], labels[within]
            active = now
        pick = (lambda rows: rows) if active is None else (lambda rows, chosen=active: rows[chosen])
        t, y = job.doubled(pick(timesteps[:, j])), job.branched(labels)
        inputs = (feature.flatten(0, 1), job.doubled(previous), job.doubled(state), t, y)
        if j > 0 or refused is None:
            drafted = drafter(*inputs, **remembered)
        else:
            drafted = refused.first_drafts(drafter, inputs, lengths, active)
        if drafted.shape != (len(t), *job.target.feature_shape):
            fail(job.where, "drafter's output", f"[R, T, D] = {[len(t), *job.target.feature_shape]}", drafted)
        mean, std = job.transition(state, job.head(drafted, t, y), pick(columns[:, j]))
        previous, state = state, torch.addcmul(mean, std, pick(noise(steps, j)))
        feature = drafted.unflatten(0, (job.branches, -1))
        for column, rows in ((states, state), (means, mean), (stds, std)):
            full = rows if active is None else rows.new_zeros(count, *rows.shape[1:]).index_copy_(0, active, rows)
            column.append(full)
    return Drafts(*(torch.stack(column, dim=1) for column in (states, means, stds)))
