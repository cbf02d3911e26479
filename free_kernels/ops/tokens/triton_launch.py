"""``drafter_tokens`` as one Triton kernel."""

from __future__ import annotations

from itertools import product

import torch
import triton
from torch import Tensor

from free_kernels.ops.aot import POINTERS, AotConfiguration, Device, configuration
from free_kernels.ops.tokens.arguments import TokenArguments
from free_kernels.ops.tokens.triton_kernels import tokens_kernel
from free_kernels.ops.triton_device import current, warp_size

# Whether the kernel runs in Triton's interpreter, on CPU tensors.
INTERPRETED = not isinstance(tokens_kernel, triton.runtime.JITFunction)
_BLOCK, _STATE_BLOCK = 1024, 1024


def warps_for(warp: int) -> int:
    """Warps of ``warp`` threads of a program: four elements a thread."""
    return _BLOCK // (4 * warp)


def drafter_tokens(a: TokenArguments) -> Tensor:
    """Contract of :func:`free_kernels.ops.tokens.drafter_tokens`; arguments have been checked."""
    rows, tokens, width = a.feature.shape
    channels, height, across = a.state.shape[1:]
    places = a.state_at, a.unit_at, a.scaled_at
    parts = sum(place >= 0 for place in places)
    full = width + parts * channels * a.patch_height * a.patch_width
    out = a.feature.new_empty(rows, tokens, full)
    if out.numel():
        with current(out):
            tokens_kernel[(rows * triton.cdiv(tokens * full, _BLOCK),)](
                *(a.feature, a.previous, a.state, a.t, a.change_rms, out, a.time_unit, tokens, width),
                *(channels, height, across),
                PATCH_H=a.patch_height,
                PATCH_W=a.patch_width,
                **dict(zip(("STATE_AT", "UNIT_AT", "SCALED_AT"), places, strict=True)),
                PARTS=parts,
                STATE_BLOCK=_STATE_BLOCK,
                BLOCK=_BLOCK,
                num_warps=warps_for(warp_size(out.device)),
            )
    return out


def aot_configurations(device: Device) -> list[AotConfiguration]:
    """All dtypes of features, with all three inputs and with one."""
    types = {f"p_{name}": "*fp32" for name in ("previous", "state", "change_rms")} | {"p_t": "*i64"}
    found = []
    dtypes = torch.float32, torch.bfloat16, torch.float16
    for dtype, places, patch in product(dtypes, ((0, 1, 2), (0, -1, -1)), (1, 2)):
        values = dict(zip(("STATE_AT", "UNIT_AT", "SCALED_AT"), places, strict=True))
        values |= {
            "PATCH_H": patch,
            "PATCH_W": patch,
            "PARTS": sum(place >= 0 for place in places),
            "STATE_BLOCK": _STATE_BLOCK,
            "BLOCK": _BLOCK,
        }
        values |= {} if places[2] >= 0 else {"p_change_rms": None}
        found.append(
            configuration(
                tokens_kernel,
                types | dict.fromkeys(("p_feature", "p_out"), POINTERS[dtype]),
                values,
                ["width", "height", "across", "tokens"],
                label=f"tokens_kernel {str(dtype).removeprefix('torch.')} {places} patch {patch}",
                group="tokens",
                size=_BLOCK * (1 + values["PARTS"]) + patch,
                num_warps=warps_for(device.warp_size),
            )
        )
    return found
