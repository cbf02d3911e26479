"""``adaptive_norm`` as one Triton kernel."""

from __future__ import annotations

from itertools import product

import torch
import triton
from torch import Tensor

from free_kernels.ops.aot import POINTERS, AotConfiguration, Device, configuration
from free_kernels.ops.norms.arguments import NormArguments
from free_kernels.ops.norms.triton_kernels import norm_kernel
from free_kernels.ops.triton_device import current, warp_size

# Whether the kernel runs in Triton's interpreter, on CPU tensors.
INTERPRETED = not isinstance(norm_kernel, triton.runtime.JITFunction)
# A token of so many values at most is one block.
_LARGEST_BLOCK = 4096


def block_for(width: int) -> int:
    """Values of a block of tokens ``width`` wide."""
    return min(triton.next_power_of_2(width), _LARGEST_BLOCK)


def warps_for(block: int, warp: int) -> int:
    """Warps of ``warp`` threads of a program: eight values a thread."""
    return max(1, block // (8 * warp))


def adaptive_norm(a: NormArguments) -> tuple[Tensor, Tensor]:
    """Contract of :func:`free_kernels.ops.norms.adaptive_norm`; arguments have been checked."""
    rows, tokens, width = a.x.shape
    total, out = torch.empty_like(a.x), torch.empty_like(a.x)
    block = block_for(width)
    if out.numel():
        with current(out):
            norm_kernel[(rows * tokens,)](
                *(a.x, a.update, a.modulations, a.skip, total, out, tokens),
                *(tokens if a.update is None else tokens * a.update.shape[0], width, a.modulations.shape[1]),
                *(a.gate_at, a.shift_at, a.scale_at, a.gain_at, a.eps),
                UPDATED=a.update is not None,
                GATED=a.gate_at >= 0,
                SKIPS=a.gain_at >= 0,
                WHOLE=width <= block,
                BLOCK=block,
                num_warps=warps_for(block, warp_size(out.device)),
            )
    return total, out


def aot_configurations(device: Device) -> list[AotConfiguration]:
    """The three calls of a drafter and the bare norm, in all dtypes, for narrow, wide and very wide tokens."""
    kinds = {
        "update": {"UPDATED": True, "GATED": False, "SKIPS": False},
        "gated": {"UPDATED": True, "GATED": True, "SKIPS": False},
        "gated with skip": {"UPDATED": True, "GATED": True, "SKIPS": True},
        "bare": {"UPDATED": False, "GATED": False, "SKIPS": False},
    }
    found = []
    dtypes = torch.float32, torch.bfloat16, torch.float16
    for dtype, (kind, values), width in product(dtypes, kinds.items(), (96, 1152, 2 * _LARGEST_BLOCK)):
        block = block_for(width)
        values = values | {"WHOLE": width <= block, "BLOCK": block}
        values |= {} if values["UPDATED"] else {"p_update": None}
        values |= {} if values["SKIPS"] else {"p_skip": None}
        names = ("p_x", "p_update", "p_modulations", "p_skip", "p_sum", "p_out")
        found.append(
            configuration(
                norm_kernel,
                dict.fromkeys(names, POINTERS[dtype]) | {"eps": "fp32"},
                values,
                ["width"],
                label=f"norm_kernel {str(dtype).removeprefix('torch.')} {kind}, width {width}",
                group="norm",
                size=width * (1 + values["UPDATED"] + values["GATED"] + 2 * values["SKIPS"]),
                num_warps=warps_for(block, device.warp_size),
            )
        )
    return found
