"""``compare_variances`` by dense matrices, as its docstring says it in words, and with bugs that tests have to find."""

from __future__ import annotations

import torch
from torch import Tensor

from free_kernels.ops.coupling.reference import ACROSS, LEAST_LEFT, LEAST_SHARED, SMALLEST_MEAN_GAP_SQ, Compared


def share_along(mean_sq: Tensor, room: Tensor) -> Tensor:
    """h: what of the variance along the gap is compared, of a draft with 1 and a target with ``room``."""
    odds = (1 + 4 * mean_sq / (room - 1).square()).sqrt()
    return torch.minimum(1 - 1 / (1 + odds), room) - LEAST_SHARED


def dense(gap: Tensor, ratio: Tensor, z: Tensor, z_slack: Tensor, bug: str = "") -> Compared:
    """In float64; all arguments ``[..., D]``. ``bug`` names what is done wrong."""
    kind, size = gap.dtype, gap.shape[-1]
    gap, ratio, z, z_slack = (part.double().unsqueeze(-1).expand(*z.shape, 1) for part in (gap, ratio, z, z_slack))
    eye = torch.eye(size, dtype=torch.float64)
    infeasible = (ratio - ACROSS).amin((-2, -1)) < LEAST_LEFT
    left = (ratio - ACROSS).clamp(min=LEAST_LEFT)
    mean_sq = gap.square().sum(-2, keepdim=True)
    directed = mean_sq > SMALLEST_MEAN_GAP_SQ
    u = torch.where(directed, gap / mean_sq.sqrt(), 0.0)
    w = u / left.sqrt()
    kappa = torch.where(directed, w.square().sum(-2, keepdim=True), 1.0)
    h = torch.where(directed, share_along(mean_sq, ACROSS + 1 / kappa), ACROSS)

    def power(across: float, along: Tensor) -> Tensor:
        return across**0.5 * eye + (along.sqrt() - across**0.5) * u * u.mT

    own, kept_p = power(ACROSS, h), power(1 - ACROSS, 1 - h)
    kept_q = left.sqrt() * (eye - (1 - (1 - (h - ACROSS) * kappa).sqrt()) * w * w.mT / kappa)
    z2 = kept_p @ z - own @ z_slack
    if bug == "slack of the draft":
        kept_q = kept_p
    elif bug == "slack dropped":
        kept_q = 0 * kept_q
    elif bug == "z2 without direction":
        z2 = (z - z_slack) / 2**0.5
    elif bug == "draft's split for the target":
        kept_q = left.sqrt() * (eye - (1 - (2 * (1 - h)).sqrt()) * u * u.mT)
    z1 = own @ z + kept_p @ z_slack
    shift = kept_q @ z2 - kept_p @ z2
    lead = gap + shift
    delta = torch.linalg.solve(own, lead)
    gap_sq, along = delta.square().sum((-2, -1)), (z1 * delta).sum((-2, -1))
    if not bug:
        left_over = kept_q @ kept_q.mT - (torch.diag_embed(ratio.squeeze(-1)) - own @ own)
        compared = ~infeasible & (left_over.isfinite().all((-2, -1)))
        assert float((left_over / ratio)[compared].abs().sum()) < 1e-6
    start = kept_q @ z2 + own @ z1
    return Compared(start.squeeze(-1).to(kind), lead.squeeze(-1).to(kind), gap_sq.to(kind), along.to(kind), infeasible)


BUGS = ("slack of the draft", "slack dropped", "z2 without direction", "draft's split for the target")
