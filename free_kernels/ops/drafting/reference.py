"""The drafting ops in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from free_kernels.ops.coupling.reference import (
    LOG_STD,
    LOG_STD_SLOPE,
    MEAN_FROM_STATE_GIVEN_X0,
    MEAN_FROM_X0,
    X0_FROM_OUTPUT,
    X0_FROM_STATE,
    gaussian_transition,
    guide,
    unpack_rows,
)
from free_kernels.ops.drafting.arguments import (
    AdvanceArguments,
    CorrectArguments,
    ErrorArguments,
    FindArguments,
    JoinArguments,
    KeepArguments,
    KeepCleanArguments,
    OpenArguments,
    Opened,
    RenewArguments,
    ReplayArguments,
    RowArguments,
    TallyArguments,
)

# What a squared gap that is not finite counts as in the sums of a run.
LARGEST_GAP_SQ = 1e30
# What a step's response weighs in the next step's averages: about three steps count. Elements' own, and whether those
# are right, are known less well from one step, and about ten count.
RESPONSE_DECAY, PATTERN_DECAY = 0.7, 0.9
# For how many steps with a response of the average counts, before an element has one of its own.
PATTERN_PRIOR = 1.0


def open_round(a: OpenArguments) -> Opened:
    """See ``free_kernels.ops.drafting.api.open_round``."""
    ahead = torch.arange(a.length, device=a.current.device)
    steps = (a.current.unsqueeze(1) + ahead).clamp_(max=len(a.timesteps) - 1)
    states = a.state.new_zeros(len(a.state), a.length, *a.state.shape[1:])
    states[:, 0] = a.state
    mean = torch.zeros_like(states[:, 1:])
    return Opened(steps, a.timesteps[steps], a.table[steps], states, mean, torch.zeros_like(mean))


def draft_rows(a: RowArguments) -> tuple[Tensor, Tensor]:
    """See ``free_kernels.ops.drafting.api.draft_rows``."""
    state, t = a.states[:, a.draft], a.timesteps[:, a.draft]
    if a.active is not None:
        state, t = state[a.active], t[a.active]
    return state.repeat(a.branches, 1, 1, 1), t.repeat(a.branches)


def advance_drafts(a: AdvanceArguments) -> None:
    """See ``free_kernels.ops.drafting.api.advance_drafts``."""
    branches = 1 if a.guidance_scale == 1.0 else 2
    output = a.output.unflatten(0, (branches, -1))
    settings = {
        "guidance_scale": a.guidance_scale,
        "guidance_channels": a.guidance_channels,
        "clip": a.clip,
    }
    for j in range(a.first, a.end):
        row = a.rows[:, j]
        said = output[:, row.clamp(min=0)].flatten(0, 1)
        mean, std = gaussian_transition(a.states[:, j], said, a.columns[:, j], **settings)
        after = torch.addcmul(mean, std, a.noise[:, j])
        drafted = (row >= 0).view(-1, 1, 1, 1)
        for buffer, place, rows in ((a.mean, j, mean), (a.std, j, std), (a.states, j + 1, after)):
            buffer[:, place] = torch.where(drafted, rows, buffer[:, place])


def response_unit(from_state: Tensor) -> Tensor:
    """What responses are measured in: how far a clean sample moves with the state if the network's output stays.

    A network that predicts the clean sample itself does not move it then; there it is 1.
    """
    return torch.where(from_state > 0, from_state, 1.0)


def averages_of(response: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What sums ``[S, 3, 2]`` hold, each ``[S, 1, 1, 1]``: responses to new and to other noise, and elements' share.

    Where nothing is known of the second it is taken for the first.
    """
    total, weight = response.view(-1, 3, 2, 1, 1, 1).unbind(2)
    to_new, to_other, share = torch.where(weight > 0, total / weight, 0.0).clamp(min=0.0).unbind(1)
    return to_new, torch.where(weight[:, 1] > 0, to_other, to_new), share.clamp(max=1.0)


def own_responses(to_new: Tensor, pattern: Tensor) -> Tensor:
    """What sums ``[S, 2, C, H, W]`` say of each element's response, with the average for a step of theirs."""
    along, length = pattern.unbind(1)
    return ((along + PATTERN_PRIOR * to_new) / (length + PATTERN_PRIOR)).clamp(min=0.0)


