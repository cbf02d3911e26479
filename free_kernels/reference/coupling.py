"""Gaussian transitions and reflection maximal coupling in plain PyTorch."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

# Positions of the columns of a transition table (free_kernels.schedule.TransitionColumn), repeated as plain ints
# because the implementations depend on nothing above them.
MEAN_FROM_STATE, MEAN_FROM_OUTPUT, LOG_STD, LOG_STD_SLOPE = 0, 1, 2, 3
X0_FROM_STATE, X0_FROM_OUTPUT, MEAN_FROM_X0, MEAN_FROM_STATE_GIVEN_X0 = 4, 5, 6, 7


# A squared gap beyond which a draft is refused outright: its acceptance probability is zero in any arithmetic.
MAX_GAP_SQ = 1e30


class Coupling(NamedTuple):
    """Outcome of one round for S slots with at most L rows each.

    Figures of rows behind a slot's first refusal are not to be used: whatever they steer would break exactness.

    Attributes:
        next_states: ``[S, C, H, W]``, the state after the committed steps; undefined where ``committed`` is 0.
        committed: int64 ``[S]``, steps committed, in ``[0, L]``; 0 for an idle slot.
        gap_sq: ``[S, L - 1]``, delta^2 of each draft's test (whitened, given the shared slack).
        variance_figures: ``[3, S, L - 1]`` where the variance is learned: squared whitened gap of the means, sum of
            squared relative variance errors, largest relative shrinkage of the variance; else None. Not finite where
            a draft was far off.
    """

    next_states: Tensor
    committed: Tensor
    gap_sq: Tensor
    variance_figures: Tensor | None


def guide(output: Tensor, scale: float, channels: int) -> Tensor:
    """Classifier-free guidance: ``[2R, ...]`` (conditional rows, then unconditional) to ``[R, ...]``.

    The first ``channels`` channels become ``e_u + scale (e_c - e_u)``, the rest are the conditional branch's.
    """
    conditional, unconditional = output.float().chunk(2)
    if channels == output.shape[1]:
        return torch.lerp(unconditional, conditional, scale)
    mixed = torch.lerp(unconditional[:, :channels], conditional[:, :channels], scale)
    return torch.cat([mixed, conditional[:, channels:]], dim=1)


def gaussian_transition(
    state: Tensor, output: Tensor, columns: Tensor, *, guidance_scale: float, guidance_channels: int, clip: float
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the next state; see ``free_kernels.ops.gaussian_transition``."""
    if guidance_scale != 1.0:
        output = guide(output, guidance_scale, guidance_channels)
    channels = state.shape[-3]
    learned = output.shape[-3] == 2 * channels
    prediction = output.narrow(-3, 0, channels).float()
    column = columns.unsqueeze(-1).unsqueeze(-1).unsqueeze(-1).unbind(1)
    if math.isinf(clip):
        mean = torch.addcmul(column[MEAN_FROM_STATE] * state, column[MEAN_FROM_OUTPUT], prediction)
    else:
        x0 = torch.addcmul(column[X0_FROM_STATE] * state, column[X0_FROM_OUTPUT], prediction).clamp_(-clip, clip)
        mean = torch.addcmul(column[MEAN_FROM_STATE_GIVEN_X0] * state, column[MEAN_FROM_X0], x0)
    if not learned:
        return mean, column[LOG_STD].exp().expand_as(mean)
    variance = output.narrow(-3, channels, channels).float()
    return mean, torch.addcmul(column[LOG_STD], column[LOG_STD_SLOPE], variance).exp_()


def unpack_rows(rows: Tensor, row_offsets: Tensor, branches: int, slots: int, length: int) -> Tensor:
    """Packed rows ``[B R, ...]`` to a dense ``[B S L, ...]``; entries past a slot's length repeat some other row."""
    total = rows.shape[0] // branches
    position = torch.arange(length, device=rows.device)
    index = (row_offsets[:-1, None] + position).clamp_(max=total - 1).flatten()
    return rows.unflatten(0, (branches, total)).index_select(1, index).flatten(0, 1)


