"""Public op of a learned drafter's input."""

from __future__ import annotations

import torch
from torch import Tensor

from free_kernels.ops.checks import FLOATS, INT64, Layouts
from free_kernels.ops.declaration import KernelOp
from free_kernels.ops.tokens import reference
from free_kernels.ops.tokens.arguments import TokenArguments as TokenArguments
from free_kernels.validation import fail

FLOAT32 = (torch.float32,)


def _parts(a: TokenArguments) -> list[int]:
    return sorted(place for place in (a.state_at, a.unit_at, a.scaled_at) if place >= 0)


def _check(a: TokenArguments) -> None:
    op = "drafter_tokens"
    Layouts(op, None, {}).check("feature", a.feature, (*FLOATS, torch.float64), "[R, T, D]")
    rows, tokens, _ = a.feature.shape
    sizes = {"R": rows}
    layouts = Layouts(op, a.feature.device, sizes)
    layouts.check("state", a.state, FLOAT32, "[R, C, H, W]")
    _, sizes["C"], sizes["H"], sizes["W"] = a.state.shape
    layouts.check("previous", a.previous, FLOAT32, "[R, C, H, W]")
    layouts.check("t", a.t, INT64, "[R]")
    p, q = a.patch_height, a.patch_width
    if min(p, q) < 1 or sizes["H"] % p or sizes["W"] % q or (sizes["H"] // p) * (sizes["W"] // q) != tokens:
        wanted = f"such that patches tile {sizes['H']} x {sizes['W']} states in {tokens} tokens"
        fail(op, "patch_height and patch_width", wanted, (p, q))
    if a.time_unit < 1:
        fail(op, "time_unit", "at least 1", a.time_unit)
    places = a.state_at, a.unit_at, a.scaled_at
    if _parts(a) != list(range(len(_parts(a)))) or not _parts(a):
        fail(op, "state_at, unit_at and scaled_at", "the places 0, 1 ... of those that are taken, else -1", places)
    if (a.change_rms is not None) != (a.scaled_at >= 0):
        fail(op, "change_rms", "given exactly where scaled_at is a place", a.change_rms)
    if a.change_rms is not None:
        layouts.check("change_rms", a.change_rms, FLOAT32, "[timesteps]")


def _run(a: TokenArguments) -> Tensor:
    if a.change_rms is not None and a.t.is_cpu and a.t.numel() and not torch.compiler.is_compiling():
        low, high = int(a.t.min()), int(a.t.max())
        if low < 0 or high // a.time_unit >= len(a.change_rms):
            fail("drafter_tokens", "t", f"in [0, {len(a.change_rms) * a.time_unit})", low if low < 0 else high)
    return reference.drafter_tokens(a)


def _fake(a: TokenArguments) -> Tensor:
    rows, tokens, width = a.feature.shape
    return a.feature.new_empty(rows, tokens, width + len(_parts(a)) * a.state.shape[1] * a.patch_height * a.patch_width)


OP = KernelOp("drafter_tokens", TokenArguments, _run, _fake, _check, folder="tokens")


def drafter_tokens(arguments: TokenArguments, backend: str = "auto") -> Tensor:
    """Feature and patches of the latest states side by side, ``[R, T, D + I C p q]``, without a gradient.

    Each token's feature is followed by its patch of I of these, at the places that ``state_at``, ``unit_at`` and
    ``scaled_at`` give them (-1 leaves one out): the state; its change over the last step, divided by the root of its
    mean square; the change divided by ``change_rms[t // time_unit]``. Patches go from left to right and down; within
    one come channels, lines and columns.

    Args:
        arguments: ``feature [R, T, D]``, whose dtype is the result's; ``previous`` and ``state`` float32
            ``[R, C, H, W]``; ``t`` int64 ``[R]``; ``change_rms`` float32, of every timestep.
        backend: ``"auto"`` (Triton on a GPU, else the extension if it is there), ``"reference"``, ``"extension"`` or
            ``"triton"``.

    Raises:
        ValueError, TypeError: a wrong argument; values are checked on the CPU only.
        RuntimeError: the backend cannot be used; the message says why.
    """
    return OP(arguments, arguments.feature, backend)
