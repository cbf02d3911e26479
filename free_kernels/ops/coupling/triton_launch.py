"""The coupling ops in two Triton launches: one over the drafted rows, and one that decides and commits."""

from __future__ import annotations

import math
from itertools import product
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from free_kernels.ops.aot import POINTERS, AotConfiguration, Device, configuration
from free_kernels.ops.coupling.arguments import Coupling, CouplingArguments, KeyedCouplingArguments
from free_kernels.ops.coupling.triton_kernels import (
    FIXED_SUMS,
    LEARNED_SUMS,
    coupling_commit_kernel,
    coupling_rows_kernel,
)
from free_kernels.ops.random.triton_philox import seed_words
from free_kernels.ops.triton_device import current, warp_size

# Two programs for each multiprocessor of an H100, which has 132.
_WANTED_PROGRAMS = 264
# Whether the kernels run in Triton's interpreter, on CPU tensors.
INTERPRETED = not isinstance(coupling_rows_kernel, triton.runtime.JITFunction)
_LARGEST_BLOCK, _SMALLEST_BLOCK, _MAX_SPLITS = 512, 256, 64


class LaunchShape(NamedTuple):
    """How D elements are divided."""

    block: int  # elements that a program of the rows kernel holds at a time
    chunks: int  # blocks that a program of the rows kernel goes through
    num_splits: int  # programs, and partial sums of each index, of a row
    commit_block: int  # elements of a program of the commit kernel


