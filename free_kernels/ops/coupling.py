"""Public coupling ops: what a step does with the network's output, and how a round of drafts is decided."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from free_kernels.reference import coupling as reference
from free_kernels.reference.coupling import Coupling
from free_kernels.validation import check_choice, fail

BACKENDS = ("auto", "reference")
NUM_COLUMNS = 8


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
    slack: Tensor | None = None,
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
    from the target with ``noise``. Source: reflection maximal coupling (arXiv 2501.05370), and DESIGN's shared-slack
    reflection for unequal diagonal covariances: with share lambda, ``z1 = sqrt(lambda) z + sqrt(1 - lambda) z'`` is
    reflected and ``z2 = sqrt(1 - lambda) z - sqrt(lambda) z'`` is shared with the target.

    Args:
        draft_states: float32 ``[S, L, C, H, W]``.
        draft_mean: float32 ``[S, L - 1, C, H, W]``.
        draft_std: float32 ``[S, L - 1, C, H, W]``, positive.
        noise: float32 ``[S, L, C, H, W]``, z.
        slack_noise: float32 ``[S, L, C, H, W]``, z', independent of z; needed with ``slack`` only.
        uniform: float32 ``[S, L]`` in (0, 1].
        output: target output of the packed rows, ``[B R, C or 2C, H, W]``, conditional rows first.
        row_offsets: int64 ``[S + 1]``; slot s owns rows ``row_offsets[s]`` to ``row_offsets[s + 1]``.
        columns: float32 ``[S, L, 8]``, transition coefficients of each row's step.
        slack: float32 ``[S, L]``, lambda in (0, 1) of each row; None only where draft and target share their variance.
        relaxation: float32 ``[S, L]``, w in [0, 1) of each row (lossy), or None.
        guidance_scale: as in :func:`gaussian_transition`.
        guidance_channels: as in :func:`gaussian_transition`.
        clip: as in :func:`gaussian_transition`.
        backend: ``"auto"`` or ``"reference"``.

    Returns:
        A :class:`Coupling`.

    Raises:
        ValueError: a shape does not fit, or the backend is unknown.
    """
    check_choice("couple", "backend", backend, BACKENDS)
    slots, length = draft_states.shape[:2]
    latent = list(draft_states.shape[2:])
    drafts = [slots, length - 1, *latent]
    expected: list[tuple[str, Tensor | None, list[int]]] = [
        ("draft_mean", draft_mean, drafts),
        ("draft_std", draft_std, drafts),
        ("noise", noise, [slots, length, *latent]),
        ("slack_noise", slack_noise, [slots, length, *latent]),
        ("uniform", uniform, [slots, length]),
        ("row_offsets", row_offsets, [slots + 1]),
        ("columns", columns, [slots, length, NUM_COLUMNS]),
        ("slack", slack, [slots, length]),
        ("relaxation", relaxation, [slots, length]),
    ]
    for name, tensor, shape in expected:
        if tensor is not None and list(tensor.shape) != shape:
            fail("couple", name, str(shape), tensor)
    if (slack is None) != (slack_noise is None):
        fail("couple", "slack_noise", "given exactly when slack is", "one without the other")
    channels = latent[0]
    rows_fit = output.shape[0] > 0 and output.shape[0] % (1 if guidance_scale == 1.0 else 2) == 0
    if not rows_fit or output.shape[1] not in (channels, 2 * channels) or list(output.shape[2:]) != latent[1:]:
        fail("couple", "output", f"[B R, {channels} or {2 * channels}, {latent[1]}, {latent[2]}]", output)
    if row_offsets.dtype != torch.int64:
        fail("couple", "row_offsets", "int64", row_offsets, TypeError)
    return reference.couple(
        draft_states,
        draft_mean,
        draft_std,
        noise,
        slack_noise,
        uniform,
        output,
        row_offsets,
        columns,
        slack,
        relaxation,
        guidance_scale=guidance_scale,
        guidance_channels=channels if guidance_channels is None else guidance_channels,
        clip=clip,
    )
