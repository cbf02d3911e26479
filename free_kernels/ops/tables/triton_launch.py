"""``table_rows`` as one Triton kernel."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from free_kernels.ops.aot import POINTERS, AotConfiguration, Device, configuration
from free_kernels.ops.tables.arguments import TableArguments
from free_kernels.ops.tables.triton_kernels import table_kernel
from free_kernels.ops.triton_device import current, warp_size

# Whether the kernel runs in Triton's interpreter, on CPU tensors.
INTERPRETED = not isinstance(table_kernel, triton.runtime.JITFunction)
_BLOCK = 1024


def warps_for(warp: int) -> int:
    """Warps of ``warp`` threads of a program: four elements a thread."""
    return _BLOCK // (4 * warp)


def table_rows(a: TableArguments) -> Tensor:
    """Contract of :func:`free_kernels.ops.tables.table_rows`; arguments have been checked."""
    out = a.rows.new_empty(a.t.shape[0], *a.rows.shape[1:])
    numel = math.prod(a.rows.shape[1:])
    if out.numel():
        with current(out):
            grid = (a.t.shape[0] * triton.cdiv(numel, _BLOCK),)
            table_kernel[grid](*a, out, numel, BLOCK=_BLOCK, num_warps=warps_for(warp_size(out.device)))
    return out


def aot_configurations(device: Device) -> list[AotConfiguration]:
    """Every dtype of rows, aligned and not."""
    types = dict.fromkeys(("p_row_of_timestep", "p_row_of_label", "p_t", "p_y"), "*i64")
    return [
        configuration(
            table_kernel,
            types | dict.fromkeys(("p_rows", "p_out"), POINTERS[dtype]),
            {"BLOCK": _BLOCK},
            ["numel"] if aligned else [],
            label=f"table_kernel {str(dtype).removeprefix('torch.')}{'' if aligned else ' odd'}",
            group="table",
            size=_BLOCK + (not aligned),
            num_warps=warps_for(device.warp_size),
        )
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        for aligned in (True, False)
    ]
