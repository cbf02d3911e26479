"""Public packing ops: gather the drafts of all slots for one target call, and commit its outcome."""

from __future__ import annotations

import torch
from torch import Tensor

from free_kernels.ops.checks import FLOATS, INT64, Layouts
from free_kernels.ops.declaration import Op
from free_kernels.ops.packing import reference
from free_kernels.ops.packing.arguments import CommitArguments, PackArguments
from free_kernels.ops.shapes import as_images
from free_kernels.validation import check_int, fail


def _check_pack(a: PackArguments) -> None:
    op = "pack_drafts"
    Layouts(op, None, {}).check("states", a.states, FLOATS, "[S, L, C, H, W]")
    if a.states.shape[0] < 1 or a.states.shape[1] < 1:
        fail(op, "states", "[S, L, C, H, W] with S >= 1 and L >= 1", a.states)
    layouts = Layouts(op, a.states.device, {"S": a.states.shape[0]})
    for name in ("lengths", "steps", "labels"):
        layouts.check(name, getattr(a, name), INT64, "[S]")
    layouts.check("timesteps", a.timesteps, INT64, "[K]")
    if a.timesteps.shape[0] < 1:
        fail(op, "timesteps", "int64 [K] with K >= 1", a.timesteps)
    check_int(op, "num_rows", a.num_rows, 0, 2**62)
    if a.null_label is not None and (not isinstance(a.null_label, int) or isinstance(a.null_label, bool)):
        fail(op, "null_label", "an int or None", a.null_label, TypeError)


def _check_pack_values(a: PackArguments) -> None:
    op, draft_length, num_steps = "pack_drafts", a.states.shape[1], a.timesteps.shape[0]
    for slot, (length, step) in enumerate(zip(a.lengths.tolist(), a.steps.tolist(), strict=True)):
        if not 0 <= length <= draft_length:
            fail(op, f"lengths[{slot}]", f"in [0, {draft_length}]", length)
        if length and not 0 <= step <= num_steps - length:
            fail(op, f"steps[{slot}]", f"in [0, {num_steps - length}] for a draft of {length} rows", step)
    used = int(a.lengths.sum())
    if used > a.num_rows:
        fail(op, "num_rows", f"at least the sum of lengths, {used}", a.num_rows)


def _check_commit(a: CommitArguments) -> None:
    op = "commit_drafts"
    Layouts(op, None, {}).check("draft_states", a.draft_states, FLOATS, "[S, L, C, H, W]")
    slots, draft_length, channels, height, width = a.draft_states.shape
    if slots < 1 or draft_length < 1:
        fail(op, "draft_states", "[S, L, C, H, W] with S >= 1 and L >= 1", a.draft_states)
    sizes = {"S": slots, "S + 1": slots + 1, "C": channels, "H": height, "W": width, "1": 1}
    layouts = Layouts(op, a.draft_states.device, sizes)
    layouts.check("features", a.features, FLOATS, "[B * R, T, D]")
    rows, sizes["T"], sizes["D"] = a.features.shape
    layouts.check("parent", a.parent, (a.features.dtype,), "[B, S, T, D]")
    branches = a.parent.shape[0]
    if branches < 1 or rows < branches or rows % branches:
        fail(op, "features", f"[B * R, T, D] with B = {branches} branches as in parent and R >= 1", a.features)
    dtype = (a.draft_states.dtype,)
    layouts.check("samples", a.samples, dtype, "[N, C, H, W]")
    sizes["N"] = a.samples.shape[0]
    if sizes["N"] < 1:
        fail(op, "samples", "[N, C, H, W] with N >= 1", a.samples)
    for name in ("next_states", "state", "previous"):
        layouts.check(name, getattr(a, name), dtype, "[S, C, H, W]")
    for name, layout in (
        ("committed", "[S]"),
        ("row_offsets", "[S + 1]"),
        ("steps", "[S]"),
        ("images", "[S]"),
        ("labels", "[S]"),
        ("all_labels", "[N]"),
        ("queue", "[1]"),
    ):
        layouts.check(name, getattr(a, name), INT64, layout)
    check_int(op, "num_steps", a.num_steps, 1, 2**62)


