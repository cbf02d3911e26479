"""The drafting ops in one Triton launch each, ``keep_clean_rows`` in two."""

from __future__ import annotations

import math
from itertools import product

import torch
import triton
from torch import Tensor

from free_kernels.ops.aot import POINTERS, AotConfiguration, Device, configuration
from free_kernels.ops.drafting.arguments import (
    AdvanceArguments,
    CorrectArguments,
    ErrorArguments,
    FindArguments,
    JoinArguments,
    KeepArguments,
    KeepCleanArguments,
    OpenArguments,
    Opened,
    RenewArguments,
    ReplayArguments,
    RowArguments,
    TallyArguments,
    further_rows,
)
from free_kernels.ops.drafting.triton_clean import MEASURED, keep_clean_kernel, measure_kernel, replay_kernel
from free_kernels.ops.drafting.triton_kernels import (
    advance_kernel,
    open_kernel,
    renew_kernel,
    rows_kernel,
    tally_kernel,
)
from free_kernels.ops.drafting.triton_rows import (
    correct_kernel,
    errors_kernel,
    find_kernel,
    join_kernel,
    keep_kernel,
)
from free_kernels.ops.triton_device import current, warp_size

# Whether the kernels run in Triton's interpreter, on CPU tensors.
INTERPRETED = not isinstance(advance_kernel, triton.runtime.JITFunction)
# Elements of a program that shares a state with others, and of one that has it alone or copies a row, which should
# have many loads on their way at once.
_SHARED_BLOCK, _ALONE_BLOCK, _TALLY_BLOCK = 256, 2048, 1024
# The most elements at a time of a program that measures a row and its clean sample.
_MEASURE_BLOCK = 512
# Slots of a program that has nothing else to do.
_SLOTS = 32


def block_for(numel: int, most: int) -> int:
    """Elements at a time, at most so many, of a program that goes through D elements."""
    return min(most, max(64, triton.next_power_of_2(numel)))


def padded(length: int) -> int:
    """Rows of a slot that a kernel has room for: few values, each of which is a compilation."""
    return max(32, triton.next_power_of_2(length))