def target_rows(
    draft_states: Tensor,
    output: Tensor,
    row_offsets: Tensor,
    columns: Tensor,
    *,
    guidance_scale: float,
    guidance_channels: int,
    clip: float,
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation ``[S, L, D]`` that the target gives the step after each row, D = C H W."""
    slots, length = draft_states.shape[:2]
    output = unpack_rows(output, row_offsets, 1 if guidance_scale == 1.0 else 2, slots, length)
    mean, std = gaussian_transition(
        draft_states.flatten(0, 1),
        output,
        columns.flatten(0, 1),
        guidance_scale=guidance_scale,
        guidance_channels=guidance_channels,
        clip=clip,
    )
    return mean.view(slots, length, -1), std.reshape(slots, length, -1)


class Whitened(NamedTuple):
    """The drafted rows of a round in units in which, given the shared slack, draft and target have unit covariance.

    Attributes:
        start: ``[S, L - 1, D]``, the target's mean given the shared slack.
        root: ``[S, L - 1, D]``, the deviation of both given the shared slack.
        z1: ``[S, L - 1, D]``, the draft's own noise; the draft is ``start + root (z1 - gap)``.
        gap: ``[S, L - 1, D]``, Delta.
        gap_sq: ``[S, L - 1]``, delta^2.
        along: ``[S, L - 1]``, ``<z1, Delta>``.
        infeasible: bool ``[S, L - 1]``, rows without shared slack: their draft is refused, their step drawn directly.
        figures: as ``Coupling.variance_figures``.
    """

    start: Tensor
    root: Tensor
    z1: Tensor
    gap: Tensor
    gap_sq: Tensor
    along: Tensor
    infeasible: Tensor
    figures: Tensor | None


def whiten(
    mean_q: Tensor,
    std_q: Tensor,
    draft_mean: Tensor,
    draft_std: Tensor,
    noise: Tensor,
    slack_noise: Tensor | None,
    slack: Tensor | None,
) -> Whitened:
    """Split the drafts' noise into what is shared with the target and what is decided on; ``mean_q [S, L, D]``."""
    drafts = draft_mean.shape[1]
    std_p = draft_std.flatten(2)
    gap_mean = mean_q[:, :drafts] - draft_mean.flatten(2)
    z = noise.flatten(2)[:, :drafts]
    if slack is None:
        root, start, z1 = std_p, mean_q[:, :drafts], z
        gap = gap_mean / root
        figures = None
    else:
        share = slack[:, :drafts, None]
        own, other = share.sqrt(), (1 - share).sqrt()
        z_slack = slack_noise.flatten(2)[:, :drafts]
        z1 = own * z + other * z_slack
        z2 = other * z - own * z_slack
        ratio = (std_q[:, :drafts] / std_p).square_()
        excess = ratio - share
        # In units of the draft's deviation: the target keeps the same z2 with what its variance leaves over.
        shift = (excess.clamp(min=0).sqrt_() - other) * z2
        whitened = gap_mean / std_p
        root = own * std_p
        gap = (whitened + shift) / own
        start = torch.addcmul(mean_q[:, :drafts], std_p, shift + other * z2)
        smallest = excess.amin(-1)
        mean_gap_sq, error_sq = whitened.square_().sum(-1), (ratio - 1).square_().sum(-1)
        # Also refused: drafts so far off that the arithmetic would overflow. The rule must not look at z2.
        infeasible = ~((smallest >= 0) & (mean_gap_sq + error_sq < MAX_GAP_SQ))
        figures = torch.stack([mean_gap_sq, error_sq, 1 - share.squeeze(-1) - smallest])

    gap_sq = gap.square().sum(-1)
    if slack is None:
        infeasible = ~(gap_sq < MAX_GAP_SQ)
    return Whitened(start, root, z1, gap, gap_sq, (z1 * gap).sum(-1), infeasible, figures)


def couple(
    draft_states: Tensor,
    draft_mean: Tensor,
    draft_std: Tensor,
    noise: Tensor,
    slack_noise: Tensor | None,
    uniform: Tensor,
    output: Tensor,
    row_offsets: Tensor,
    columns: Tensor,
    slack: Tensor | None,
    relaxation: Tensor | None,
    *,
    guidance_scale: float,
    guidance_channels: int,
    clip: float,
) -> Coupling:
    """Decide and commit one round; see ``free_kernels.ops.couple``."""
    slots, length = draft_states.shape[:2]
    latent = draft_states.shape[2:]
    lengths = row_offsets.diff()
    mean_q, std_q = target_rows(
        draft_states,
        output,
        row_offsets,
        columns,
        guidance_scale=guidance_scale,
        guidance_channels=guidance_channels,
        clip=clip,
    )
    direct = torch.addcmul(mean_q, std_q, noise.flatten(2))
    if length == 1:
        return Coupling(direct.view(slots, *latent), lengths.clamp(max=1), direct.new_zeros(slots, 0), None)

    drafts, last = length - 1, lengths - 1
    start, root, z1, gap, gap_sq, along, infeasible, figures = whiten(
        mean_q, std_q, draft_mean, draft_std, noise, slack_noise, slack
    )
    if relaxation is None:
        score = along - gap_sq / 2
    else:
        keep = 1 - relaxation[:, :drafts]
        score = keep * along - keep.square() * gap_sq / 2
    accepted = uniform[:, :drafts].log() <= score
    accepted &= ~infeasible
    # The first row that stops: a refused draft, or the last row. `cumprod` counts the accepted drafts before it.
    accepted &= torch.arange(drafts, device=direct.device) < last[:, None]
    first = accepted.cumprod(1).sum(1)

    # Only the row where a slot stops needs a new state: a reflection if its draft was refused, else a direct draw.
    rows = torch.arange(slots, device=direct.device)
    draft_row = first.clamp(max=drafts - 1)
    coefficient = 2 * along[rows, draft_row] / gap_sq[rows, draft_row]
    picked = gap[rows, draft_row]
    mirrored = torch.addcmul(z1[rows, draft_row], coefficient[:, None], picked, value=-1)
    reflected = torch.addcmul(start[rows, draft_row], root[rows, draft_row], mirrored)
    is_direct = (first >= last) | infeasible[rows, draft_row]
    next_states = torch.where(is_direct[:, None], direct[rows, first], reflected)
    committed = (first + 1) * (lengths > 0)
    return Coupling(next_states.view(slots, *latent), committed, gap_sq, figures)