def _check_commit_values(a: CommitArguments) -> None:
    op, offsets = "commit_drafts", a.row_offsets.tolist()
    draft_length, num_images = a.draft_states.shape[1], a.samples.shape[0]
    num_rows = a.features.shape[0] // a.parent.shape[0]
    if int(a.queue) < 0:
        fail(op, "queue", "at least 0", int(a.queue))
    columns = zip(a.committed.tolist(), a.steps.tolist(), a.images.tolist(), strict=True)
    for slot, (count, step, image) in enumerate(columns):
        if not -1 <= image < num_images:
            fail(op, f"images[{slot}]", f"in [-1, {num_images})", image)
        if image < 0:
            continue
        if not 0 <= count <= draft_length:
            fail(op, f"committed[{slot}]", f"in [0, {draft_length}]", count)
        first, end = offsets[slot : slot + 2]
        if count and not (0 <= first <= end - count and end <= num_rows):
            got = f"[{first}, {end})"
            fail(op, "row_offsets", f"such that slot {slot} has {count} of the {num_rows} rows", got)
        if count and not 0 <= step <= a.num_steps - count:
            fail(op, f"steps[{slot}]", f"in [0, {a.num_steps - count}] to commit {count} steps", step)


def _fake_pack(a: PackArguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = a.num_rows if a.null_label is None else 2 * a.num_rows
    x = a.states.new_empty((rows, *a.states.shape[2:]))
    return x, *(a.labels.new_empty((size,)) for size in (rows, rows, a.states.shape[0] + 1))


def _pack(a: PackArguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if a.states.is_cpu and not torch.compiler.is_compiling():
        _check_pack_values(a)
    return reference.pack_drafts(a)


def _commit(a: CommitArguments) -> None:
    if a.draft_states.is_cpu and not torch.compiler.is_compiling():
        _check_commit_values(a)
    reference.commit_drafts(a)


PACK = Op("pack_drafts", PackArguments, _pack, _fake_pack, check=_check_pack)
COMMIT = Op("commit_drafts", CommitArguments, _commit, lambda arguments: None, check=_check_commit)


def pack_drafts(
    states: Tensor,
    lengths: Tensor,
    steps: Tensor,
    labels: Tensor,
    timesteps: Tensor,
    num_rows: int,
    null_label: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gather the ragged drafts of all slots into one contiguous batch of network rows.

    Rows come in slot order: row ``r`` of slot ``s`` at position ``j`` is ``x[r] = states[s, j]``,
    ``t[r] = timesteps[steps[s] + j]``, ``y[r] = labels[s]``. Rows past the last draft are padding: zeros at the last
    timestep with label 0.

    Args:
        states: ``[S, L, C, H, W]`` float32, float16 or bfloat16; the rows of each slot, contiguous. States of any
            other shape ``[S, L, *shape]`` likewise.
        lengths: ``[S]`` int64 in ``[0, L]``, rows in use; 0 is an idle slot.
        steps: ``[S]`` int64, step index of each slot's first row.
        labels: ``[S]`` int64 class labels.
        timesteps: ``[K]`` int64, the network's timestep at each step.
        num_rows: R, at least the sum of ``lengths``; if larger, padding fills up, for calls of a fixed shape.
        null_label: the label of the unconditional branch (classifier-free guidance): the outputs then have ``2R``
            rows, the second half the same rows with this label.
        backend: ``"auto"``, ``"reference"`` or ``"extension"``.

    Returns:
        ``x`` ``[R or 2R, C, H, W]``, ``t`` and ``y`` int64 ``[R or 2R]``, and ``row_offsets`` int64 ``[S + 1]``, the
        exclusive prefix sum of ``lengths``.

    Raises:
        ValueError, TypeError: a wrong argument; values are checked on the CPU only.
        RuntimeError: ``backend="extension"`` cannot be used.
    """
    arguments = PackArguments(as_images(states, 2), lengths, steps, labels, timesteps, num_rows, null_label)
    if not isinstance(states, Tensor):
        _check_pack(arguments)
    x, *rest = PACK(arguments, states, backend)
    return x if states.ndim == 5 else x.view(-1, *states.shape[2:]), *rest


def commit_drafts(
    committed: Tensor,
    next_states: Tensor,
    draft_states: Tensor,
    features: Tensor,
    row_offsets: Tensor,
    *,
    state: Tensor,
    previous: Tensor,
    parent: Tensor,
    steps: Tensor,
    images: Tensor,
    labels: Tensor,
    samples: Tensor,
    all_labels: Tensor,
    queue: Tensor,
    num_steps: int,
    backend: str = "auto",
) -> None:
    """Make each slot's committed steps final, in place; take finished images out of their slots and waiting ones in.

    A slot with an image and ``c = committed[s] >= 1`` gets ``previous[s] = draft_states[s, c - 1]``,
    ``parent[b, s] = features[b * R + row_offsets[s] + c - 1]``, ``state[s] = next_states[s]`` and ``steps[s] += c``.
    Where ``steps[s]`` reaches ``num_steps`` the image is done: ``samples[images[s]] = next_states[s]``, and, in
    ascending slot order, the slot takes image ``queue[0]`` (its state from ``samples``, its label from
    ``all_labels``, step 0) and ``queue[0]`` advances, or, with no image waiting, ``images[s] = -1``. Every other slot
    is left alone. Nothing of it is recorded for gradients.

    Args:
        committed: ``[S]`` int64 in ``[0, L]``, steps that this round makes final.
        next_states: ``[S, C, H, W]`` float32, float16 or bfloat16, the states after them.
        draft_states: ``[S, L, C, H, W]``, the states that were packed, of the same dtype. States of any other shape
            ``[S, L, *shape]``, and the other tensors alike.
        features: ``[B * R, T, D]`` of any of the three dtypes, the packed call's top-block features; B = 2 with
            guidance, branch by branch.
        row_offsets: ``[S + 1]`` int64 from :func:`pack_drafts`.
        state: ``[S, C, H, W]``, written.
        previous: ``[S, C, H, W]``, written: the parent of ``state``.
        parent: ``[B, S, T, D]``, written: the parent's feature.
        steps: ``[S]`` int64, written.
        images: ``[S]`` int64, written; -1 is an idle slot. No image may be in two slots.
        labels: ``[S]`` int64, written.
        samples: ``[N, C, H, W]``, written: results of finished images, initial noise of waiting ones.
        all_labels: ``[N]`` int64.
        queue: ``[1]`` int64, written: the next waiting image.
        num_steps: K.
        backend: ``"auto"``, ``"reference"`` or ``"extension"``.

    Raises:
        ValueError, TypeError: a wrong argument; values are checked on the CPU only, before anything is written.
        RuntimeError: ``backend="extension"`` cannot be used.
    """
    if isinstance(draft_states, Tensor) and draft_states.ndim != 5:
        draft_states, next_states = as_images(draft_states, 2), as_images(next_states, 1)
        state, previous, samples = (as_images(part, 1, written=True) for part in (state, previous, samples))
    # fmt: off
    arguments = CommitArguments(
        committed, next_states, draft_states, features, row_offsets, state, previous, parent, steps, images, labels,
        samples, all_labels, queue, num_steps,
    )
    # fmt: on
    if not isinstance(draft_states, Tensor):
        _check_commit(arguments)
    # What stays in a slot is no function of earlier rounds, whose graphs would never be freed.
    with torch.no_grad():
        COMMIT(arguments, draft_states, backend)
    if not torch.compiler.is_compiling():
        # So that autograd refuses what it has saved of them: a compiled op does not say that it has written.
        written = state, previous, parent, steps, images, labels, samples, queue
        torch.autograd.graph.increment_version(part for part in written if not part.is_inference())
