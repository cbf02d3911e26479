"""``philox_uniform`` and ``philox_normal`` as one Triton kernel."""

from __future__ import annotations

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from free_kernels.ops.aot import AotConfiguration, Device, configuration
from free_kernels.ops.random.arguments import FillArguments
from free_kernels.ops.random.triton_philox import normals, seed_words, uniforms
from free_kernels.ops.triton_device import current, warp_size

# Philox blocks of a program, one for each thread, whose four numbers are one 16-byte store. If there are few numbers,
# programs are smaller, so that there are more of them.
_LARGE, _SMALL = 128, 32
_WANTED_PROGRAMS = 264


@triton.jit(do_not_specialize=["rows", "seed_low", "seed_high", "purpose"])
def philox_kernel(
    p_images, p_steps, p_rounds, p_out, seed_low, seed_high, rows, numel, purpose,
    NORMAL: tl.constexpr, ROUNDS: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """``ROWS`` keys, ``BLOCKS`` Philox blocks of each: elements of a ``[rows, numel]`` float32 tensor."""
    programs = tl.cdiv(tl.cdiv(numel, 4), BLOCKS)
    i_row = (tl.program_id(0) // programs).to(tl.int64) * ROWS
    i_first = (tl.program_id(0) % programs).to(tl.int64) * BLOCKS
    o_row = (i_row + tl.arange(0, ROWS))[:, None]
    used = o_row < rows
    draw_round = 0
    if ROUNDS:
        draw_round = tl.load(p_rounds + o_row, mask=used, other=0)
    image, step = tl.load(p_images + o_row, mask=used, other=0), tl.load(p_steps + o_row, mask=used, other=0)
    key = (seed_low, seed_high, image, step, draw_round)
    # Broadcast first: the generator's words have the shape of its block numbers.
    c0 = tl.broadcast_to((i_first + tl.arange(0, BLOCKS)).to(tl.uint32)[None, :], (ROWS, BLOCKS))
    b_draws = normals(c0, key, purpose) if NORMAL else uniforms(c0, key, purpose)
    o = (i_first * 4 + tl.arange(0, 4 * BLOCKS))[None, :]
    tl.store(p_out + o_row * numel + o, b_draws, mask=used & (o < numel))


# Whether the kernel runs in Triton's interpreter, on CPU tensors.
INTERPRETED = not isinstance(philox_kernel, triton.runtime.JITFunction)


def launch_shape(rows: int, numel: int) -> tuple[int, int]:
    """Keys of a program and Philox blocks of each key; depends on shapes only, so that a CUDA graph can hold it."""
    needed = triton.cdiv(numel, 4)
    size = _LARGE if rows * needed >= _WANTED_PROGRAMS * _LARGE else _SMALL
    blocks = min(size, triton.next_power_of_2(needed))
    return size // blocks, blocks


def philox_fill(arguments: FillArguments) -> Tensor:
    """Contract of ``philox_normal`` or ``philox_uniform`` of :mod:`free_kernels.ops.random`; arguments are checked."""
    seed, images, steps, purpose, numel, rounds, normal = arguments
    rows = images.shape[0]
    out = torch.empty(rows, numel, dtype=torch.float32, device=images.device)
    if out.numel() == 0:
        return out
    per_program, blocks = launch_shape(rows, numel)
    grid = (triton.cdiv(rows, per_program) * triton.cdiv(triton.cdiv(numel, 4), blocks),)
    with current(out):
        philox_kernel[grid](
            images.contiguous(),
            steps.contiguous(),
            None if rounds is None else rounds.contiguous(),
            out,
            *seed_words(seed),
            rows,
            numel,
            purpose,
            NORMAL=normal,
            ROUNDS=rounds is not None,
            ROWS=per_program,
            BLOCKS=blocks,
            num_warps=max(1, per_program * blocks // warp_size(out.device)),
        )
    return out


def aot_configurations(device: Device) -> list[AotConfiguration]:
    """Both ops for one number a key, an odd size, two latent sizes and more than 2**32 numbers a key."""
    return [
        _aot(device, rows, numel, normal, with_rounds)
        for (rows, numel), normal, with_rounds in itertools.product(
            ((6, 1), (512, 315), (6, 4096), (512, 16384), (2, 2**33)), (False, True), (False, True)
        )
    ]


def _aot(device: Device, rows: int, numel: int, normal: bool, with_rounds: bool) -> AotConfiguration:
    per_program, blocks = launch_shape(rows, numel)
    values: dict[str, object] = {"NORMAL": normal, "ROUNDS": with_rounds, "ROWS": per_program, "BLOCKS": blocks}
    # Triton makes constants of pointers that are None and of sizes that are 1.
    values |= ({} if with_rounds else {"p_rounds": None}) | ({"numel": 1} if numel == 1 else {})
    types = dict.fromkeys(("p_images", "p_steps", "p_rounds"), "*i64") | {"p_out": "*fp32"}
    wide = numel >= 2**31
    types |= {"numel": "i64"} if wide else {}
    group = f"philox_{'normal' if normal else 'uniform'}"
    return configuration(
        philox_kernel,
        types,
        values,
        ["numel"] if numel % 16 == 0 else [],
        label=f"{group} {rows}x{numel}{' rounds' if with_rounds else ''}",
        group=group,
        size=per_program * blocks * (1 + normal) + with_rounds + wide,
        num_warps=max(1, per_program * blocks // device.warp_size),
    )
