"""Gaussian transitions and reflection maximal coupling in plain PyTorch."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from free_kernels.constants import TransitionColumn
from free_kernels.ops.coupling.arguments import Coupling, CouplingArguments

# The columns of a transition table as plain ints: torch.compile cannot index by an enumeration.
MEAN_FROM_STATE, MEAN_FROM_OUTPUT, LOG_STD, LOG_STD_SLOPE, *_OF_CLEAN_SAMPLE = map(int, TransitionColumn)
X0_FROM_STATE, X0_FROM_OUTPUT, MEAN_FROM_X0, MEAN_FROM_STATE_GIVEN_X0 = _OF_CLEAN_SAMPLE
# A draft with a larger squared gap is refused without a test: its acceptance probability rounds to zero.
MAX_GAP_SQ = 1e30
# In units of the draft's variance. ACROSS: what is compared in directions orthogonal to the gap of the means; the rest
# is shared with the target. One half gives the highest acceptance where variances differ. LEAST_SHARED: what is shared
# along the gap at least, because roots of smaller numbers would magnify rounding errors. LEAST_LEFT: by how much the
# target's variance must exceed ACROSS, else the draft is refused without a test. SMALLEST_MEAN_GAP_SQ: means with a
# smaller squared gap give no direction.
ACROSS, LEAST_LEFT, LEAST_SHARED, SMALLEST_MEAN_GAP_SQ = 0.5, 1 / 64, 1 / 1024, 1e-24


def guide(output: Tensor, scale: float, channels: int) -> Tensor:
    """Classifier-free guidance: ``[2R, ...]`` (conditional rows, then unconditional) to ``[R, ...]``.

    The first ``channels`` channels become ``e_u + scale (e_c - e_u)``; the others are taken from the conditional rows.
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
    # A comparison, which is traced where a bound is a symbol.
    if clip == math.inf:
        mean = torch.addcmul(column[MEAN_FROM_STATE] * state, column[MEAN_FROM_OUTPUT], prediction)
    else:
        x0 = torch.addcmul(column[X0_FROM_STATE] * state, column[X0_FROM_OUTPUT], prediction).clamp_(-clip, clip)
        mean = torch.addcmul(column[MEAN_FROM_STATE_GIVEN_X0] * state, column[MEAN_FROM_X0], x0)
    if not learned:
        return mean, column[LOG_STD].exp().expand_as(mean)
    variance = output.narrow(-3, channels, channels).float()
    return mean, torch.addcmul(column[LOG_STD], column[LOG_STD_SLOPE], variance).exp_()


def unpack_rows(rows: Tensor, row_offsets: Tensor, branches: int, slots: int, length: int) -> Tensor:
    """Packed rows ``[B R, ...]`` to ``[B S L, ...]``; entries past a slot's length repeat some other row."""
    total = rows.shape[0] // branches
    position = torch.arange(length, device=rows.device)
    index = (row_offsets[:-1, None] + position).clamp_(max=total - 1).flatten()
    return rows.unflatten(0, (branches, total)).index_select(1, index).flatten(0, 1)