def replay_drafts(a: ReplayArguments) -> None:
    """See ``free_kernels.ops.drafting.api.replay_drafts``."""
    length, channels = a.states.shape[1:3]
    last = len(a.table) - 1

    def column(step: Tensor, which: int) -> Tensor:
        return a.table[step.clamp(0, last), which].view(-1, 1, 1, 1)

    def held(place: Tensor) -> tuple[Tensor, Tensor]:
        return a.held_states[place.clamp(min=0)], a.held_clean[place.clamp(min=0)]

    state, said = held(a.before)
    known = (a.before >= 0).view(-1, 1, 1, 1)
    # Without a row before the sums are those of the slot's last image.
    average, to_other, share = averages_of(a.response)
    to_new = torch.addcmul(average, share, own_responses(average, a.pattern) - average)
    to_new, to_other = (torch.where(known, response, 0.0) for response in (to_new, to_other))
    # A row that is not there may hold anything.
    said = torch.where(known, said, 0.0)
    mean = (
        column(a.steps - 1, MEAN_FROM_X0) * said[:, :channels] + column(a.steps - 1, MEAN_FROM_STATE_GIVEN_X0) * state
    )
    mean = torch.where(known, mean, a.states[:, 0])
    for j in range(length - 1):
        state, at, response = a.states[:, j], mean, to_new
        if j < a.latest.shape[1]:
            there, known = held(a.latest[:, j])
            served = (a.latest[:, j] >= 0).view(-1, 1, 1, 1)
            at, said = torch.where(served, there, at), torch.where(served, known, said)
            response = torch.where(served, to_other, to_new)
        step = a.steps + j
        here = response * response_unit(column(step, X0_FROM_STATE))
        clean = torch.addcmul(said[:, :channels], here, state - at).clamp(-a.clip, a.clip)
        said = torch.cat([clean, said[:, channels:]], 1)
        mean = column(step, MEAN_FROM_X0) * clean + column(step, MEAN_FROM_STATE_GIVEN_X0) * state
        log_std = column(step, LOG_STD)
        if said.shape[1] > channels:
            log_std = torch.addcmul(log_std, column(step, LOG_STD_SLOPE), said[:, channels:])
        std = log_std.exp().expand_as(mean)
        a.mean[:, j], a.std[:, j] = mean, std
        a.states[:, j + 1] = torch.addcmul(mean, std, a.noise[:, j])


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


def _take_places(a: KeepArguments | KeepCleanArguments, finite: Tensor, ahead: int) -> Tensor:
    """Give the rows of a round that are kept their places, and keep their states.

    Args:
        a: the arguments.
        finite: bool ``[S, L]``, rows that may be used.
        ahead: how many rows behind the last committed one are kept.

    Returns:
        Where each row goes among all, int64 ``[S L]``; those that are not kept share a place.
    """
    slots, places = a.at.shape
    rows, j = places - 1, torch.arange(a.states.shape[1], device=a.steps.device)
    behind = j - a.committed.unsqueeze(1)
    taken = (behind >= -1) & (behind < ahead) & (j < a.lengths.unsqueeze(1))
    step = a.steps.unsqueeze(1) + j
    first = torch.arange(slots, device=j.device).unsqueeze(1) * places
    place = (torch.where(taken, step % rows, rows) + first).flatten()
    a.at.view(-1).index_copy_(0, place, torch.where(taken & finite, step, -1).flatten())
    a.held_states.flatten(0, 1).index_copy_(0, place, a.states.flatten(0, 1))
    return place


def keep_rows(a: KeepArguments) -> None:
    """See ``free_kernels.ops.drafting.api.keep_rows``."""
    slots, branches = a.at.shape[0], a.held_features.shape[0]
    features = a.features.unflatten(0, (branches, -1))
    output = a.output.unflatten(0, (branches, -1))
    j = torch.arange(a.states.shape[1], device=a.steps.device)
    packed = (a.row_offsets[:-1].unsqueeze(1) + j).clamp_(max=features.shape[1] - 1).flatten()
    features, output = features.index_select(1, packed), output.index_select(1, packed)
    finite = features.isfinite().flatten(2).all(2).all(0) & output.isfinite().flatten(2).all(2).all(0)
    place = _take_places(a, finite.view(slots, -1), a.at.shape[1] - 2)
    a.held_features.flatten(1, 2).index_copy_(1, place, features)


def keep_clean_rows(a: KeepCleanArguments) -> None:
    """See ``free_kernels.ops.drafting.api.keep_clean_rows``."""
    slots, length, channels = a.states.shape[:3]
    branches = 1 if a.guidance_scale == 1.0 else 2
    output = unpack_rows(a.output, a.row_offsets, branches, slots, length)
    if branches == 2:
        output = guide(output, a.guidance_scale, a.guidance_channels)
    output = output.float().unflatten(0, (slots, length))
    step = a.steps.unsqueeze(1) + torch.arange(length, device=a.steps.device)
    column = a.table[step.clamp(max=len(a.table) - 1)].view(slots, length, -1, 1, 1, 1).unbind(2)
    unclipped = torch.addcmul(column[X0_FROM_STATE] * a.states, column[X0_FROM_OUTPUT], output[:, :, :channels])
    clean = unclipped.clamp(-a.clip, a.clip)
    _add_responses(a, clean, column)
    said = torch.cat([clean, output[:, :, channels:]], 2)
    finite = unclipped.isfinite().flatten(2).all(2) & said.isfinite().flatten(2).all(2)
    place = _take_places(a, finite, a.at.shape[1] - 3)
    a.held_clean.flatten(0, 1).index_copy_(0, place, said.flatten(0, 1))


