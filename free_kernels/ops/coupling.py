"""Public coupling ops: what a step does with the network's output, and how a round of drafts is decided."""

from __future__ import annotations

import importlib
import math

import torch
from torch import Tensor

from free_kernels.ops.triton_runtime import why_no_runtime
from free_kernels.reference import coupling as reference
from free_kernels.reference.coupling import Coupling
from free_kernels.validation import check_choice, fail

BACKENDS = ("auto", "reference", "triton")
NUM_COLUMNS = 8
_SCHEMA = (
    "couple(Tensor draft_states, Tensor draft_mean, Tensor draft_std, Tensor noise, Tensor? slack_noise, "
    "Tensor uniform, Tensor output, Tensor row_offsets, Tensor columns, Tensor? slack, Tensor? relaxation, "
    "float guidance_scale, int guidance_channels, float clip) -> (Tensor, Tensor, Tensor, Tensor)"
)


def _use_triton(device: torch.device, backend: str) -> bool:
    if backend == "auto":
        return device.type != "cpu" and why_no_runtime("coupling", device.type, device.index) is None
    if check_choice("couple", "backend", backend, BACKENDS) == "reference":
        return False
    reason = why_no_runtime("coupling", device.type, device.index)
    if reason is not None:
        raise RuntimeError(f"couple: backend 'triton' cannot be used: {reason}")
    return True


def _settings(guidance_scale: float, guidance_channels: int, clip: float) -> dict[str, float | int]:
    return {"guidance_scale": guidance_scale, "guidance_channels": guidance_channels, "clip": clip}


def _as_op_result(outcome: tuple[Tensor, Tensor, Tensor, Tensor | None]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """An op cannot return None: figures that do not exist have no element."""
    next_states, committed, gap_sq, figures = outcome
    return next_states, committed, gap_sq, gap_sq.new_empty(0) if figures is None else figures


def _couple_reference(*arguments: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _as_op_result(reference.couple(*arguments[:-3], **_settings(*arguments[-3:])))


def _couple_triton(*arguments: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kernels = importlib.import_module("free_kernels.triton.coupling")
    return _as_op_result(kernels.couple(*arguments[:-3], **_settings(*arguments[-3:])))


def _couple_fake(draft_states: Tensor, draft_mean: Tensor, *arguments: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    slots, length = draft_states.shape[:2]
    slack = arguments[7]
    figures = draft_states.new_empty((3, slots, length - 1) if slack is not None and length > 1 else (0,))
    committed = draft_states.new_empty(slots, dtype=torch.int64)
    return (
        draft_states.new_empty(slots, *draft_states.shape[2:]),
        committed,
        figures.new_empty(slots, length - 1),
        figures,
    )


_LIBRARY = torch.library.Library("free_kernels", "FRAGMENT")
_LIBRARY.define(_SCHEMA)
_LIBRARY.impl("couple", _couple_reference, "CPU")
_LIBRARY.impl("couple", _couple_triton, "CUDA")
torch.library.register_fake("free_kernels::couple", _couple_fake, lib=_LIBRARY)


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
        backend: ``"auto"`` (Triton on a GPU), ``"reference"`` or ``"triton"``.

    Returns:
        A :class:`Coupling`.

    Raises:
        ValueError, TypeError: a shape or dtype does not fit, or the backend is unknown.
        RuntimeError: ``backend="triton"`` cannot be used; the message says why.
    """
    use_triton = _use_triton(draft_states.device, backend)
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
    arguments = (
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
    )
    guided = channels if guidance_channels is None else guidance_channels
    if not use_triton:
        return reference.couple(*arguments, **_settings(guidance_scale, guided, clip))
    # The op's CPU implementation is the reference; Triton's interpreter is called for itself.
    run = _couple_triton if draft_states.is_cpu else torch.ops.free_kernels.couple
    next_states, committed, gap_sq, figures = run(*arguments, guidance_scale, guided, clip)
    return Coupling(next_states, committed, gap_sq, None if slack is None or length == 1 else figures)
