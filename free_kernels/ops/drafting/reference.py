"""The drafting ops in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from free_kernels.ops.coupling.reference import gaussian_transition
from free_kernels.ops.drafting.arguments import (
    AdvanceArguments,
    CorrectArguments,
    ErrorArguments,
    FindArguments,
    FollowArguments,
    JoinArguments,
    KeepArguments,
    OpenArguments,
    RenewArguments,
    RowArguments,
    TallyArguments,
)

# What a squared gap that is not finite counts as in the sums of a run.
LARGEST_GAP_SQ = 1e30


def open_round(a: OpenArguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ``free_kernels.ops.drafting.api.open_round``."""
    ahead = torch.arange(a.length, device=a.current.device)
    steps = (a.current.unsqueeze(1) + ahead).clamp_(max=len(a.timesteps) - 1)
    states = a.state.new_zeros(len(a.state), a.length, *a.state.shape[1:])
    states[:, 0] = a.state
    return steps, a.timesteps[steps], a.table[steps], states


def draft_rows(a: RowArguments) -> tuple[Tensor, Tensor]:
    """See ``free_kernels.ops.drafting.api.draft_rows``."""
    state, t = a.states[:, a.draft], a.timesteps[:, a.draft]
    if a.active is not None:
        state, t = state[a.active], t[a.active]
    return state.repeat(a.branches, 1, 1, 1), t.repeat(a.branches)


def share_of_way(state: Tensor, latest: Tensor, replaced: Tensor) -> Tensor:
    """How far states ``[S, D]`` lie along the way from replaced to latest rows, in its lengths, held in [-1, 1]."""
    way = latest - replaced
    along = ((state - latest) * way).sum(1)
    return (along / way.square().sum(1).clamp(min=torch.finfo(way.dtype).tiny)).clamp(-1.0, 1.0)


def advance_drafts(a: AdvanceArguments) -> Tensor:
    """See ``free_kernels.ops.drafting.api.advance_drafts``."""
    slots = a.states.shape[0]
    branches = 1 if a.guidance_scale == 1.0 else 2
    output = a.output.unflatten(0, (branches, -1))
    shares = a.states.new_zeros(slots, a.end - a.first if a.replaced is not None else 0)
    settings = {
        "guidance_scale": a.guidance_scale,
        "guidance_channels": a.guidance_channels,
        "clip": a.clip,
    }
    for j in range(a.first, a.end):
        row = a.rows[:, j]
        drafted = row >= 0
        row, state = row.clamp(min=0), a.states[:, j]
        said = output[:, row].float()
        if a.replaced is not None:
            before = a.replaced[:, j].clamp(min=0)
            share = share_of_way(state.flatten(1), a.asked[row].flatten(1), a.asked[before].flatten(1))
            share = torch.where(drafted & (a.replaced[:, j] >= 0), share, 0.0)
            known = (a.replaced[:, j] >= 0).view(-1, 1, 1, 1)
            ahead = said + share.view(-1, 1, 1, 1) * (said - output[:, before].float())
            said = torch.where(known, ahead, said)
            shares[:, j - a.first] = share
        mean, std = gaussian_transition(state, said.flatten(0, 1), a.columns[:, j], **settings)
        after = torch.addcmul(mean, std, a.noise[:, j])
        drafted = drafted.view(-1, 1, 1, 1)
        for buffer, place, rows in ((a.mean, j, mean), (a.std, j, std), (a.states, j + 1, after)):
            buffer[:, place] = torch.where(drafted, rows, buffer[:, place])
    return shares


def follow_features(a: FollowArguments) -> Tensor:
    """See ``free_kernels.ops.drafting.api.follow_features``."""
    known = a.ahead.clamp(max=a.share.shape[1])
    last = (known - 1).clamp_(min=0).unsqueeze(1)
    latest, replaced = (places.gather(1, last).squeeze(1) for places in (a.latest, a.replaced))
    shape = (1, -1, 1, 1)
    feature = a.features.index_select(1, latest.clamp(min=0)).float()
    way = feature - a.features.index_select(1, replaced.clamp(min=0)).float()
    ahead = feature + a.share.gather(1, last).view(shape) * way
    # A row that is not there may hold anything.
    feature = torch.where((replaced >= 0).view(shape), ahead, feature)
    return torch.where((known > 0).view(shape), feature.to(a.parent.dtype), a.parent)


