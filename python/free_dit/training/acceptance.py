"""Acceptance by look-ahead: the quality of a drafter, measured without a speculative sampler."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from free_dit.training.trajectories import Trajectories, guided_transition
from free_kernels.conditioning import hoisted
from free_kernels.protocols import (
    Drafter,
    DrafterDefaults,
    Schedule,
    Target,
    TargetDefaults,
    first_drafted_step,
    guided_channels,
    new_memory,
    unconditional_labels,
)


def shown_conditions(drafter: Any, target: Target) -> Any:
    """The drafter for the conditions of a target: a copy where these are no class labels, with the same weights."""
    pooled = TargetDefaults.read(target, "pooled")
    return drafter if pooled is None else DrafterDefaults.read(drafter, "conditioned")(pooled)


@torch.no_grad()
def acceptance_by_lookahead(
    target: Target, drafter: Drafter, schedule: Schedule, data: Trajectories, lookahead: int = 5
) -> Tensor:
    """Probability that a draft ``ahead`` steps past the last exact feature is accepted, ``[lookahead, K]``.

    Entry ``[a - 1, k]`` is the mean over images of ``2 Phi(-delta / 2)`` at step k when the parent feature is that of
    step k - a (for k = a - 1 what the drafter takes for one before the first step); NaN where no such draft exists.
    States are the target's own (a chain whose earlier drafts were all accepted has that law). With a learned variance,
    delta^2 is its mean over the shared slack, to leading order in the error of the variance. Corrections that
    ``sample`` makes after a refusal are not in it.
    A drafter with a memory has seen the steps up to k - a, each from the exact feature before it.
    """
    num_steps = schedule.num_steps
    device = data.states.device
    table = schedule.table(schedule.resolve_variance(target.learns_variance)).to(device)
    timesteps = schedule.timesteps.to(device)
    y = torch.cat([data.labels, unconditional_labels(target, data.labels)])
    guided = guided_channels(target)
    network: Target = hoisted(target, timesteps, y.unique())  # type: ignore[assignment]
    draft: Drafter = hoisted(shown_conditions(drafter, target), timesteps, y.unique())  # type: ignore[assignment]
    memory = new_memory(draft, len(data.labels), 2, lookahead)
    remembered = {} if memory is None else {"memory": memory}
    result = torch.full((lookahead, num_steps), float("nan"))
    for start in range(first_drafted_step(drafter), num_steps - 1):
        if start == 0:
            feature = drafter.initial_feature(data.states[0]).repeat(2, 1, 1)  # type: ignore[attr-defined]
        else:
            feature = data.features[start - 1].flatten(0, 1)
        drafts = min(lookahead, num_steps - 1 - start)
        for ahead in range(drafts):
            k = start + ahead
            t = timesteps[k].expand(len(y))
            previous, state = data.states[max(k - 1, 0)], data.states[k]
            both = torch.cat([previous, previous]), torch.cat([state, state])
            feature = draft(feature, *both, t, y, **remembered)
            output, columns = network.head(feature, t, y), table[k : k + 1]
            mean, std = guided_transition(state, output, columns, data.guidance, guided, schedule.clip)
            mean_sq = ((data.mean[k] - mean) / std).flatten(1).square().sum(1)
            variance_sq = ((data.std[k] / std).square() - 1).flatten(1).square().sum(1)
            delta = (mean_sq + variance_sq).sqrt()
            result[ahead, k] = (2 * torch.special.ndtr(-delta / 2)).mean()
        if memory is not None:
            # Of this start only the first draft, which came from an exact feature, is remembered for the next start.
            memory.rewind(torch.full_like(data.labels, drafts - 1))
    return result


def by_fifth(acceptance: Tensor) -> Tensor:
    """Means over the five fifths of the chain, ``[lookahead, 5]``."""
    return torch.stack([part.nanmean(1) for part in acceptance.tensor_split(5, dim=1)], dim=1)
