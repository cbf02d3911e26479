"""Public coupling ops: what a step does with the network's output, and how a round of drafts is decided."""

from __future__ import annotations

import math

from torch import Tensor

from free_kernels.ops.coupling import reference
from free_kernels.ops.coupling.arguments import Coupling, CouplingArguments, KeyedCouplingArguments
from free_kernels.ops.coupling.dispatch import BACKENDS, decide
from free_kernels.ops.random.api import signed_seed
from free_kernels.validation import fail

__all__ = ["BACKENDS", "Coupling", "couple", "couple_philox", "gaussian_transition"]


def gaussian_transition(
    state: Tensor,
    output: Tensor,
    columns: Tensor,
    *,
    guidance_scale: float = 1.0,
    guidance_channels: int | None = None,
    clip: float = math.inf,
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the next state.

    Equivalent to ``mean = a x + b e``, ``log std = c + d v``, with (e, v) the two halves of the guided output, and the
    implied clean sample clamped to ``[-clip, clip]`` where clip is finite. Computed in float32 whatever the network's
    dtype. Source: Ho et al. 2020, eq. 11; Nichol & Dhariwal 2021, eq. 15.

    Args:
        state: float32 ``[R, C, H, W]``.
        output: ``[B R, C or 2C, H, W]``; B = 2 with guidance, conditional rows first.
        columns: float32 ``[R or 1, 8]``, rows of a schedule's transition table.
        guidance_scale: w in ``e_u + w (e_c - e_u)``; 1 means that ``output`` has the conditional branch only.
        guidance_channels: how many leading channels guidance mixes; all C if None.
        clip: bound of the clean sample.

    Returns:
        Mean and standard deviation, float32 ``[R, C, H, W]`` each.

    Raises:
        ValueError: shapes do not fit.
    """
    rows, channels, height, width = state.shape
    branches = 1 if guidance_scale == 1.0 else 2
    if output.shape[0] != branches * rows or output.shape[1] not in (channels, 2 * channels):
        fail("gaussian_transition", "output", f"[{branches * rows}, {channels} or {2 * channels}, H, W]", output)
    if output.shape[2] != height or output.shape[3] != width:
        fail("gaussian_transition", "output", f"[B R, C or 2C, {height}, {width}]", output)
    return reference.gaussian_transition(
        state,
        output,
        columns,
        guidance_scale=guidance_scale,
        guidance_channels=channels if guidance_channels is None else guidance_channels,
        clip=clip,
    )


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
    *,
    relaxation: Tensor | None = None,
    guidance_scale: float = 1.0,
    guidance_channels: int | None = None,
    clip: float = math.inf,
    backend: str = "auto",
) -> Coupling:
    """Decide one round of drafts by reflection maximal coupling and commit up to the first refusal.

    Row j of slot s is the state ``draft_states[s, j]``; its draft is ``draft_states[s, j + 1] = draft_mean[s, j] +
    draft_std[s, j] noise[s, j]``. A draft is accepted iff ``log u <= <z1, Delta> - |Delta|^2 / 2``; the first refused
    one is replaced by its reflection, whose law is exactly the target's. A slot's last row has no draft and is drawn
    from the target with ``noise``.

    Where variances are learned they differ, and reflection wants equal ones. Then z is split by z', another noise, into
    z1, which is compared and reflected, and z2, which the target shares: half and half, except that along the gap of
    the means z1 gets nearly all, less where the variance along it differs much, so that this gap, most of what there is
    to accept or refuse, is not stretched (``free_kernels.ops.coupling.reference.compare_variances`` derives it).

    Source: reflection maximal coupling (arXiv 2501.05370); DESIGN 3.3 for the shared slack, whose split by direction is
    our own.

    Args:
        draft_states: float32 ``[S, L, C, H, W]``.
        draft_mean: float32 ``[S, L - 1, C, H, W]``.
        draft_std: float32 ``[S, L - 1, C, H, W]``, positive.
        noise: float32 ``[S, L, C, H, W]``, z.
        slack_noise: float32 ``[S, L, C, H, W]``, z', independent of z; None where ``output`` has C channels;
            may be None where L = 1.
        uniform: float32 ``[S, L]`` in (0, 1].
        output: target output of the packed rows, ``[B R, C or 2C, H, W]``, conditional rows first.
        row_offsets: int64 ``[S + 1]``; slot s owns rows ``row_offsets[s]`` to ``row_offsets[s + 1]``.
        columns: float32 ``[S, L, 8]``, transition coefficients of each row's step.
        relaxation: float32 ``[S, L]``, w in [0, 1) of each row (lossy), or None.
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
    given = (*drafts, noise, slack_noise, uniform, output, row_offsets, columns, relaxation, *settings)
    return decide("couple", CouplingArguments(*given), backend)


def couple_philox(
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
    relaxation: Tensor | None = None,
    rounds: Tensor | None = None,
    guidance_scale: float = 1.0,
    guidance_channels: int | None = None,
    clip: float = math.inf,
    backend: str = "auto",
) -> Coupling:
    """:func:`couple` with numbers made from their keys: in Triton where they are used, never in memory.

    Equivalent to :func:`couple` with numbers of :mod:`free_kernels.ops.random` keyed by (seed, image, step, purpose,
    round): ``noise`` and ``slack_noise`` are ``philox_normal`` with purposes 1 (step) and 2 (slack), ``uniform`` is the
    one element of ``philox_uniform`` with purpose 3 (accept). Backends agree up to the rounding of logarithms and
    sines. The drafts must have been made with the same noise. Source: as :func:`couple`; Salmon et al. 2011.

    Args:
        draft_states: float32 ``[S, L, C, H, W]``.
        draft_mean: float32 ``[S, L - 1, C, H, W]``.
        draft_std: float32 ``[S, L - 1, C, H, W]``, positive.
        seed: in ``[0, 2**64)``.
        images: int64 ``[S]``, image index of each slot, to which the caller has added the ``first_image`` of a
            :class:`~free_kernels.sampling.noise.PhiloxNoise`; that of an idle slot is of no matter.
        steps: int64 ``[S, L]``, step of each row.
        output: as in :func:`couple`.
        row_offsets: as in :func:`couple`.
        columns: as in :func:`couple`.
        relaxation: as in :func:`couple`.
        rounds: int64 ``[S]`` in ``[0, 2**24)``, for a verification that draws fresh numbers every round; None is round
            0 for all.
        guidance_scale: as in :func:`gaussian_transition`.
        guidance_channels: as in :func:`gaussian_transition`.
        clip: as in :func:`gaussian_transition`.
        backend: as in :func:`couple`; ``"reference"`` draws with the reference too.

    Returns:
        A :class:`Coupling`.

    Raises:
        ValueError, TypeError: a shape, dtype or seed does not fit, or the backend is unknown.
        RuntimeError: ``backend="triton"`` cannot be used; the message says why.
    """
    guided = draft_states.shape[2] if guidance_channels is None else guidance_channels
    drafts, settings = (draft_states, draft_mean, draft_std), (guidance_scale, guided, clip)
    keys = (signed_seed("couple_philox", seed), images, steps)
    given = (*drafts, *keys, output, row_offsets, columns, relaxation, rounds, *settings)
    return decide("couple_philox", KeyedCouplingArguments(*given), backend)