def join_rows(a: JoinArguments) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See ``free_kernels.ops.drafting.api.join_rows``."""
    branches = a.features.shape[0]
    # By draft, then slot.
    now = a.latest[:, : a.drafts].T.flatten().clamp(min=0)
    past = torch.cat([a.before, now])[: len(now)].clamp(min=0)
    t, y = a.timesteps[:, : a.drafts].T.flatten(), a.labels.repeat(a.drafts)
    if a.chosen is not None:
        now, past, t, y = now[a.chosen], past[a.chosen], t[a.chosen], y[a.chosen]
    null = [] if a.null_label is None else [torch.full_like(y, a.null_label)]
    further = (
        a.features.index_select(1, past).flatten(0, 1).to(a.feature.dtype),
        a.asked.index_select(0, past).repeat(branches, 1, 1, 1),
        a.asked.index_select(0, now).repeat(branches, 1, 1, 1),
        t.repeat(branches),
        torch.cat([y, *null]),
    )
    return tuple(torch.cat(pair) for pair in zip(a[:5], further, strict=True))


def row_errors(a: ErrorArguments) -> Tensor:
    """See ``free_kernels.ops.drafting.api.row_errors``."""
    branches, (slots, _) = a.features.shape[0], a.latest.shape
    now = a.latest[:, : a.drafts].T.flatten().clamp(min=0)
    exact = a.features.index_select(1, now if a.chosen is None else now[a.chosen])
    there = a.drafted[a.inputs :].unflatten(0, (branches, -1))
    errors = exact.to(there.dtype) - there
    errors = torch.where(errors.isfinite(), errors, 0.0)
    if a.chosen is not None:
        full = errors.new_zeros(branches, len(now), *errors.shape[2:])
        errors = full.index_copy_(1, a.chosen, errors)
    return errors.unflatten(1, (a.drafts, slots))


def nearer(state: Tensor, previous: Tensor, there: Tensor) -> Tensor:
    """Whether states are nearer to refused rows than to the states before them, bool ``[R]``."""
    apart, step = ((state - other).flatten(1).square().sum(1) for other in (there, previous))
    return apart < step


def correct_features(a: CorrectArguments) -> Tensor:
    """See ``free_kernels.ops.drafting.api.correct_features``."""
    place, errors = a.latest[:, a.draft], a.errors[:, a.draft]
    if a.active is not None:
        place, errors = place[a.active], errors[:, a.active]
    there = a.asked[place.clamp(min=0)]
    serves = ((place >= 0) & nearer(a.state, a.previous, there)).view(-1, 1, 1)
    return a.drafted + torch.where(serves, errors, 0.0).flatten(0, 1)


def keep_rows(a: KeepArguments) -> None:
    """See ``free_kernels.ops.drafting.api.keep_rows``."""
    generations, slots, places = a.at.shape
    branches, rows = a.held_features.shape[0], places - 1
    features = a.features.unflatten(0, (branches, -1))
    output = a.output.unflatten(0, (branches, -1))
    j = torch.arange(a.states.shape[1], device=a.steps.device)
    packed = (a.row_offsets[:-1].unsqueeze(1) + j).clamp_(max=features.shape[1] - 1).flatten()
    features, output = features.index_select(1, packed), output.index_select(1, packed)
    finite = features.isfinite().flatten(2).all(2).all(0) & output.isfinite().flatten(2).all(2).all(0)
    behind = j - a.committed.unsqueeze(1)
    taken = (behind >= -1) & (behind < rows - 1) & (j < a.lengths.unsqueeze(1))
    step = a.steps.unsqueeze(1) + j
    first = torch.arange(slots, device=j.device).unsqueeze(1) * places
    place = (torch.where(taken, step % rows, rows) + first).flatten()
    turn = (a.turn.view(-1).index_select(0, place) + 1) % generations
    a.turn.view(-1).index_copy_(0, place, turn)
    index = place + turn * a.turn.numel()
    a.at.view(-1).index_copy_(0, index, torch.where(taken & finite.view(slots, -1), step, -1).flatten())
    a.held_states.flatten(0, 2).index_copy_(0, index, a.states.flatten(0, 1))
    a.held_features.flatten(1, 3).index_copy_(1, index, features)
    if a.held_output is not None:
        a.held_output.flatten(1, 3).index_copy_(1, index, output)


def find_rows(a: FindArguments) -> None:
    """See ``free_kernels.ops.drafting.api.find_rows``."""
    generations, slots, places = a.at.shape
    rows = places - 1
    a.at.masked_fill_((a.steps == 0).unsqueeze(1), -1)
    step = a.steps.unsqueeze(1) + torch.arange(rows - 1, device=a.steps.device)
    place = step % rows + torch.arange(slots, device=step.device).unsqueeze(1) * places
    turn = a.turn.view(-1)[place]
    for generation in range(generations):
        index = place + ((turn + generation) % generations) * a.turn.numel()
        held = torch.where(a.at.view(-1)[index] == step, index, -1)
        if generation == 0:
            unbroken = (held >= 0).to(torch.int64).cumprod(1)
        a.places[generation] = torch.where(unbroken > 0, held, -1)
    a.ahead.copy_(unbroken.sum(1))
    place = (a.steps - 1) % rows + torch.arange(slots, device=step.device) * places
    a.before.copy_(place + a.turn.view(-1)[place] * a.turn.numel())


def tally_round(a: TallyArguments) -> Tensor:
    """See ``free_kernels.ops.drafting.api.tally_round``."""
    drafts = a.gap_sq.shape[1]
    if drafts:
        j = torch.arange(drafts, device=a.steps.device)
        tested = j < torch.minimum(a.committed, a.lengths - 1).unsqueeze(1)
        known = torch.where(tested, a.gap_sq, 0.0).nan_to_num(LARGEST_GAP_SQ, LARGEST_GAP_SQ)
        step = (a.steps.unsqueeze(1) + j).clamp_(max=len(a.deviation) - 1)
        a.deviation.index_add_(0, step.flatten(), known.flatten())
    finite = a.output.isfinite().all() & a.next_states.isfinite().all()
    return finite.to(torch.int64).view(1)


def renew_slots(a: RenewArguments) -> Tensor:
    """See ``free_kernels.ops.drafting.api.renew_slots``."""
    fresh = a.steps == 0
    a.indices.copy_(a.numbers.index_select(0, a.images.clamp(min=0)))
    a.rounds.add_(1).masked_fill_(fresh, 0)
    return fresh
