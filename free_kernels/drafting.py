"""The drafting pass of a round: the drafter's features through the target's frozen head, one step after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from free_kernels.chain import Chain
from free_kernels.types import Drafter, DraftMemory
from free_kernels.validation import fail


class Drafts(NamedTuple):
    """What the drafting pass of a round leaves: ``states [S, L, ...]``, ``mean`` and ``std [S, L - 1, ...]``."""

    states: Tensor
    mean: Tensor
    std: Tensor


def draft_states(
    chain: Chain,
    drafter: Drafter,
    state: Tensor,
    previous: Tensor,
    parent: Tensor | None,
    labels: Tensor,
    steps: Tensor,
    columns: Tensor,
    lengths: list[int] | None,
    noise: Callable[[Tensor, int], Tensor],
    memory: DraftMemory | None,
) -> Drafts:
    """Draft L - 1 steps of every slot.

    Args:
        chain: the job.
        drafter: drafts features.
        state: ``[S, C, H, W]``, committed states.
        previous: ``[S, C, H, W]``, the states before them.
        parent: ``[B, S, T, D]``, exact features at ``previous``; None if no image has any yet.
        labels: int64 ``[S]``.
        steps: int64 ``[S, L]``.
        columns: ``[S, L, 8]``, transition coefficients at ``steps``.
        lengths: rows that each slot wants, so that a shorter one drafts no further; None drafts all of all slots.
        noise: maps ``steps`` and a draft's number to standard normals ``[S, C, H, W]``.
        memory: the drafter's, where it has one.
    """
    slots, longest = steps.shape
    states, means, stds = [state], [], []
    if longest == 1:
        none = state.new_zeros(slots, 0, *state.shape[1:])
        return Drafts(torch.stack(states, dim=1), none, none)
    timesteps = chain.timesteps[steps]
    remembered = {} if memory is None else {"memory": memory}
    active: Tensor | None = None
    # Only the calls before a capture come without a parent: no image has one yet.
    feature = state.new_zeros(chain.branches, slots, *chain.target.feature_shape) if parent is None else parent
    for j in range(longest - 1):
        drafting = None if lengths is None else [slot for slot, length in enumerate(lengths) if length > j + 1]
        if drafting is not None and len(drafting) < (slots if active is None else len(active)):
            now = torch.tensor(drafting, device=steps.device)
            within = now if active is None else torch.searchsorted(active, now)
            feature, previous, state, labels = feature[:, within], previous[within], state[within], labels[within]
            active = now
        pick = (lambda rows: rows) if active is None else (lambda rows, chosen=active: rows[chosen])
        t, y = chain.doubled(pick(timesteps[:, j])), chain.branched(labels)
        drafted = drafter(feature.flatten(0, 1), chain.doubled(previous), chain.doubled(state), t, y, **remembered)
        if drafted.shape != (len(t), *chain.target.feature_shape):
            fail(chain.where, "drafter's output", f"[R, T, D] = {[len(t), *chain.target.feature_shape]}", drafted)
        mean, std = chain.transition(state, chain.head(drafted, t, y), pick(columns[:, j]))
        previous, state = state, torch.addcmul(mean, std, pick(noise(steps, j)))
        feature = drafted.unflatten(0, (chain.branches, -1))
        for column, rows in ((states, state), (means, mean), (stds, std)):
            full = rows if active is None else rows.new_zeros(slots, *rows.shape[1:]).index_copy_(0, active, rows)
            column.append(full)
    return Drafts(*(torch.stack(column, dim=1) for column in (states, means, stds)))
