"""Public op of the head of a DiT."""

from __future__ import annotations

import torch
from torch import Tensor

from free_kernels.ops.checks import INT64, Layouts
from free_kernels.ops.declaration import Op
from free_kernels.ops.final_layer import reference
from free_kernels.ops.final_layer.arguments import FinalLayerArguments as FinalLayerArguments
from free_kernels.validation import check_int, fail

_NAME = "final_layer"
_FLOAT32 = (torch.float32,)


def _check(a: FinalLayerArguments) -> None:
    Layouts(_NAME, None, {}).check("h", a.h, _FLOAT32, "[R, T, D]")
    layouts = Layouts(_NAME, a.h.device, dict(zip("RTD", a.h.shape, strict=True)) | {"2": 2, "1": 1})
    layouts.check("rows", a.rows, _FLOAT32, "[N, 2, 1, D]")
    layouts.check("row_of_timestep", a.row_of_timestep, INT64, "[timesteps]")
    layouts.check("row_of_label", a.row_of_label, INT64, "[labels]")
    layouts.check("t", a.t, INT64, "[R]")
    layouts.check("y", a.y, INT64, "[R]")
    layouts.check("weight", a.weight, _FLOAT32, "[O, D]", contiguous=False)
    layouts.sizes["O"] = len(a.weight)
    if a.bias is not None:
        layouts.check("bias", a.bias, _FLOAT32, "[O]")
    if a.h.shape[2] < 1:
        fail(_NAME, "h", "at least one value wide", a.h)
    if a.h.shape[1] < 1:
        fail(_NAME, "h", "[R, T, D] with T >= 1", a.h)
    if len(a.weight) < 1:
        fail(_NAME, "weight", "[O, D] with O >= 1", a.weight)
    if not a.eps > 0:
        fail(_NAME, "eps", "above 0", a.eps)
    if a.h.shape[1] % check_int(_NAME, "grid_rows", a.grid_rows, 1):
        fail(_NAME, "grid_rows", f"a divisor of {a.h.shape[1]} tokens", a.grid_rows)
    patch = check_int(_NAME, "patch_rows", a.patch_rows, 1) * check_int(_NAME, "patch_columns", a.patch_columns, 1)
    if len(a.weight) % patch:
        fail(_NAME, "patch_columns", f"such that patches divide {len(a.weight)} values", a.patch_columns)


def _fake(a: FinalLayerArguments) -> Tensor:
    rows, tokens, _ = a.h.shape
    channels = a.weight.shape[0] // (a.patch_rows * a.patch_columns)
    return a.h.new_empty(rows, channels, a.grid_rows * a.patch_rows, tokens // a.grid_rows * a.patch_columns)


OP = Op("final_layer_cpu", FinalLayerArguments, reference.final_layer, _fake, check=_check, public=_NAME)


def final_layer(arguments: FinalLayerArguments, backend: str = "auto") -> Tensor:
    """The output ``[R, C, H, W]`` of a DiT from its features: layer norm, modulation, linear layer, unpatchify.

    Modulations come from a table of timesteps and labels, whose row of a pair is
    ``row_of_timestep[t] + row_of_label[y]``. Tokens stand row by row of a grid; the O values of one are a patch,
    ``[patch_rows, patch_columns, C]``.

    Source: the final layer of DiT (arXiv 2212.09748).

    Args:
        arguments: float32 ``h [R, T, D]``; ``rows [N, 2, 1, D]``, shift and scale with its 1 added; int64
            ``row_of_timestep``, ``row_of_label``, ``t [R]``, ``y [R]``; ``weight [O, D]`` and ``bias [O]`` or None;
            ``eps``, which is added to variances; ``grid_rows``, a divisor of T; ``patch_rows`` and ``patch_columns``,
            whose product divides O.
        backend: ``"auto"`` (the extension for CPU tensors, if it is there), ``"reference"`` or ``"extension"``, which
            has no gradient.

    Raises:
        ValueError, TypeError: a wrong argument; values are checked by the extension only.
        RuntimeError: the backend cannot be used; the message says why.
    """
    return OP(arguments, arguments.h, backend)
