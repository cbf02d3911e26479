"""Public op of what lies between two layers of a block."""

from __future__ import annotations

from torch import Tensor

from free_kernels.ops.checks import FLOATS, Layouts
from free_kernels.ops.declaration import KernelOp
from free_kernels.ops.norms import reference
from free_kernels.ops.norms.arguments import NormArguments as NormArguments
from free_kernels.validation import fail


def _check(a: NormArguments) -> None:
    op = "adaptive_norm"
    Layouts(op, None, {}).check("x", a.x, FLOATS, "[R, T, D]")
    sizes = dict(zip("RTD", a.x.shape, strict=True))
    if sizes["D"] < 1:
        fail(op, "x", "at least one value wide", a.x)
    layouts = Layouts(op, a.x.device, sizes)
    if a.update is not None:
        shared = isinstance(a.update, Tensor) and a.update.ndim == 3 and a.update.shape[0] == 1
        layouts.check("update", a.update, FLOATS, "[1, T, D]" if shared else "[R, T, D]")
    layouts.check("modulations", a.modulations, FLOATS, "[R, K, D]")
    count = a.modulations.shape[1]
    for name in ("gate_at", "shift_at", "scale_at", "gain_at"):
        least, at = (0 if name in ("shift_at", "scale_at") else -1), getattr(a, name)
        if not least <= at < count:
            fail(op, name, f"in [{least}, {count})", at)
    if a.gate_at >= 0 and a.update is None:
        fail(op, "update", "given where gate_at is a place", a.update)
    if (a.skip is not None) != (a.gain_at >= 0):
        fail(op, "skip", "given exactly where gain_at is a place", a.skip)
    if a.skip is not None:
        layouts.check("skip", a.skip, (a.x.dtype,), "[R, T, D]")
    if not a.eps > 0:
        fail(op, "eps", "above 0", a.eps)


def _fake(a: NormArguments) -> tuple[Tensor, Tensor]:
    return a.x.new_empty(a.x.shape), a.x.new_empty(a.x.shape)


OP = KernelOp(
    "adaptive_norm",
    NormArguments,
    reference.adaptive_norm,
    _fake,
    _check,
    folder="norms",
    outputs="(Tensor, Tensor)",
)


def adaptive_norm(arguments: NormArguments, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """The residual sum and, normalised and modulated, what the next layer takes: ``x, y``, both ``[R, T, D]``.

    ``x + gate update`` and ``y = shift + scale layer_norm(x + gate update) + gain skip``, where gate, shift, scale and
    gain of a row are those of its ``modulations`` that ``gate_at``, ``shift_at``, ``scale_at`` and ``gain_at`` name.
    Without ``gate_at`` (-1) the update is added as it is, without ``update`` nothing is; without ``gain_at`` (-1) the
    last term is left out. The scale is taken as it stands: a 1 to be added to it is in it. The kernels compute in
    float32 and round the results only; they have no gradient, the reference has.

    Source: the modulation is adaLN-Zero of DiT (arXiv 2212.09748).

    Args:
        arguments: ``x [R, T, D]``, whose dtype is the results'; ``update`` of as many rows or of one, which is added to
            all; ``modulations [R, K, D]``; ``skip [R, T, D]`` of x's dtype; ``eps``, which is added to the variance.
        backend: ``"auto"`` (Triton on a GPU, else the extension if it is there), ``"reference"``, ``"extension"`` or
            ``"triton"``.

    Raises:
        ValueError, TypeError: a wrong argument.
        RuntimeError: the backend cannot be used; the message says why.
    """
    return OP(arguments, arguments.x, backend)