def warps_for(block: int, warp: int) -> int:
    """Warps of ``warp`` threads for a block: four elements a thread, which is one 16-byte access in float32."""
    return max(1, block // (4 * warp))


def many_warps(block: int, warp: int) -> int:
    """Twice as many: two elements a thread, for kernels whose registers four would spill."""
    return 2 * warps_for(block, warp)


def switches(a: AdvanceArguments | KeepCleanArguments) -> dict[str, bool]:
    """Flags of a kernel that reads outputs."""
    return {
        "LEARNED": a.output.shape[1] == 2 * a.states.shape[2],
        "GUIDED": a.guidance_scale != 1.0,
        "CLIPPED": not math.isinf(a.clip),
    }


def advance_drafts(a: AdvanceArguments) -> None:
    """Contract of :func:`free_kernels.ops.drafting.advance_drafts`; arguments have been checked."""
    slots, length, channels, *latent = a.states.shape
    numel = channels * math.prod(latent)
    branches = 1 if a.guidance_scale == 1.0 else 2
    if not slots or a.first == a.end:
        return
    drafts = a.states, a.mean, a.std, a.noise, a.columns, a.output, a.rows
    sizes = a.first, a.end, length, a.rows.shape[1], numel, a.guidance_channels * numel // channels
    sizes += a.output.shape[0] // branches, a.output.stride(0), float(a.guidance_scale), float(a.clip)
    with current(a.states):
        advance_kernel[(slots * triton.cdiv(numel, _SHARED_BLOCK),)](
            *drafts,
            *sizes,
            **switches(a),
            BLOCK=_SHARED_BLOCK,
            num_warps=warps_for(_SHARED_BLOCK, warp_size(a.states.device)),
        )


def replay_drafts(a: ReplayArguments) -> None:
    """Contract of :func:`free_kernels.ops.drafting.replay_drafts`; arguments have been checked."""
    slots, length, *latent = a.states.shape
    numel, output_numel = math.prod(latent), math.prod(a.held_clean.shape[1:])
    if not slots or length == 1:
        return
    with current(a.states):
        replay_kernel[(slots * triton.cdiv(numel, _SHARED_BLOCK),)](
            *(*a[:-1], float(a.clip), length, a.latest.shape[1], len(a.table), numel, output_numel),
            LEARNED=output_numel > numel,
            CLIPPED=not math.isinf(a.clip),
            BLOCK=_SHARED_BLOCK,
            num_warps=warps_for(_SHARED_BLOCK, warp_size(a.states.device)),
        )


def keep_clean_rows(a: KeepCleanArguments) -> None:
    """Contract of :func:`free_kernels.ops.drafting.keep_clean_rows`; arguments have been checked."""
    slots, length, channels, *latent = a.states.shape
    pixels, branches = math.prod(latent), 1 if a.guidance_scale == 1.0 else 2
    sizes = length, a.at.shape[1], a.output.shape[0] // branches, len(a.table)
    numels = channels * pixels, a.guidance_channels * pixels, a.output.shape[1] * pixels
    if not slots:
        return
    # What each row says, which the second kernel adds up.
    measured = a.response.new_empty(slots, length, MEASURED)
    given = *a[:13], measured, float(a.guidance_scale), float(a.clip), *sizes, *numels
    block, warp = block_for(numels[0], _MEASURE_BLOCK), warp_size(a.states.device)
    with current(a.states):
        measure_kernel[(slots * length,)](*given, **switches(a), BLOCK=block, num_warps=many_warps(block, warp))
        keep_clean_kernel[(slots * triton.cdiv(numels[0], _SHARED_BLOCK),)](
            *given, **switches(a), BLOCK=_SHARED_BLOCK, num_warps=many_warps(_SHARED_BLOCK, warp)
        )


def keep_rows(a: KeepArguments) -> None:
    """Contract of :func:`free_kernels.ops.drafting.keep_rows`; arguments have been checked."""
    slots, length = a.states.shape[:2]
    places = a.at.shape[1]
    branches = a.held_features.shape[0]
    numels = (math.prod(part.shape[axis:]) for part, axis in ((a.states, 2), (a.features, 1), (a.output, 1)))
    if not slots:
        return
    with current(a.states):
        keep_kernel[(slots * length,)](
            *a,
            *(length, slots, places, a.features.shape[0] // branches, *numels),
            BRANCHES=branches,
            BLOCK=_TALLY_BLOCK,
            num_warps=many_warps(_TALLY_BLOCK, warp_size(a.states.device)),
        )


def find_rows(a: FindArguments) -> None:
    """Contract of :func:`free_kernels.ops.drafting.find_rows`; arguments have been checked."""
    slots, places = a.at.shape
    if not slots:
        return
    with current(a.at):
        find_kernel[(slots,)](
            *a,
            *(places, a.places.shape[1]),
            ENTRIES=triton.next_power_of_2(places),
            num_warps=1,
        )


def open_round(a: OpenArguments) -> Opened:
    """Contract of :func:`free_kernels.ops.drafting.open_round`; arguments have been checked."""
    slots, *latent = a.state.shape
    numel, rows = math.prod(latent), (slots, a.length)
    steps, columns = a.current.new_empty(rows), a.table.new_empty(*rows, a.table.shape[1])
    outputs = steps, torch.empty_like(steps), columns, a.state.new_empty(*rows, *latent)
    blocks = triton.cdiv(numel, _TALLY_BLOCK)
    if slots:
        with current(a.state):
            open_kernel[(slots * blocks,)](
                *(*a[:4], *outputs, a.length, len(a.timesteps), numel),
                PADDED_LENGTH=padded(a.length),
                BLOCK=_TALLY_BLOCK,
                num_warps=warps_for(_TALLY_BLOCK, warp_size(a.state.device)),
            )
    drafts = (a.state.new_empty(slots, a.length - 1, *latent) for _ in range(2))
    return Opened(*outputs, *drafts)


def draft_rows(a: RowArguments) -> tuple[Tensor, Tensor]:
    """Contract of :func:`free_kernels.ops.drafting.draft_rows`; arguments have been checked."""
    slots, length, *latent = a.states.shape
    rows, numel = slots if a.active is None else len(a.active), math.prod(latent)
    out = a.states.new_empty(a.branches * rows, *latent), a.timesteps.new_empty(a.branches * rows)
    if rows:
        with current(a.states):
            rows_kernel[(rows * triton.cdiv(numel, _TALLY_BLOCK),)](
                *(a.states, a.timesteps, a.active, *out, rows, length, a.draft, numel),
                BRANCHES=a.branches,
                BLOCK=_TALLY_BLOCK,
                num_warps=warps_for(_TALLY_BLOCK, warp_size(a.states.device)),
            )
    return out


def renew_slots(a: RenewArguments) -> Tensor:
    """Contract of :func:`free_kernels.ops.drafting.renew_slots`; arguments have been checked."""
    fresh = torch.empty(len(a.steps), dtype=torch.bool, device=a.steps.device)
    if len(a.steps):
        with current(a.steps):
            grid = (triton.cdiv(len(a.steps), _SLOTS),)
            renew_kernel[grid](*a, fresh, len(a.steps), BLOCK=_SLOTS, num_warps=1)
    return fresh


def join_rows(a: JoinArguments) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Contract of :func:`free_kernels.ops.drafting.join_rows`; arguments have been checked."""
    slots, width = a.latest.shape
    branches, held, tokens, channels = a.features.shape
    count, inputs = further_rows(a), len(a.feature)
    # The kernel looks up a further row for each of the others, too.
    if not count:
        return tuple(part.clone() for part in a[:5])
    out = tuple(part.new_empty(inputs + branches * count, *part.shape[1:]) for part in a[:5])
    numels = math.prod(a.state.shape[1:]), tokens * channels
    sizes = inputs, count, slots, held, width, a.timesteps.shape[1], a.null_label or 0, *numels
    with current(a.feature):
        join_kernel[(len(out[0]) * triton.cdiv(max(numels), _TALLY_BLOCK),)](
            *(*a[:11], a.chosen, *out, *sizes),
            BLOCK=_TALLY_BLOCK,
            num_warps=warps_for(_TALLY_BLOCK, warp_size(a.feature.device)),
        )
    return out


def row_errors(a: ErrorArguments) -> Tensor:
    """Contract of :func:`free_kernels.ops.drafting.row_errors`; arguments have been checked."""
    slots, width = a.latest.shape
    branches, held, tokens, channels = a.features.shape
    shape = branches, a.drafts, slots, tokens, channels
    out = a.drafted.new_empty(shape) if a.chosen is None else a.drafted.new_zeros(shape)
    count, numel = further_rows(a), tokens * channels
    if count:
        sizes = a.inputs, count, a.drafts * slots, slots, held, width, numel
        with current(out):
            errors_kernel[(branches * count * triton.cdiv(numel, _TALLY_BLOCK),)](
                *(a.drafted, a.features, a.latest, a.chosen, out, *sizes),
                BLOCK=_TALLY_BLOCK,
                num_warps=warps_for(_TALLY_BLOCK, warp_size(out.device)),
            )
    return out


def correct_features(a: CorrectArguments) -> Tensor:
    """Contract of :func:`free_kernels.ops.drafting.correct_features`; arguments have been checked."""
    out = torch.empty_like(a.drafted)
    branches, drafts, slots, tokens, width = a.errors.shape
    rows, state_numel = len(a.state), math.prod(a.state.shape[1:])
    tensors = a.drafted, a.errors, a.state, a.previous, a.asked, a.latest, a.active, out
    if out.numel():
        with current(out):
            correct_kernel[(rows * triton.cdiv(tokens * width, _ALONE_BLOCK),)](
                *(*tensors, rows, slots, drafts, a.draft, a.latest.shape[1], state_numel, tokens * width),
                BRANCHES=branches,
                STATE_BLOCK=block_for(state_numel, _ALONE_BLOCK),
                BLOCK=_ALONE_BLOCK,
                num_warps=warps_for(_ALONE_BLOCK, warp_size(out.device)),
            )
    return out


def tally_round(a: TallyArguments) -> Tensor:
    """Contract of :func:`free_kernels.ops.drafting.tally_round`; arguments have been checked."""
    slots, drafts = a.gap_sq.shape
    finite = torch.ones(1, dtype=torch.int64, device=a.steps.device)
    numels = a.output.numel(), a.next_states.numel()
    programs = max(slots, *(triton.cdiv(numel, _TALLY_BLOCK) for numel in numels))
    if not programs:
        return finite
    with current(a.steps):
        tally_kernel[(programs,)](
            *(*a, finite, slots, drafts, len(a.deviation), *numels),
            PADDED_DRAFTS=padded(drafts),
            BLOCK=_TALLY_BLOCK,
            num_warps=warps_for(_TALLY_BLOCK, warp_size(a.steps.device)),
        )
    return finite


_FLOATS = (
    "states",
    "mean",
    "std",
    "noise",
    "columns",
    "asked",
    "held_states",
    "held_clean",
    "response",
    "pattern",
    "measured",
    "next_states",
    "gap_sq",
)
_FLOATS += ("state", "previous", "table", "out_previous", "out_state")
_INTEGERS = ("rows", "row_offsets", "committed", "lengths", "steps", "at", "places", "ahead")
_INTEGERS += ("current", "timesteps", "network_steps", "images", "numbers", "indices", "rounds", "latest", "active")
_INTEGERS += ("before", "labels", "chosen", "t", "y", "out_t", "out_y")
# Of the output's dtype.
_GIVEN = ("output", "features", "held_features", "parent", "out")
_GIVEN += ("drafted", "errors", "feature", "out_feature")


def aot_configurations(device: Device) -> list[AotConfiguration]:
    """All output dtypes and flags of drafts, both sizes of blocks; memories with and without guidance."""
    types = {f"p_{name}": "*fp32" for name in (*_FLOATS, "deviation")} | {"guidance_scale": "fp32", "clip": "fp32"}
    types |= {f"p_{name}": "*i64" for name in (*_INTEGERS, "finite")} | {"p_fresh": "*i1"}
    found = []

    def add(kernel: object, dtype: torch.dtype, block: int, values: dict, aligned: bool = True) -> None:
        name = kernel.__name__
        floats = {f"p_{given}": POINTERS[dtype] for given in _GIVEN}
        said = " ".join(f"{key.lower()}={value}" for key, value in values.items() if value is not None)
        warps = many_warps if kernel in (keep_kernel, measure_kernel, keep_clean_kernel) else warps_for
        sizes = ("numel", "guided_numel", "output_stride", "feature_numel", "output_numel", "state_numel")
        fixed = [size for size in sizes if size in kernel.arg_names and size not in kernel.do_not_specialize]
        found.append(
            configuration(
                kernel,
                types | floats,
                values | {"BLOCK": block},
                fixed if aligned else [],
                label=f"{name} {str(dtype).removeprefix('torch.')} {block} {said}",
                group=f"{name.removesuffix('_kernel')}",
                size=block * (1 + sum(int(value or 0) for value in values.values())),
                num_warps=warps(block, device.warp_size),
            )
        )

    dtypes, flags = (torch.float32, torch.bfloat16, torch.float16), ("LEARNED", "GUIDED", "CLIPPED")
    for dtype, switches in product(dtypes, product((False, True), repeat=3)):
        values = dict(zip(flags, switches, strict=True))
        add(advance_kernel, dtype, _SHARED_BLOCK, values, aligned=dtype != torch.float16)
        add(keep_clean_kernel, dtype, _SHARED_BLOCK, values, aligned=dtype != torch.float16)
        for block in (64, _MEASURE_BLOCK):
            add(measure_kernel, dtype, block, values, aligned=block > 64)
    for learned, clipped, aligned in product((False, True), repeat=3):
        values = {"LEARNED": learned, "CLIPPED": clipped}
        add(replay_kernel, torch.float32, _SHARED_BLOCK, values, aligned=aligned)
    for dtype, branches in product(dtypes, (1, 2)):
        add(keep_kernel, dtype, _TALLY_BLOCK, {"BRANCHES": branches})
    for dtype, drafts in product(dtypes, (32, 256)):
        add(tally_kernel, dtype, _TALLY_BLOCK, {"PADDED_DRAFTS": drafts})
        for kernel, chosen in product((join_kernel, errors_kernel), (False, True)):
            add(kernel, dtype, _TALLY_BLOCK, {} if chosen else {"p_chosen": None})
    for dtype, branches, block, active in product(dtypes, (1, 2), (64, _ALONE_BLOCK), (False, True)):
        values = {"BRANCHES": branches, "STATE_BLOCK": block} | ({} if active else {"p_active": None})
        add(correct_kernel, dtype, _ALONE_BLOCK, values)
    for entries in (2, 32):
        add(find_kernel, torch.float32, 0, {"ENTRIES": entries})
    for length in (32, 256):
        add(open_kernel, torch.float32, _TALLY_BLOCK, {"PADDED_LENGTH": length})
    add(renew_kernel, torch.float32, _SLOTS, {})
    for branches, active in product((1, 2), (False, True)):
        add(rows_kernel, torch.float32, _TALLY_BLOCK, {"BRANCHES": branches} | ({} if active else {"p_active": None}))
    return found
