"""Public ops of block verification: a round's drafts are decided together and not one by one."""

from __future__ import annotations

import math

from torch import Tensor

from free_kernels.ops.coupling.arguments import Coupling, CouplingArguments, KeyedCouplingArguments
from free_kernels.ops.coupling.dispatch import decide
from free_kernels.ops.random.api import signed_seed
from free_kernels.validation import fail


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
    backend: str = "auto",
) -> Coupling:
    """Decide one round of drafts as a block: the same law as :func:`couple`, and on average at least its commits.

    Row j of slot s is the state ``draft_states[s, j]``; its draft is ``draft_states[s, j + 1] = draft_mean[s, j] +
    draft_std[s, j] noise[s, j]``. With ``P_i = min(1, P_{i-1} q_i / p_i)`` over the drafts, the last one with
    ``u_i <= h_i(P_i, delta_i)`` and all before it are committed; the step after it is a draw of ``(P q - p)+``, or of q
    itself where the slot ends. Source: block verification (Sun et al., arXiv 2403.10444; for diffusion arXiv
    2606.13426); the derivation with shared slack heads ``free_kernels.ops.coupling.reference_block``.

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
        backend: ``"auto"`` (Triton on a GPU), ``"reference"`` or ``"triton"``.

    Returns:
        A :class:`Coupling`.

    Raises:
        ValueError, TypeError: a shape or dtype does not fit, or the backend is unknown.
        RuntimeError: ``backend="triton"`` cannot be used; the message says why.
    """
    guided = draft_states.shape[2] if guidance_channels is None else guidance_channels
    drafts, settings = (draft_states, draft_mean, draft_std), (guidance_scale, guided, clip)
    given = (*drafts, noise, slack_noise, uniform, output, row_offsets, columns, None, *settings)
    return decide("couple_block", CouplingArguments(*given), backend)


def couple_block_philox(
    draft_states: Tensor,
    draft_mean: Tensor,
    draft_std: Tensor,
    seed: int,
    images: Tensor,
    steps: Tensor,
    output: Tensor,
    row_offsets: Tensor,
    columns: Tensor,
    *,
    rounds: Tensor,
    guidance_scale: float = 1.0,
    guidance_channels: int | None = None,
    clip: float = math.inf,
    backend: str = "auto",
) -> Coupling:
    """:func:`couple_block` with numbers made from their keys: in Triton where they are used, never in memory.

    Equivalent to :func:`couple_block` with numbers of :mod:`free_kernels.ops.random`, as :func:`couple_philox` has
    them; the drafts must have been made with the same noise. Source: as :func:`couple_block`; Salmon et al. 2011.

    Args:
        draft_states: float32 ``[S, L, C, H, W]``.
        draft_mean: float32 ``[S, L - 1, C, H, W]``.
        draft_std: float32 ``[S, L - 1, C, H, W]``, positive.
        seed: in ``[0, 2**64)``.
        images: int64 ``[S]``, image index of each slot, to which the caller has added the ``first_image`` of a
            :class:`~free_kernels.sampling.noise.PhiloxNoise`; that of an idle slot is of no matter.
        steps: int64 ``[S, L]``, step of each row.
        output: as in :func:`couple_block`.
        row_offsets: as in :func:`couple_block`.
        columns: as in :func:`couple_block`.
        rounds: int64 ``[S]`` in ``[0, 2**24)``; a number that an image has not had before.
        guidance_scale: as in :func:`gaussian_transition`.
        guidance_channels: as in :func:`gaussian_transition`.
        clip: as in :func:`gaussian_transition`.
        backend: as in :func:`couple_block`; ``"reference"`` draws with the reference too.

    Returns:
        A :class:`Coupling`.

    Raises:
        ValueError, TypeError: a shape, dtype or seed does not fit, or the backend is unknown.
        RuntimeError: ``backend="triton"`` cannot be used; the message says why.
    """
    if rounds is None:
        fail("couple_block_philox", "rounds", "int64 [S], since noise must be fresh in each round", rounds, TypeError)
    guided = draft_states.shape[2] if guidance_channels is None else guidance_channels
    drafts, settings = (draft_states, draft_mean, draft_std), (guidance_scale, guided, clip)
    keys = (signed_seed("couple_block_philox", seed), images, steps)
    given = (*drafts, *keys, output, row_offsets, columns, None, rounds, *settings)
    return decide("couple_block_philox", KeyedCouplingArguments(*given), backend)
