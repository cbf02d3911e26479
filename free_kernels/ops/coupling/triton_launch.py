"""``couple``, ``couple_block`` in two Triton launches: a pass over the drafted rows, and one to decide and commit."""

from __future__ import annotations

import contextlib
import itertools
import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from free_kernels.ops.aot import POINTERS, AotConfiguration, Device
from free_kernels.ops.coupling.triton_kernels import (
    FIXED_FIGURES,
    LEARNED_FIGURES,
    coupling_commit_kernel,
    coupling_rows_kernel,
)
from free_kernels.ops.random.triton_philox import seed_words
from free_kernels.ops.triton_device import warp_size

# Enough programs to give every multiprocessor of a large GPU two.
_WANTED_PROGRAMS = 264
# Whether the kernels run in Triton's interpreter, on CPU tensors.
INTERPRETED = not isinstance(coupling_rows_kernel, triton.runtime.JITFunction)
_LARGEST_BLOCK, _SMALLEST_BLOCK, _MAX_SPLITS = 512, 256, 64


class LaunchShape(NamedTuple):
    """How D elements are divided.

    Attributes:
        block: elements that a program of the row pass holds at a time.
        chunks: blocks that a program of the row pass goes through.
        num_splits: programs, and partial figures, of a row.
        commit_block: elements of a program of the commit pass.
    """

    block: int
    chunks: int
    num_splits: int
    commit_block: int


def launch_shape(slots: int, length: int, numel: int) -> LaunchShape:
    """Division of the work for S slots of at most L rows with D elements; shapes only, so a graph can hold it.

    Many rows (512 of 16,384): 512 elements, four a thread, put one 16-byte load of each of the seven tensors in flight
    per thread, and some ten such programs fit on a multiprocessor: more than streaming needs. Larger blocks take more
    registers and make the compiler rearrange 16-bit outputs through shared memory. Few rows (6 of 4096): smaller
    blocks, since the data must be spread over many multiprocessors to arrive at once; below 256 elements a program
    costs more than it fetches. Partials are read by every program of the commit pass, hence at most 64 of a row;
    larger latents give each program several blocks.
    """

    def block_for(rows: int) -> int:
        block = _LARGEST_BLOCK
        while block > _SMALLEST_BLOCK and rows * triton.cdiv(numel, block) < _WANTED_PROGRAMS:
            block //= 2
        return min(block, max(64, triton.next_power_of_2(numel)))

    block = block_for(slots * max(length - 1, 1))
    chunks = triton.cdiv(triton.cdiv(numel, block), _MAX_SPLITS)
    return LaunchShape(block, chunks, triton.cdiv(numel, block * chunks), block_for(slots))


