"""Wrong couplings that look right: each replaces ``couple`` of the speculative loop and has to be found by a test.

Those of shared slack are in ``slack_by_matrices``.
"""

from __future__ import annotations

import torch

from free_kernels.ops.coupling import couple, gaussian_transition


def _target_rows(args: tuple, kwargs: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Target mean and deviation ``[S, L, ...]`` for rows that all have full length (other rows repeat)."""
    draft_states, output, row_offsets, columns = args[0], args[6], args[7], args[8]
    length = draft_states.shape[1]
    settings = {k: kwargs[k] for k in ("guidance_scale", "guidance_channels", "clip")}
    branches = 1 if kwargs["guidance_scale"] == 1.0 else 2
    total = output.shape[0] // branches
    index = (row_offsets[:-1, None] + torch.arange(length)).clamp(max=total - 1).flatten()
    rows = output.unflatten(0, (branches, total))[:, index].flatten(0, 1)
    mean, std = gaussian_transition(draft_states.flatten(0, 1), rows, columns.flatten(0, 1), **settings)
    return mean.view_as(draft_states), std.reshape(draft_states.shape)


def _refused(args: tuple, outcome) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots whose last committed row was a refused draft, and that row."""
    row = (outcome.committed - 1).clamp(min=0)
    return (outcome.committed > 0) & (outcome.committed < args[7].diff()), row


def _replace(outcome, refused: torch.Tensor, value: torch.Tensor):
    mask = refused.view(-1, *[1] * (value.ndim - 1))
    return outcome._replace(next_states=torch.where(mask, value, outcome.next_states))


def wrong_reflection_sign(*args, **kwargs):
    """Commits ``mu_q + s (z + 2 Delta <z, Delta> / delta^2)``. For shared variances."""
    outcome = couple(*args, **kwargs)
    refused, row = _refused(args, outcome)
    slots = torch.arange(len(row))
    mean_q, std_q = (part[slots, row].flatten(1) for part in _target_rows(args, kwargs))
    draft_row = row.clamp(max=args[1].shape[1] - 1)
    if args[1].shape[1] == 0:
        return outcome
    gap = (mean_q - args[1][slots, draft_row].flatten(1)) / std_q
    z = args[3][slots, row].flatten(1)
    along = (z * gap).sum(1, keepdim=True) / gap.square().sum(1, keepdim=True)
    return _replace(outcome, refused, (mean_q + std_q * (z + 2 * along * gap)).view_as(outcome.next_states))


def fresh_sample_on_rejection(*args, **kwargs):
    """Commits an independent draw of the target where a draft is refused."""
    outcome = couple(*args, **kwargs)
    refused, row = _refused(args, outcome)
    slots = torch.arange(len(row))
    mean_q, std_q = (part[slots, row] for part in _target_rows(args, kwargs))
    return _replace(outcome, refused, mean_q + std_q * torch.randn_like(mean_q))


def draft_kept_on_some_rejections(*args, **kwargs):
    """Keeps the refused draft in 30 % of refusals."""
    outcome = couple(*args, **kwargs)
    refused, row = _refused(args, outcome)
    slots = torch.arange(len(row))
    draft = args[0][slots, (row + 1).clamp(max=args[0].shape[1] - 1)]
    return _replace(outcome, refused & (torch.rand(len(row)) < 0.3), draft)


def target_variance_on_both_sides(*args, **kwargs):
    """Compares and reflects as if drafts had been drawn with the target's deviation. For learned variances."""
    states, mean, std, noise, *rest = args
    drafts = mean.shape[1]
    if drafts == 0:
        return couple(*args, **kwargs)
    _, std_q = _target_rows(args, kwargs)
    drafted = torch.arange(drafts) < args[7].diff()[:, None] - 1
    rescaled = noise[:, :drafts] * torch.where(drafted.view(*drafted.shape, 1, 1, 1), std / std_q[:, :drafts], 1.0)
    return couple(states, mean, std_q[:, :drafts], torch.cat([rescaled, noise[:, drafts:]], 1), *rest, **kwargs)


def always_accept(*args, **kwargs):
    """Accepts every draft."""
    return couple(*args[:5], torch.full_like(args[5], 1e-30), *args[6:], **kwargs)
