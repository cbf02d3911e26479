"""The drafting pass of a round: the drafter's features through the target's frozen head, one step after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from free_kernels.sampling.draft_sources import DraftInputs, Fresh
from free_kernels.sampling.job import Job
from free_kernels.sampling.slots import Slots


class Drafts(NamedTuple):
    """What the drafting pass of a round leaves: ``states [S, L, ...]``, ``mean`` and ``std [S, L - 1, ...]``."""

    states: Tensor
    mean: Tensor
    std: Tensor


def draft_states(
    job: Job,
    source: Fresh,
    slots: Slots,
    steps: Tensor,
    columns: Tensor,
    lengths: list[int] | None,
    noise: Callable[[Tensor, int], Tensor],
) -> Drafts:
    """Draft L - 1 steps of every slot.

    Args:
        job: the job.
        source: of features and outputs.
        slots: where the images are.
        steps: int64 ``[S, L]``.
        columns: ``[S, L, 8]``, transition coefficients at ``steps``.
        lengths: rows that each slot wants, so that a shorter one drafts no further; None drafts all of all slots.
        noise: maps ``steps`` and a draft's number to standard normals ``[S, C, H, W]``.
    """
    count, longest = steps.shape
    state, previous, labels = slots.state, slots.previous, slots.labels
    states, means, stds = [state], [], []
    if longest == 1:
        none = state.new_zeros(count, 0, *state.shape[1:])
        return Drafts(torch.stack(states, dim=1), none, none)
    timesteps = job.timesteps[steps]
    active: Tensor | None = None
    # Before the first round no image has a parent; only the warm-up calls of a capture draft then.
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
        inputs = DraftInputs(feature.flatten(0, 1), job.doubled(previous), job.doubled(state), t, y)
        drafted = source(j, inputs, active)
        mean, std = job.transition(state, drafted.output, pick(columns[:, j]))
        previous, state = state, torch.addcmul(mean, std, pick(noise(steps, j)))
        feature = drafted.feature.unflatten(0, (job.branches, -1))
        for column, rows in ((states, state), (means, mean), (stds, std)):
            full = rows if active is None else rows.new_zeros(count, *rows.shape[1:]).index_copy_(0, active, rows)
            column.append(full)
    return Drafts(*(torch.stack(column, dim=1) for column in (states, means, stds)))
