"""Block verification of Gaussian drafts in plain PyTorch.

A slot has drafts y_1 ... y_G, G = length - 1. Draft i has the law p_i, and q_i is the target's law of the same step.
Given the shared slack and after whitening, both are unit Gaussians whose means are delta_i apart. Let ``P_0 = 1``,
``P_i = min(1, P_{i-1} q_i / p_i)``, let R_i be the mass of ``(P_i q_{i+1} - p_{i+1})+`` and ``R_G = P_G``. Then

    ``h_i = R_i / (R_i + 1 - P_i)``,  ``tau = max{i : eta_i <= h_i}``,  eta_i uniform;  ``h_0 = 1``.

The first tau drafts are committed, then a draw of ``(P_tau q - p)+ / R_tau``, or of q itself if tau = G.

Why the law is the target's:

- ``P(tau >= i | y_1 ... y_i) = P_i``, by induction from G: y_{i+1} contributes ``E_p min(1, P_i q / p) = P_i - R_i``,
  and ``P_i - R_i + (1 - P_i + R_i) h_i = P_i``. So stopping at i has probability R_i. Committing y_{i+1} as a draft
  has density ``p P_{i+1} = min(p, P_i q)``, and the draw at row i has ``(P_i q - p)+``; their sum is ``P_i q``.
  Multiplying these factors from the first row on gives the target's density.
- The shared slack z2 of row i counts as one more step of the chain, between y_i and y_{i+1}, with the same law for
  draft and target: its ratio is 1 and its residual is empty, so no slot stops there. R_i and the residual are those
  *given* the draft's z2, and this z2 is kept. Given that a slot stops at i, which has probability R_i(z2), z2 is no
  longer standard normal; new slack would be.
- A row without shared slack counts as two laws with no common mass: ratio 0, ``R_i = P_i``, residual q. The same holds
  for a slot's last row. Every later P is 0, so rows after it do not count, and q is drawn with the row's own noise.
- ``P(tau = i | y_1 ... y_{i+1}) = (1 - P_{i+1}) h_i`` depends on the refused draft only along Delta. Orthogonal to
  Delta its noise is still standard normal and is kept. Along Delta it is replaced by a draw of the residual.

The decision depends on the noise of all rows of the block, so a step that is drafted again needs new noise.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from free_kernels.ops.coupling.arguments import Coupling, CouplingArguments
from free_kernels.ops.coupling.reference import compare, couple, target_rows

# Bounds that keep float64 arithmetic finite: a smaller logarithm of P counts as the first, a smaller gap as the second.
LOWEST_LOG_WEIGHT, SMALLEST_GAP = -1e4, 1e-30
# The draw of a residual is searched between max(its lower end, q's mean - RADIUS) and 2 RADIUS above that; the chance
# that it is outside is below 1e-30. Each step divides the interval by SECTIONS, in the end to 2e-8, which is finer than
# the resolution of noise in float32.
RADIUS, SECTIONS, SECTION_STEPS = 12.0, 64, 5


def log_weights(score: Tensor) -> Tensor:
    """``log P_0 ... log P_G``, ``[S, G + 1]``: sums of the scores ``log q_i / p_i [S, G]``, held at or below 0."""
    walk = torch.nn.functional.pad(score.cumsum(1), (1, 0))
    return walk - walk.cummax(1).values


def mass_beyond(a: Tensor, delta: Tensor, t: Tensor) -> Tensor:
    """Mass of ``a q - p`` above t, for t at or above :func:`lower_end`: ``a Phibar(t) - Phibar(t + delta)``.

    t is the coordinate along Delta relative to q's mean; p's mean is at -delta.
    """
    scaled = t * math.sqrt(0.5)
    tails = a * torch.special.erfc(scaled) - torch.special.erfc(scaled + delta * math.sqrt(0.5))
    return tails.mul_(0.5).clamp_(min=0.0)


def lower_end(log_a: Tensor, delta: Tensor) -> Tensor:
    """Where ``a q = p``; the residual is above this point."""
    return -delta / 2 - log_a / delta


def residual_mass(log_a: Tensor, delta: Tensor) -> Tensor:
    """R, the mass of ``(a q - p)+``, for a in [0, 1]."""
    return mass_beyond(log_a.exp(), delta, lower_end(log_a, delta))


def draw_residual(log_a: Tensor, delta: Tensor, uniform: Tensor) -> Tensor:
    """A draw of ``(a q - p)+ / R`` along Delta, relative to q's mean, by inverting its tail; all arguments ``[S]``."""
    a, low = log_a.exp(), lower_end(log_a, delta)
    level = (uniform * mass_beyond(a, delta, low)).unsqueeze(1)
    low, a, delta = low.clamp(min=-RADIUS).unsqueeze(1), a.unsqueeze(1), delta.unsqueeze(1)
    inner = torch.arange(1, SECTIONS, device=low.device, dtype=low.dtype)
    width = 2 * RADIUS
    for _ in range(SECTION_STEPS):
        width /= SECTIONS
        beyond = mass_beyond(a, delta, low + width * inner) > level
        low = low + width * beyond.sum(1, keepdim=True)
    return low.squeeze(1) + width / 2