def _add_responses(a: KeepCleanArguments, clean: Tensor, column: tuple[Tensor, ...]) -> None:
    """Take what the committed steps of each slot say of the responses into their sums."""
    (slots, places), (length, channels) = a.at.shape, clean.shape[1:3]
    every = torch.arange(slots, device=a.steps.device)

    def held(place: Tensor) -> tuple[Tensor, Tensor]:
        return a.held_states.flatten(0, 1)[place], a.held_clean.flatten(0, 1)[place, :channels]

    new_image = ((a.steps == 0) & (a.committed >= 1)).view(-1, 1, 1)
    sums = torch.where(new_image, 0.0, a.response)
    pattern = torch.where(new_image[..., None, None], 0.0, a.pattern)
    # What rounds before say, which this round's steps test.
    average, _, _ = averages_of(sums)
    apart = own_responses(average, pattern) - average
    old_state, old_clean = held(a.before.clamp(min=0))
    before = a.table[(a.steps - 1).clamp(0, len(a.table) - 1)].view(slots, -1, 1, 1, 1)
    from_clean, from_state, known = before[:, MEAN_FROM_X0], before[:, MEAN_FROM_STATE_GIVEN_X0], a.before >= 0
    for j in range(length):
        state, said, taken = a.states[:, j], clean[:, j], j < a.committed
        unit, step = response_unit(column[X0_FROM_STATE][:, j]), a.steps + j
        place = step % (places - 1) + every * places
        there, then = held(place)
        other, _, again = _ratio(state - there, (said - then) / unit)
        again = again & taken & (a.at.view(-1)[place] == step)
        moved = state - torch.addcmul(from_clean * old_clean, from_state, old_state)
        changed = (said - old_clean) / unit
        ratio, length_sq, new = _ratio(moved, changed)
        new = new & taken & known
        gap = apart * moved
        fits = torch.stack([gap * torch.addcmul(changed, -average, moved), gap.square()], 1).flatten(2).sum(2)
        fits = fits / length_sq.unsqueeze(1)
        one = torch.ones_like(ratio)
        added = torch.stack([torch.stack([ratio, one], 1), torch.stack([other, one], 1), fits], 1)
        told = torch.stack([new, again, new & fits.isfinite().all(1)], 1).unsqueeze(2)
        decay = sums.new_tensor([RESPONSE_DECAY, RESPONSE_DECAY, PATTERN_DECAY]).view(3, 1)
        sums = torch.where(told, decay * sums + added, sums)
        products = torch.stack([moved * changed, moved.square()], 1)
        weight = (moved[0].numel() / length_sq).view(-1, 1, 1, 1, 1)
        pattern = torch.where(new.view(-1, 1, 1, 1, 1), PATTERN_DECAY * pattern + weight * products, pattern)
        old_state, old_clean, known = state, said, torch.ones_like(known)
        from_clean, from_state = column[MEAN_FROM_X0][:, j], column[MEAN_FROM_STATE_GIVEN_X0][:, j]
    a.response.copy_(sums)
    a.pattern.copy_(pattern)


def _ratio(moved: Tensor, changed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``<moved, changed> / |moved|^2`` of rows, ``|moved|^2``, and whether they say something: all is finite."""
    length_sq = moved.square().flatten(1).sum(1)
    ratio = (moved * changed).flatten(1).sum(1) / length_sq
    weight = moved[0].numel() / length_sq
    return ratio, length_sq, ratio.isfinite() & weight.isfinite() & (weight > 0)


def find_rows(a: FindArguments) -> None:
    """See ``free_kernels.ops.drafting.api.find_rows``."""
    (slots, places), width = a.at.shape, a.places.shape[1]
    rows, first = places - 1, torch.arange(slots, device=a.steps.device) * places
    a.at.masked_fill_((a.steps == 0).unsqueeze(1), -1)
    step = a.steps.unsqueeze(1) + torch.arange(width, device=a.steps.device)
    place = step % rows + first.unsqueeze(1)
    unbroken = (a.at.view(-1)[place] == step).to(torch.int64).cumprod(1)
    a.places.copy_(torch.where(unbroken > 0, place, -1))
    a.ahead.copy_(unbroken.sum(1))
    place = (a.steps - 1) % rows + first
    a.before.copy_(torch.where((a.steps > 0) & (a.at.view(-1)[place] == a.steps - 1), place, -1))


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
