"""Public coupling ops: a step's Gaussian from the network's output, and the decision on a round of drafts."""

from __future__ import annotations

import math

from torch import Tensor

from free_kernels.constants import TransitionColumn
from free_kernels.ops.coupling import reference
from free_kernels.ops.coupling.arguments import Coupling, CouplingArguments, KeyedCouplingArguments
from free_kernels.ops.coupling.dispatch import BACKENDS as BACKENDS
from free_kernels.ops.coupling.dispatch import check_settings, decide
from free_kernels.ops.random.api import signed_seed
from free_kernels.ops.shapes import as_images
from free_kernels.validation import check_int, fail


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
        state: float32 ``[R, C, H, W]``, or ``[R, *shape]`` of states of any shape, whose first dimension counts as C.
        output: ``[B R, C or 2C, H, W]``; B = 2 with guidance, conditional rows first.
        columns: float32 ``[R or 1, 8]``, rows of a schedule's transition table.
        guidance_scale: w in ``e_u + w (e_c - e_u)``; 1 means that ``output`` has the conditional branch only.
        guidance_channels: how many leading channels guidance mixes; all C if None.
        clip: bound of the clean sample.

    Returns:
        Mean and standard deviation, float32 ``[R, C, H, W]`` each.

    Raises:
        ValueError, TypeError: a shape or dtype does not fit, or a setting is no such number.
    """
    if isinstance(state, Tensor) and state.ndim > 1 and state.ndim != 4:
        given = as_images(state, 1), as_images(output, 1), columns
        settings = {"guidance_scale": guidance_scale, "guidance_channels": guidance_channels, "clip": clip}
        mean, std = gaussian_transition(*given, **settings)
        return mean.view(state.shape), std.expand_as(mean).reshape(state.shape)
    op = "gaussian_transition"
    layouts = {"state": "[R, C, H, W]", "output": "[B R, C or 2C, H, W]", "columns": "[R or 1, 8]"}
    for (name, layout), tensor in zip(layouts.items(), (state, output, columns), strict=True):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            fail(op, name, f"floating point {layout}", tensor, TypeError)
        if tensor.ndim != layout.count(",") + 1:
            fail(op, name, layout, tensor)
    check_settings(op, guidance_scale, clip)
    rows, channels, height, width = state.shape
    branches = 1 if guidance_scale == 1.0 else 2
    fits = output.shape[0] == branches * rows and output.shape[1] in (channels, 2 * channels)
    if not fits or output.shape[2] != height or output.shape[3] != width:
        fail(op, "output", f"[{branches * rows}, {channels} or {2 * channels}, {height}, {width}]", output)
    if columns.shape[0] not in (1, rows) or columns.shape[1] != len(TransitionColumn):
        fail(op, "columns", f"[{rows} or 1, {len(TransitionColumn)}]", columns)
    if guidance_channels is not None and branches == 2:
        check_int(op, "guidance_channels", guidance_channels, 0, channels)
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
    """Decide one round of drafts by reflection maximal coupling and commit up to the first refused draft.

    Row j of slot s is the state ``draft_states[s, j]``; its draft is ``draft_states[s, j + 1] = draft_mean[s, j] +
    draft_std[s, j] noise[s, j]``. A draft is accepted iff ``log u <= <z1, Delta> - |Delta|^2 / 2``; the first refused
    one is replaced by its reflection, whose law is exactly the target's. A slot's last row has no draft and is drawn
    from the target with ``noise``.

    Learned variances of draft and target differ, but reflection needs equal ones. Then z is split, with the help of
    other noise z', into z1, which is compared and reflected, and z2, which the target shares. Each gets half of the
    variance, except along the gap of the means: there z1 gets nearly all, unless the variances along it differ much.
    This keeps the gap, on which acceptance mostly depends, small in units of z1's deviation
    (``free_kernels.ops.coupling.reference.compare_variances`` has the derivation).

    Source: reflection maximal coupling (arXiv 2501.05370). The shared slack and its split by direction are our own.

    Args:
        draft_states: float32 ``[S, L, C, H, W]``, or ``[S, L, *shape]`` of states of any shape, whose first dimension
            counts as C; the other tensors alike.
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
        guidance_scale, guidance_channels, clip: as in :func:`gaussian_transition`.
        backend: ``"auto"`` (Triton on a GPU, on the CPU the extension if it is there), ``"reference"``,
            ``"extension"`` or ``"triton"``.

    Returns:
        A :class:`Coupling`.

    Raises:
        ValueError, TypeError: a shape or dtype does not fit, or the backend is unknown.
        RuntimeError: ``backend="extension"`` or ``"triton"`` cannot be used; the message says why.
    """
    drafts, settings = (draft_states, draft_mean, draft_std), (guidance_scale, guidance_channels, clip)
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
    """:func:`couple` with random numbers made from keys; in Triton inside the kernels, so that they need no memory.

    Equivalent to :func:`couple` with numbers of :mod:`free_kernels.ops.random` keyed by (seed, image, step, purpose,
    round): ``noise`` and ``slack_noise`` are ``philox_normal`` with purposes 1 (step) and 2 (slack), ``uniform`` is the
    one element of ``philox_uniform`` with purpose 3 (accept). Backends agree up to the rounding of logarithms and
    sines. The drafts must have been made with the same noise. Source: as :func:`couple`; Salmon et al. 2011.

    Args:
        draft_states, draft_mean, draft_std: as in :func:`couple`.
        seed: in ``[0, 2**64)``.
        images: int64 ``[S]``, image index of each slot, to which the caller has added the ``first_image`` of a
            :class:`~free_kernels.sampling.noise.PhiloxNoise`; any value for an idle slot.
        steps: int64 ``[S, L]``, step of each row.
        output, row_offsets, columns, relaxation: as in :func:`couple`.
        rounds: int64 ``[S]`` in ``[0, 2**24)``, for a verification that draws fresh numbers every round; None is round
            0 for all.
        guidance_scale, guidance_channels, clip: as in :func:`gaussian_transition`.
        backend: as in :func:`couple`; ``"reference"`` draws with the reference too.

    Returns:
        A :class:`Coupling`.

    Raises:
        ValueError, TypeError: a shape, dtype or seed does not fit, or the backend is unknown.
        RuntimeError: ``backend="extension"`` or ``"triton"`` cannot be used; the message says why.
    """
    drafts, settings = (draft_states, draft_mean, draft_std), (guidance_scale, guidance_channels, clip)
    keys = (signed_seed("couple_philox", seed), images, steps)
    given = (*drafts, *keys, output, row_offsets, columns, relaxation, rounds, *settings)
    return decide("couple_philox", KeyedCouplingArguments(*given), backend)


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
    """Decide one round of drafts together: the same law as :func:`couple`, and on average at least as many commits.

    Rows and drafts are those of :func:`couple`. With ``P_i = min(1, P_{i-1} q_i / p_i)`` over the drafts, the last
    draft with ``u_i <= h_i(P_i, delta_i)`` and all drafts before it are committed; the step after it is drawn from
    ``(P q - p)+``, or from q itself at a slot's last row. Source: block verification (Sun et al., arXiv 2403.10444; for
    diffusion arXiv 2606.13426); ``free_kernels.ops.coupling.reference_block`` has the derivation with shared slack.

    Whether a draft is committed depends on the drafts after it. So ``noise``, ``slack_noise`` and ``uniform`` must be
    new in each round, also for a step that was drafted before and not committed. In return everything that a round
    computed may steer later rounds, rows after the committed ones included.

    Args:
        draft_states, draft_mean, draft_std, noise, slack_noise: as in :func:`couple`.
        uniform: float32 ``[S, L]`` in (0, 1]; entry 0 draws the residual, entry i > 0 tests draft i.
        output, row_offsets, columns: as in :func:`couple`.
        guidance_scale, guidance_channels, clip: as in :func:`gaussian_transition`.
        backend: ``"auto"`` (Triton on a GPU, on the CPU the extension if it is there), ``"reference"``,
            ``"extension"`` or ``"triton"``.

    Returns:
        A :class:`Coupling`.

    Raises:
        ValueError, TypeError: a shape or dtype does not fit, or the backend is unknown.
        RuntimeError: ``backend="extension"`` or ``"triton"`` cannot be used; the message says why.
    """
    drafts, settings = (draft_states, draft_mean, draft_std), (guidance_scale, guidance_channels, clip)
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
    """:func:`couple_block` with random numbers made from keys; in Triton inside the kernels.

    Equivalent to :func:`couple_block` with numbers of :mod:`free_kernels.ops.random`, as :func:`couple_philox` has
    them; the drafts must have been made with the same noise. Source: as :func:`couple_block`; Salmon et al. 2011.

    Args:
        draft_states, draft_mean, draft_std: as in :func:`couple`.
        seed: in ``[0, 2**64)``.
        images: as in :func:`couple_philox`.
        steps: int64 ``[S, L]``, step of each row.
        output, row_offsets, columns: as in :func:`couple`.
        rounds: int64 ``[S]`` in ``[0, 2**24)``, another number in each round of an image.
        guidance_scale, guidance_channels, clip: as in :func:`gaussian_transition`.
        backend: as in :func:`couple_block`; ``"reference"`` draws with the reference too.

    Returns:
        A :class:`Coupling`.

    Raises:
        ValueError, TypeError: a shape, dtype or seed does not fit, or the backend is unknown.
        RuntimeError: ``backend="extension"`` or ``"triton"`` cannot be used; the message says why.
    """
    if rounds is None:
        fail("couple_block_philox", "rounds", "int64 [S], since noise must be fresh in each round", rounds, TypeError)
    drafts, settings = (draft_states, draft_mean, draft_std), (guidance_scale, guidance_channels, clip)
    keys = (signed_seed("couple_block_philox", seed), images, steps)
    given = (*drafts, *keys, output, row_offsets, columns, None, rounds, *settings)
    return decide("couple_block_philox", KeyedCouplingArguments(*given), backend)