def warps_for(block: int, warp: int) -> int:
    """Warps of ``warp`` threads of a program: four elements a thread, one 16-byte access."""
    return max(1, block // (4 * warp))


class _Noise(NamedTuple):
    """Where random numbers come from: three tensors, or keys."""

    noise: Tensor | None = None
    slack_noise: Tensor | None = None
    uniform: Tensor | None = None
    images: Tensor | None = None
    steps: Tensor | None = None
    rounds: Tensor | None = None
    seed: int = 0


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
    relaxation: Tensor | None,
    *,
    guidance_scale: float,
    guidance_channels: int,
    clip: float,
    joint: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Contract of :func:`free_kernels.ops.couple`, or of ``couple_block`` if ``joint``, then without ``relaxation``.

    Arguments have been checked.

    Returns:
        ``(next_states, committed, gap_sq)``: the fields of a ``Coupling``. The gap of a row without a draft is 0,
        and so is the state of an idle slot.
    """
    drawn = _Noise(
        noise=noise.contiguous(),
        slack_noise=None if slack_noise is None else slack_noise.contiguous(),
        uniform=uniform,
    )
    rest = (output, row_offsets, columns, relaxation)
    return _launch((draft_states, draft_mean, draft_std), drawn, rest, joint, guidance_scale, guidance_channels, clip)


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
    relaxation: Tensor | None,
    rounds: Tensor | None = None,
    *,
    guidance_scale: float,
    guidance_channels: int,
    clip: float,
    joint: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`couple` with noise, slack noise and uniforms made where they are used, never in memory.

    Contract of :func:`free_kernels.ops.couple_philox`, or of ``couple_block_philox`` if ``joint``; arguments have been
    checked, and ``seed`` may also be the int64 of the same bits.

    Returns:
        As :func:`couple`.
    """
    drawn = _Noise(
        images=images.contiguous(),
        steps=steps.contiguous(),
        rounds=None if rounds is None else rounds.contiguous(),
        seed=seed,
    )
    rest = (output, row_offsets, columns, relaxation)
    return _launch((draft_states, draft_mean, draft_std), drawn, rest, joint, guidance_scale, guidance_channels, clip)


def _strides(tensor: Tensor | None) -> tuple[int, int]:
    return (0, 0) if tensor is None else tensor.stride()


def _launch(
    drafts: tuple[Tensor, Tensor, Tensor],
    drawn: _Noise,
    rest: tuple[Tensor, Tensor, Tensor, Tensor | None],
    joint: bool,
    guidance_scale: float,
    guidance_channels: int,
    clip: float,
) -> tuple[Tensor, Tensor, Tensor]:
    states, mean, std = (tensor.contiguous() for tensor in drafts)
    output, row_offsets, columns, relaxation = rest
    columns, row_offsets = columns.contiguous(), row_offsets.contiguous()
    slots, length, *latent = states.shape
    numel = math.prod(latent)
    # Rows may lie apart (leading channels of a wider output), elements of a row may not.
    if not output[0].is_contiguous():
        output = output.contiguous()
    branches = 1 if guidance_scale == 1.0 else 2
    learned = output.shape[1] == 2 * latent[0]
    rows = slots * (length - 1)

    shape = launch_shape(slots, length, numel)
    new = states.new_empty
    next_states, gap_sq = new(slots, *latent), new(slots, length - 1)
    committed = torch.empty(slots, dtype=torch.int64, device=states.device)
    partials = new(LEARNED_FIGURES if learned else FIXED_FIGURES, rows, shape.num_splits)

    pointers = (
        states,
        mean,
        std,
        drawn.noise,
        drawn.slack_noise,
        drawn.images,
        drawn.steps,
        drawn.rounds,
        output,
        row_offsets,
        columns,
        partials,
    )
    guided = guidance_channels * numel // latent[0]
    sizes = (slots, length, numel, guided, output.shape[0] // branches, output.stride(0))
    flags = {
        "LEARNED": learned,
        "GUIDED": branches == 2,
        "CLIPPED": not math.isinf(clip),
        "PHILOX": drawn.images is not None,
        "ROUNDS": drawn.rounds is not None,
        "NUM_SPLITS": shape.num_splits,
    }
    common = (*pointers, *seed_words(drawn.seed), *sizes, float(guidance_scale), float(clip))
    written = (drawn.uniform, relaxation, next_states, committed, gap_sq)
    num_blocks = triton.cdiv(numel, shape.commit_block)
    warp = warp_size(states.device)
    with torch.cuda.device(states.device) if states.is_cuda else contextlib.nullcontext():
        if rows > 0:
            coupling_rows_kernel[(rows * shape.num_splits,)](
                *common, **flags, BLOCK=shape.block, CHUNKS=shape.chunks, num_warps=warps_for(shape.block, warp)
            )
        if slots > 0:
            coupling_commit_kernel[(slots * num_blocks,)](
                *common,
                *written,
                *_strides(relaxation),
                *_strides(drawn.uniform),
                **flags,
                RELAXED=relaxation is not None,
                JOINT=joint,
                BLOCK=shape.commit_block,
                NUM_BLOCKS=num_blocks,
                PADDED_SPLITS=triton.next_power_of_2(shape.num_splits),
                PADDED_LENGTH=triton.next_power_of_2(length),
                num_warps=warps_for(shape.commit_block, warp),
            )
    return next_states, committed, gap_sq


def aot_configurations(device: Device) -> list[AotConfiguration]:
    """Both kernels for rounds of 6 rows: every output dtype and usual flag, joint decisions, sizes and rarer flags."""
    found = []
    for dtype, guided, learned, philox in itertools.product(
        (torch.float32, torch.bfloat16, torch.float16), (False, True), (False, True), (False, True)
    ):
        found += _aot_pair(device, 1, 4096, dtype, guided=guided, learned=learned, philox=philox)
    # Joint decisions concern the commit pass alone, and the output's dtype is none of theirs.
    for guided, learned, philox in itertools.product((False, True), repeat=3):
        flags = {"guided": guided, "learned": learned, "philox": philox, "joint": True}
        found += _aot_pair(device, 1, 4096, torch.bfloat16, **flags)[1:]
    flags = {"guided": True, "learned": True, "philox": True, "joint": True}
    for length in (1, 16):
        found += _aot_pair(device, 1, 4096, torch.bfloat16, length=length, **flags)[1:]
    for philox in (False, True):
        found += _aot_pair(device, 86, 16384, torch.bfloat16, guided=True, learned=True, philox=philox)
    # Rare switches together, a latent of odd size, and one beyond the number of splits.
    for numel, philox in itertools.product((65536, 315), (False, True)):
        found += _aot_pair(device, 1, numel, torch.bfloat16, guided=True, learned=True, philox=philox, rare=True)
    return found


def _aot_pair(
    device: Device,
    slots: int,
    numel: int,
    dtype: torch.dtype,
    *,
    guided: bool,
    learned: bool,
    philox: bool,
    rare: bool = False,
    joint: bool = False,
    length: int = 6,
) -> list[AotConfiguration]:
    shape = launch_shape(slots, length, numel)
    types = {f"p_{name}": "*fp32" for name in ("states", "draft_mean", "draft_std", "columns", "partials", "gap_sq")}
    types |= {f"p_{name}": "*fp32" for name in ("noise", "slack_noise", "uniform", "relaxation", "next_states")}
    types |= {f"p_{name}": "*i64" for name in ("images", "steps", "rounds", "row_offsets", "committed")}
    types |= {"p_output": POINTERS[dtype], "guidance_scale": "fp32", "clip": "fp32"}
    flags = {"LEARNED": learned, "GUIDED": guided, "CLIPPED": rare, "RELAXED": rare}
    flags |= {"JOINT": joint, "PHILOX": philox, "ROUNDS": philox and (rare or joint)}
    absent = {"p_noise", "p_slack_noise", "p_uniform"} if philox else {"p_images", "p_steps"}
    absent |= set() if flags["ROUNDS"] else {"p_rounds"}
    absent |= set() if learned else {"p_slack_noise"}
    absent |= set() if rare else {"p_relaxation"}
    sizes = {
        "NUM_SPLITS": shape.num_splits,
        "CHUNKS": shape.chunks,
        "NUM_BLOCKS": triton.cdiv(numel, shape.commit_block),
        "PADDED_SPLITS": triton.next_power_of_2(shape.num_splits),
        "PADDED_LENGTH": triton.next_power_of_2(length),
    }
    said = [str(dtype).removeprefix("torch."), *(name.lower() for name, value in flags.items() if value)]
    kind = f"{'joint ' if joint else ''}{'learned' if learned else 'fixed'}"
    pair = []
    for kernel, block in ((coupling_rows_kernel, shape.block), (coupling_commit_kernel, shape.commit_block)):
        values: dict[str, object] = {**flags, **sizes, "BLOCK": block} | dict.fromkeys(absent)
        constants = {name: value for name, value in values.items() if name in kernel.arg_names}
        signature = {name: types.get(name, "i32") for name in kernel.arg_names if name not in constants}
        aligned = ["numel", "guided_numel", "output_stride"] if numel % 16 == 0 else []
        pair.append(
            AotConfiguration(
                f"{kernel.__name__} {slots}x{length}x{numel} {' '.join(said)}",
                f"{kernel.__name__.removesuffix('_kernel')} {kind}",
                kernel,
                signature,
                block * (1 + sum(flags.values())),
                constants,
                num_warps=warps_for(block, device.warp_size),
                divisible=[name for name in signature if name.startswith("p_")] + aligned,
            )
        )
    return pair