def decide(gap_sq: Tensor, along: Tensor, uniform: Tensor, tested: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where each slot stops, and where along the lead its residual is, if its new state is drawn from one.

    Args:
        gap_sq: ``[S, G]``, delta^2.
        along: ``[S, G]``, ``<z1, Delta>``.
        uniform: ``[S, G + 1]`` in (0, 1]; entry 0 draws the residual.
        tested: bool ``[S, G]``, rows that have a draft and shared slack.

    Returns:
        tau ``[S]``; bool ``[S]``, whether the new state is drawn from the residual and not directly from the target;
        float64 ``[S]``, how many times the lead that residual is ahead of what the target draws with the draft's noise.
    """
    slots, drafts = gap_sq.shape
    # Rows whose step is drawn directly: those without shared slack, the last of a slot, and rows after these (P is 0).
    direct = torch.nn.functional.pad(~tested, (0, 1), value=True).cumsum(1) > 0
    gap_sq, along = gap_sq.double(), along.double()
    log_weight = log_weights((along - gap_sq / 2).masked_fill(direct[:, :drafts], -torch.inf))
    weight, missing = log_weight.exp(), -log_weight.expm1()
    bounded = log_weight.clamp(min=LOWEST_LOG_WEIGHT)
    delta = torch.nn.functional.pad(gap_sq.sqrt(), (0, 1)).masked_fill(direct, 1.0).clamp(min=SMALLEST_GAP)
    mass = torch.where(direct, weight, residual_mass(bounded, delta))
    # Where P is 1, h is 1 too, even if R is 0.
    threshold = torch.where(log_weight == 0, 1.0, mass / (mass + missing))
    tau = torch.where(uniform <= threshold, torch.arange(drafts + 1, device=gap_sq.device), 0).amax(1)

    rows = torch.arange(slots, device=gap_sq.device)
    draft_row = tau.clamp(max=drafts - 1)
    at_delta = delta[rows, draft_row]
    # h_0 is 1, so the uniform of row 0 is not needed for a test and is used for the draw.
    drawn = draw_residual(bounded[rows, draft_row], at_delta, uniform[:, 0].double())
    return tau, ~direct[rows, tau], (drawn - along[rows, draft_row] / at_delta) / at_delta


def couple_block(arguments: CouplingArguments) -> Coupling:
    """Decide and commit one round; see ``free_kernels.ops.couple_block``."""
    slots, length, *latent = arguments.draft_states.shape
    if length == 1:
        return couple(arguments)
    mean_q, std_q = target_rows(arguments)
    drafted = compare(mean_q, std_q, arguments)
    noise, uniform = arguments.noise, arguments.uniform

    lengths, drafts = arguments.row_offsets.diff(), length - 1
    position = torch.arange(length, device=noise.device)
    tested = ~drafted.infeasible & (position[:drafts] < lengths[:, None] - 1)
    tau, replaced, ahead = decide(drafted.gap_sq, drafted.along, uniform, tested)
    rows = torch.arange(slots, device=noise.device)
    draft_row = tau.clamp(max=drafts - 1)
    start, lead = drafted.start[rows, draft_row], drafted.lead[rows, draft_row]
    residual = torch.addcmul(start, ahead.float()[:, None], lead)
    fresh = torch.addcmul(mean_q[rows, tau], std_q[rows, tau], noise.flatten(2)[rows, tau])
    next_states = torch.where(replaced[:, None], residual, fresh).view(slots, *latent)
    return Coupling(next_states, (tau + 1) * (lengths > 0), drafted.gap_sq)
