"""Public op of block verification: a round's drafts are decided together and not one by one."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from free_kernels.ops import coupling_dispatch as dispatch
from free_kernels.ops.coupling import check_round
from free_kernels.reference import block as reference
from free_kernels.reference.coupling import Coupling

_SCHEMA = (
    "couple_block(Tensor draft_states, Tensor draft_mean, Tensor draft_std, Tensor noise, Tensor? slack_noise, "
    "Tensor uniform, Tensor output, Tensor row_offsets, Tensor columns, "
    "float guidance_scale, int guidance_channels, float clip) -> (Tensor, Tensor, Tensor)"
)


def _couple_block_reference(*arguments: object) -> dispatch.Outcome:
    return tuple(reference.couple_block(*arguments[:-3], **dispatch.settings_of(*arguments[-3:])))


_LIBRARY = torch.library.Library("free_kernels", "FRAGMENT")
_LIBRARY.define(_SCHEMA)
_LIBRARY.impl("couple_block", _couple_block_reference, "CPU")
_LIBRARY.impl("couple_block", _couple_block_reference, "CUDA")
torch.library.register_fake("free_kernels::couple_block", dispatch.fake_outcome, lib=_LIBRARY)


def couple_block(
    draft_states: Tensor,
    draft_mean: Tensor,
    draft_std: Tensor,
    noise: Tensor,
    slack_noise: Tensor | None,
    uniform: Tensor,
    output: Tensor,
    row_offsets: Tensor,
    columns: Tensor,
    *,
    guidance_scale: float = 1.0,
    guidance_channels: int | None = None,
    clip: float = math.inf,
) -> Coupling:
    """Decide one round of drafts as a block: the same law as :func:`couple`, and on average at least its commits.

    Row j of slot s is the state ``draft_states[s, j]``; its draft is ``draft_states[s, j + 1] = draft_mean[s, j] +
    draft_std[s, j] noise[s, j]``. With ``P_i = min(1, P_{i-1} q_i / p_i)`` over the drafts, the last one with
    ``u_i <= h_i(P_i, delta_i)`` and all before it are committed; the step after it is a draw of ``(P q - p)+``, or of q
    itself where the slot ends. Source: block verification (Sun et al., arXiv 2403.10444; for diffusion arXiv
    2606.13426); the derivation with shared slack heads ``free_kernels.reference.block``.

    Whether a draft is committed depends on the drafts behind it. So a step that was drafted and not committed must not
    meet the same noise again: ``noise``, ``slack_noise`` and ``uniform`` are to be fresh in each round. In return
    whatever a round computed, also behind the committed steps, may steer later rounds.

    Args:
        draft_states: float32 ``[S, L, C, H, W]``.
        draft_mean: float32 ``[S, L - 1, C, H, W]``.
        draft_std: float32 ``[S, L - 1, C, H, W]``, positive.
        noise: float32 ``[S, L, C, H, W]``, z.
        slack_noise: float32 ``[S, L, C, H, W]``, z', independent of z; None where ``output`` has C channels;
            may be None where L = 1.
        uniform: float32 ``[S, L]`` in (0, 1]; entry 0 draws the residual, entry i > 0 tests draft i.
        output: target output of the packed rows, ``[B R, C or 2C, H, W]``, conditional rows first.
        row_offsets: int64 ``[S + 1]``; slot s owns rows ``row_offsets[s]`` to ``row_offsets[s + 1]``.
        columns: float32 ``[S, L, 8]``, transition coefficients of each row's step.
        guidance_scale: as in :func:`gaussian_transition`.
        guidance_channels: as in :func:`gaussian_transition`.
        clip: as in :func:`gaussian_transition`.

    Returns:
        A :class:`Coupling`.

    Raises:
        ValueError, TypeError: a shape or dtype does not fit.
    """
    check_round(
        "couple_block",
        draft_states,
        output,
        guidance_scale,
        draft_mean=draft_mean,
        draft_std=draft_std,
        noise=noise,
        slack_noise=slack_noise,
        uniform=uniform,
        row_offsets=row_offsets,
        columns=columns,
    )
    outcome = torch.ops.free_kernels.couple_block(
        draft_states,
        draft_mean,
        draft_std,
        noise,
        slack_noise,
        uniform,
        output,
        row_offsets,
        columns,
        guidance_scale,
        draft_states.shape[2] if guidance_channels is None else guidance_channels,
        clip,
    )
    return Coupling(*outcome)