def target_rows(arguments: CouplingArguments) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation ``[S, L, D]`` that the target gives the step after each row, D = C H W."""
    slots, length = arguments.draft_states.shape[:2]
    branches = 1 if arguments.guidance_scale == 1.0 else 2
    mean, std = gaussian_transition(
        arguments.draft_states.flatten(0, 1),
        unpack_rows(arguments.output, arguments.row_offsets, branches, slots, length),
        arguments.columns.flatten(0, 1),
        guidance_scale=arguments.guidance_scale,
        guidance_channels=arguments.guidance_channels,
        clip=arguments.clip,
    )
    return mean.view(slots, length, -1), std.reshape(slots, length, -1)


class Compared(NamedTuple):
    """Drafts and the target's laws of the same steps: given the shared slack, unit Gaussians with means delta apart.

    Attributes:
        start: ``[S, L - 1, D]``, what the target draws with the draft's noise, given the shared slack.
        lead: ``[S, L - 1, D]``, ``start`` minus the draft, which is the difference of the two means.
        gap_sq: ``[S, L - 1]``, delta^2, the squared norm of the whitened lead.
        along: ``[S, L - 1]``, inner product of the draft's own noise and the whitened lead.
        infeasible: bool ``[S, L - 1]``, rows without shared slack, whose draft is refused and whose step is drawn
            directly from the target.
    """

    start: Tensor
    lead: Tensor
    gap_sq: Tensor
    along: Tensor
    infeasible: Tensor


def compare(mean_q: Tensor, std_q: Tensor, arguments: CouplingArguments) -> Compared:
    """Compare drafts with the target's transitions ``mean_q, std_q [S, L, D]``.

    Without slack noise the deviations are taken to be equal.
    """
    mean_p, std_p = arguments.draft_mean.flatten(2), arguments.draft_std.flatten(2)
    drafts = mean_p.shape[1]
    mean_q = mean_q[:, :drafts]
    lead, z = mean_q - mean_p, arguments.noise.flatten(2)[:, :drafts]
    gap = lead / std_p
    if arguments.slack_noise is None:
        gap_sq = gap.square().sum(-1)
        start = torch.addcmul(mean_q, std_p, z)
        return Compared(start, lead, gap_sq, (z * gap).sum(-1), ~(gap_sq < MAX_GAP_SQ))
    ratio = (std_q[:, :drafts] / std_p).square_()
    start, lead, *rest = compare_variances(gap, ratio, z, arguments.slack_noise.flatten(2)[:, :drafts])
    return Compared(torch.addcmul(mean_q, std_p, start), std_p * lead, *rest)


def compare_variances(gap: Tensor, ratio: Tensor, z: Tensor, z_slack: Tensor) -> Compared:
    """Compare ``N(0, I)``, from which z came, with ``N(gap, diag(ratio))``; all arguments ``[..., D]``.

    ``start`` and ``lead`` are in units of the draft's deviation, ``start`` relative to the target's mean.

    Reflection needs equal covariances. So z is split, with independent noise z' and a matrix Lambda that is at most as
    large as both covariances:

        ``z1 = Lambda^(1/2) z + (I - Lambda)^(1/2) z'``,  ``z2 = (I - Lambda)^(1/2) z - Lambda^(1/2) z'``.

    These are independent standard normals and ``z = Lambda^(1/2) z1 + (I - Lambda)^(1/2) z2``. The target shares z2:
    with ``B B^T = diag(ratio) - Lambda`` the draft is N(A_p, Lambda) given z2, the target N(A_q, Lambda),

        ``lead = A_q - A_p = gap + B z2 - (I - Lambda)^(1/2) z2``,  ``Delta = Lambda^(-1/2) lead``.

    This is exact for every Lambda that depends on the two laws and not on z. A small Lambda magnifies the gap of the
    means, a large Lambda the difference of the variances. The means differ along one direction u, the variances in all
    directions, hence

        ``Lambda = (I - u u^T) / 2 + h u u^T``,

    with h near 1 unless the variance along u differs more than the means. In closed form, ``c = diag(ratio) - 1/2``,
    ``w = c^(-1/2) u``, ``kappa = |w|^2``:

        ``B = c^(1/2) (I - (1 - q) w w^T / kappa)``,  ``q^2 = 1 - (h - 1/2) kappa``.

    B exists for h up to ``room = 1/2 + 1/kappa``, which is what the target's covariance leaves along u. The h below is
    the best one for the gap and for the error ``room - 1`` of the variance along u, other directions not considered.
    """
    mean_sq = gap.square().sum(-1, keepdim=True)
    directed = mean_sq > SMALLEST_MEAN_GAP_SQ
    u = torch.where(directed, gap * mean_sq.rsqrt(), 0.0)
    left = ratio - ACROSS
    # Drafts so far off that products of gap and error would overflow are refused, too. The rule must not depend on z.
    far = ~((1 + mean_sq.squeeze(-1)) * (1 + (ratio - 1).square().sum(-1)) < MAX_GAP_SQ)
    infeasible = far | ~(left.amin(-1) >= LEAST_LEFT)
    left.clamp_(min=LEAST_LEFT)
    root, across = left.sqrt(), math.sqrt(ACROSS)

    kappa = torch.where(directed, (u.square() / left).sum(-1, keepdim=True), 1 / (1 - ACROSS))
    error = 1 / kappa - (1 - ACROSS)
    longest = (error.square() + 4 * mean_sq).sqrt()
    # 1 - h, of the draft, and q^2 / kappa, of the target: the variance along u that is shared.
    shared_p = torch.maximum(error.abs() / (error.abs() + longest), -error) + LEAST_SHARED
    shared_p = torch.where(directed, shared_p, 1 - ACROSS)
    own = 1 - shared_p
    kept_p, kept_q = shared_p.sqrt(), (kappa * (error + shared_p)).sqrt()

    z_u, z_slack_u = (u * z).sum(-1, keepdim=True), (u * z_slack).sum(-1, keepdim=True)
    z2_u = kept_p * z_u - own.sqrt() * z_slack_u
    z2 = across * (z - z_slack)
    z2 = z2 + u * (z2_u - across * (z_u - z_slack_u))
    w_z2 = (u / root * z2).sum(-1, keepdim=True)
    moved = (1 - kept_q) * w_z2 / kappa + (kept_p - across) * z2_u
    # Added to z below and not only to the gap, which may be so large that the sum rounds the shift away.
    shift = (ratio - 1) / (root + across) * z2 - moved * u
    lead = gap + shift

    lead_u = (u * lead).sum(-1, keepdim=True)
    gap_sq = lead.square().sum(-1, keepdim=True) / ACROSS + (1 / own - 1 / ACROSS) * lead_u.square()
    along = ((z + z_slack) * lead).sum(-1, keepdim=True) + ((shared_p / own).sqrt() - 1) * z_slack_u * lead_u
    return Compared(z + shift, lead, gap_sq.squeeze(-1), along.squeeze(-1), infeasible)


def couple(arguments: CouplingArguments) -> Coupling:
    """Decide and commit one round; see ``free_kernels.ops.couple``."""
    slots, length, *latent = arguments.draft_states.shape
    lengths = arguments.row_offsets.diff()
    mean_q, std_q = target_rows(arguments)
    direct = torch.addcmul(mean_q, std_q, arguments.noise.flatten(2))
    if length == 1:
        return Coupling(direct.view(slots, *latent), lengths.clamp(max=1), direct.new_zeros(slots, 0))

    drafts, last = length - 1, lengths - 1
    start, lead, gap_sq, along, infeasible = compare(mean_q, std_q, arguments)
    if arguments.relaxation is None:
        score = along - gap_sq / 2
    else:
        keep = 1 - arguments.relaxation[:, :drafts]
        score = keep * along - keep.square() * gap_sq / 2
    accepted = arguments.uniform[:, :drafts].log() <= score
    accepted &= ~infeasible
    # A slot stops at its first refused draft, else at its last row; cumprod counts the accepted drafts before that row.
    accepted &= torch.arange(drafts, device=direct.device) < last[:, None]
    first = accepted.cumprod(1).sum(1)

    # A new state is needed only at that row: the reflection if its draft was refused, else a direct draw.
    rows = torch.arange(slots, device=direct.device)
    draft_row = first.clamp(max=drafts - 1)
    coefficient = 2 * along[rows, draft_row] / gap_sq[rows, draft_row]
    reflected = torch.addcmul(start[rows, draft_row], coefficient[:, None], lead[rows, draft_row], value=-1)
    is_direct = (first >= last) | infeasible[rows, draft_row]
    next_states = torch.where(is_direct[:, None], direct[rows, first], reflected)
    committed = (first + 1) * (lengths > 0)
    return Coupling(next_states.view(slots, *latent), committed, gap_sq)