def launch_shape(slots: int, length: int, numel: int) -> LaunchShape:
    """Division of the work for S slots of at most L rows with D elements.

    It depends on shapes only, so that a CUDA graph can hold the launch.

    Many rows (512 of 16,384 elements) get blocks of 512: four elements a thread, one 16-byte load from each of seven
    tensors; about ten such programs fit on a multiprocessor, more than it takes to reach the memory's bandwidth. Larger
    blocks take more registers, and the compiler then moves 16-bit outputs through shared memory. Few rows (6 of 4096
    elements) get smaller blocks, so that many multiprocessors load at once; below 256 elements starting a program costs
    more than its loads. Every program of the commit kernel reads all partial sums of its slot, hence at most 64 for
    each row; a program of the rows kernel goes through several blocks where a latent needs more.
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
    """Warps of ``warp`` threads for a block: four elements a thread, which is one 16-byte access in float32."""
    return max(1, block // (4 * warp))


def couple(arguments: CouplingArguments | KeyedCouplingArguments) -> Coupling:
    """Contract of :func:`free_kernels.ops.couple` or ``couple_philox``; arguments have been checked.

    The gap of a row without a draft is 0, and so is the state of an idle slot.
    """
    return _launch(arguments, False)


def couple_block(arguments: CouplingArguments | KeyedCouplingArguments) -> Coupling:
    """Contract of :func:`free_kernels.ops.couple_block` or ``couple_block_philox``; otherwise as :func:`couple`."""
    return _launch(arguments, True)


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def _launch(a: CouplingArguments | KeyedCouplingArguments, joint: bool) -> Coupling:
    drafts = _contiguous(a.draft_states, a.draft_mean, a.draft_std)
    states, keyed = drafts[0], isinstance(a, KeyedCouplingArguments)
    if keyed:
        noise, keys, uniform, seed = (None, None), _contiguous(a.images, a.steps, a.rounds), None, a.seed
    else:
        noise, keys, uniform, seed = _contiguous(a.noise, a.slack_noise), (None, None, None), a.uniform, 0
    slots, length, *latent = states.shape
    numel, rows = math.prod(latent), slots * (length - 1)
    # There may be space between rows (where these are the first channels of a wider output), but not within a row.
    output = a.output if a.output[0].is_contiguous() else a.output.contiguous()
    branches = 1 if a.guidance_scale == 1.0 else 2
    learned = output.shape[1] == 2 * latent[0]

    shape = launch_shape(slots, length, numel)
    new = states.new_empty
    outcome = Coupling(new(slots, *latent), new(slots, dtype=torch.int64), new(slots, length - 1))
    partials = new(LEARNED_SUMS if learned else FIXED_SUMS, rows, shape.num_splits)
    guided_numel = a.guidance_channels * numel // latent[0]
    common = (
        *(*drafts, *noise, *keys, output, *_contiguous(a.row_offsets, a.columns), partials),
        *seed_words(seed),
        *(slots, length, numel, guided_numel, output.shape[0] // branches, output.stride(0)),
        *(float(a.guidance_scale), float(a.clip)),
    )
    strides = [stride for x in (a.relaxation, uniform) for stride in ((0, 0) if x is None else x.stride())]
    flags = {
        "LEARNED": learned,
        "GUIDED": branches == 2,
        "CLIPPED": not math.isinf(a.clip),
        "PHILOX": keyed,
        "ROUNDS": keyed and a.rounds is not None,
        "NUM_SPLITS": shape.num_splits,
    }
    num_blocks = triton.cdiv(numel, shape.commit_block)
    warp = warp_size(states.device)
    with current(states):
        if rows > 0:
            coupling_rows_kernel[(rows * shape.num_splits,)](
                *common, **flags, BLOCK=shape.block, CHUNKS=shape.chunks, num_warps=warps_for(shape.block, warp)
            )
        if slots > 0:
            coupling_commit_kernel[(slots * num_blocks,)](
                *(*common, uniform, a.relaxation, *outcome, *strides),
                **flags,
                RELAXED=a.relaxation is not None,
                JOINT=joint,
                BLOCK=shape.commit_block,
                NUM_BLOCKS=num_blocks,
                PADDED_SPLITS=triton.next_power_of_2(shape.num_splits),
                PADDED_LENGTH=triton.next_power_of_2(length),
                num_warps=warps_for(shape.commit_block, warp),
            )
    return outcome


def aot_configurations(device: Device) -> list[AotConfiguration]:
    """Both kernels, mostly for rounds of 6 rows: all output dtypes, flags, joint decisions and several sizes."""
    found = []
    bfloat16, usual = torch.bfloat16, ("guided", "learned", "philox")
    switches = [{name for name, on in zip(usual, states, strict=True) if on} for states in product((0, 1), repeat=3)]
    for dtype, flags in product((torch.float32, bfloat16, torch.float16), switches):
        found += aot_pair(device, (1, 6, 4096), dtype, flags)
    # Joint decisions are in the commit kernel alone, and the output's dtype makes no difference to them.
    for flags in switches:
        found += aot_pair(device, (1, 6, 4096), bfloat16, flags | {"joint"})[1:]
    for length in (1, 16):
        found += aot_pair(device, (1, length, 4096), bfloat16, {*usual, "joint"})[1:]
    keyed = ({"guided", "learned"}, set(usual))
    for flags in keyed:
        found += aot_pair(device, (86, 6, 16384), bfloat16, flags)
    # The rare flags together, a latent of odd size, and one with more blocks than there may be partial sums.
    for numel, flags in product((65536, 315), keyed):
        found += aot_pair(device, (1, 6, numel), bfloat16, flags | {"rare"})
    return found


def aot_pair(
    device: Device, sizes: tuple[int, int, int], dtype: torch.dtype, switched_on: set[str]
) -> list[AotConfiguration]:
    """Both kernels as they are launched for slots, rows of each and elements of a latent ``sizes``.

    Args:
        device: for which they are compiled.
        sizes: S, L, D.
        dtype: the output's.
        switched_on: of ``"guided"``, ``"learned"``, ``"philox"``, ``"joint"`` and ``"rare"``, clipped and relaxed.
    """
    slots, length, numel = sizes
    guided, learned, philox, rare, joint = (
        name in switched_on for name in ("guided", "learned", "philox", "rare", "joint")
    )
    shape = launch_shape(slots, length, numel)
    floats = ("states", "draft_mean", "draft_std", "columns", "partials", "gap_sq")
    floats += ("noise", "slack_noise", "uniform", "relaxation", "next_states")
    types = {f"p_{name}": "*fp32" for name in floats} | {"guidance_scale": "fp32", "clip": "fp32"}
    types |= {f"p_{name}": "*i64" for name in ("images", "steps", "rounds", "row_offsets", "committed")}
    types |= {"p_output": POINTERS[dtype]}
    flags = {"LEARNED": learned, "GUIDED": guided, "CLIPPED": rare, "RELAXED": rare}
    flags |= {"JOINT": joint, "PHILOX": philox, "ROUNDS": philox and (rare or joint)}
    absent = {"p_noise", "p_slack_noise", "p_uniform"} if philox else {"p_images", "p_steps"}
    absent |= set() if flags["ROUNDS"] else {"p_rounds"}
    absent |= set() if learned else {"p_slack_noise"}
    absent |= set() if rare else {"p_relaxation"}
    values = {
        "NUM_SPLITS": shape.num_splits,
        "CHUNKS": shape.chunks,
        "NUM_BLOCKS": triton.cdiv(numel, shape.commit_block),
        "PADDED_SPLITS": triton.next_power_of_2(shape.num_splits),
        "PADDED_LENGTH": triton.next_power_of_2(length),
    }
    said = [str(dtype).removeprefix("torch."), *(name.lower() for name, value in flags.items() if value)]
    return [
        configuration(
            kernel,
            types,
            {**flags, **values, "BLOCK": block} | dict.fromkeys(absent),
            ["numel", "guided_numel", "output_stride"] if numel % 16 == 0 else [],
            label=f"{kernel.__name__} {slots}x{length}x{numel} {' '.join(said)}",
            group=f"{kernel.__name__.removesuffix('_kernel')} {'joint ' * joint}{'learned' if learned else 'fixed'}",
            size=block * (1 + sum(flags.values())),
            num_warps=warps_for(block, device.warp_size),
        )
        for kernel, block in ((coupling_rows_kernel, shape.block), (coupling_commit_kernel, shape.commit_block))
    ]
