"""Batched draft packing and committing: the two ends of a packed target call."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from free_kernels.extension import raise_from_op, use_extension, when_loaded
from free_kernels.ops.packing import reference
from free_kernels.validation import describe, fail

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_INT64 = torch.int64


def _check(
    op: str, name: str, value: object, dtypes: tuple[torch.dtype, ...], shape: tuple, names: str, device: object
) -> None:
    """One tensor: dtype, shape (None: any size), device and contiguity; ``names`` spells the shape out."""
    if not isinstance(value, Tensor):
        _refuse(op, name, value, dtypes, shape, names, device)
    size = value.shape
    if (
        value.dtype not in dtypes
        or len(size) != len(shape)
        or (size != shape and any(want is not None and want != got for want, got in zip(shape, size, strict=True)))
        or (device is not None and value.device != device)
        or not value.is_contiguous()
    ):
        _refuse(op, name, value, dtypes, shape, names, device)


def _refuse(
    op: str, name: str, value: object, dtypes: tuple[torch.dtype, ...], shape: tuple, names: str, device: object
) -> NoReturn:
    dtype = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    known = [str(size) for size in shape if size is not None]
    exact = f" = [{', '.join(known)}]" if known and len(known) == len(shape) else ""
    expectation = f"{dtype} {names}{exact}"
    if not isinstance(value, Tensor):
        fail(op, name, expectation, type(value).__name__, TypeError)
    if value.dtype not in dtypes:
        fail(op, name, expectation, value, TypeError)
    if device is not None and value.device != device:
        fail(op, name, f"on {device} like the other tensors", f"a tensor on {value.device}")
    contiguous = "" if value.is_contiguous() else " with strides " + str(list(value.stride()))
    fail(op, name, expectation + (" contiguous" if contiguous else ""), describe(value) + contiguous)


def _check_pack(
    states: Tensor,
    lengths: Tensor,
    steps: Tensor,
    labels: Tensor,
    timesteps: Tensor,
    num_rows: int,
    null_label: int | None,
) -> None:
    op = "pack_drafts"
    _check(op, "states", states, _FLOATS, (None,) * 5, "[S, L, C, H, W]", None)
    device, slots = states.device, states.shape[0]
    if slots < 1 or states.shape[1] < 1:
        fail(op, "states", "[S, L, C, H, W] with S >= 1 and L >= 1", states)
    _check(op, "lengths", lengths, (_INT64,), (slots,), "[S]", device)
    _check(op, "steps", steps, (_INT64,), (slots,), "[S]", device)
    _check(op, "labels", labels, (_INT64,), (slots,), "[S]", device)
    _check(op, "timesteps", timesteps, (_INT64,), (None,), "[K]", device)
    if timesteps.shape[0] < 1:
        fail(op, "timesteps", "int64 [K] with K >= 1", timesteps)
    if not isinstance(num_rows, (int, torch.SymInt)) or isinstance(num_rows, bool):
        fail(op, "num_rows", "an int", num_rows, TypeError)
    if num_rows < 0:
        fail(op, "num_rows", "at least 0", num_rows)
    if null_label is not None and (not isinstance(null_label, int) or isinstance(null_label, bool)):
        fail(op, "null_label", "an int or None", null_label, TypeError)


def _check_pack_values(lengths: Tensor, steps: Tensor, draft_length: int, num_steps: int, num_rows: int) -> None:
    op = "pack_drafts"
    for slot, (length, step) in enumerate(zip(lengths.tolist(), steps.tolist(), strict=True)):
        if not 0 <= length <= draft_length:
            fail(op, f"lengths[{slot}]", f"in [0, {draft_length}]", length)
        if length and not 0 <= step <= num_steps - length:
            fail(op, f"steps[{slot}]", f"in [0, {num_steps - length}] for a draft of {length} rows", step)
    used = int(lengths.sum())
    if used > num_rows:
        fail(op, "num_rows", f"at least the sum of lengths, {used}", num_rows)


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
        states: ``[S, L, C, H, W]`` float32, float16 or bfloat16; the rows of each slot, contiguous.
        lengths: ``[S]`` int64 in ``[0, L]``, rows in use; 0 is an idle slot.
        steps: ``[S]`` int64, step index of each slot's first row.
        labels: ``[S]`` int64 class labels.
        timesteps: ``[K]`` int64, the network's timestep at each step.
        num_rows: R >= the sum of ``lengths``; larger pads, for calls of a fixed shape.
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
    if isinstance(states, Tensor) and use_extension("pack_drafts", states.device.type, backend):
        try:
            return torch.ops.free_kernels.pack_drafts(states, lengths, steps, labels, timesteps, num_rows, null_label)
        except RuntimeError as error:
            # The op has checked the same things; here they are put into words (and its call stays cheap).
            _check_pack(states, lengths, steps, labels, timesteps, num_rows, null_label)
            raise_from_op("pack_drafts", error)
    _check_pack(states, lengths, steps, labels, timesteps, num_rows, null_label)
    if states.is_cpu and not torch.compiler.is_compiling():
        _check_pack_values(lengths, steps, states.shape[1], timesteps.shape[0], num_rows)
    return reference.pack_drafts(states, lengths, steps, labels, timesteps, num_rows, null_label)


def _check_commit(
    committed: Tensor,
    next_states: Tensor,
    draft_states: Tensor,
    features: Tensor,
    row_offsets: Tensor,
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
) -> None:
    op = "commit_drafts"
    _check(op, "draft_states", draft_states, _FLOATS, (None,) * 5, "[S, L, C, H, W]", None)
    slots, draft_length, *latent = draft_states.shape
    device, dtype = draft_states.device, (draft_states.dtype,)
    if slots < 1 or draft_length < 1:
        fail(op, "draft_states", "[S, L, C, H, W] with S >= 1 and L >= 1", draft_states)
    _check(op, "features", features, _FLOATS, (None,) * 3, "[B * R, T, D]", device)
    rows, tokens, width = features.shape
    _check(op, "parent", parent, (features.dtype,), (None, slots, tokens, width), "[B, S, T, D]", device)
    branches = parent.shape[0]
    if branches < 1 or rows < branches or rows % branches:
        fail(op, "features", f"[B * R, T, D] with B = {branches} branches as in parent and R >= 1", features)
    _check(op, "samples", samples, dtype, (None, *latent), "[N, C, H, W]", device)
    num_images = samples.shape[0]
    if num_images < 1:
        fail(op, "samples", "[N, C, H, W] with N >= 1", samples)
    shape, int64 = (slots, *latent), (_INT64,)
    _check(op, "next_states", next_states, dtype, shape, "[S, C, H, W]", device)
    _check(op, "state", state, dtype, shape, "[S, C, H, W]", device)
    _check(op, "previous", previous, dtype, shape, "[S, C, H, W]", device)
    _check(op, "committed", committed, int64, (slots,), "[S]", device)
    _check(op, "row_offsets", row_offsets, int64, (slots + 1,), "[S + 1]", device)
    _check(op, "steps", steps, int64, (slots,), "[S]", device)
    _check(op, "images", images, int64, (slots,), "[S]", device)
    _check(op, "labels", labels, int64, (slots,), "[S]", device)
    _check(op, "all_labels", all_labels, int64, (num_images,), "[N]", device)
    _check(op, "queue", queue, int64, (1,), "[1]", device)
    if not isinstance(num_steps, int) or isinstance(num_steps, bool):
        fail(op, "num_steps", "an int", num_steps, TypeError)
    if num_steps < 1:
        fail(op, "num_steps", "at least 1", num_steps)


def _check_commit_values(
    committed: Tensor,
    row_offsets: Tensor,
    steps: Tensor,
    images: Tensor,
    queue: Tensor,
    draft_length: int,
    num_rows: int,
    num_images: int,
    num_steps: int,
) -> None:
    op, offsets = "commit_drafts", row_offsets.tolist()
    if int(queue) < 0:
        fail(op, "queue", "at least 0", int(queue))
    columns = zip(committed.tolist(), steps.tolist(), images.tolist(), strict=True)
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
        if count and not 0 <= step <= num_steps - count:
            fail(op, f"steps[{slot}]", f"in [0, {num_steps - count}] to commit {count} steps", step)


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
    """Make each slot's committed steps final, in place; move finished images out and waiting ones in.

    A slot with an image and ``c = committed[s] >= 1`` gets ``previous[s] = draft_states[s, c - 1]``,
    ``parent[b, s] = features[b * R + row_offsets[s] + c - 1]``, ``state[s] = next_states[s]`` and ``steps[s] += c``.
    Where ``steps[s]`` reaches ``num_steps`` the image is done: ``samples[images[s]] = next_states[s]``, and, in
    ascending slot order, the slot takes image ``queue[0]`` (its state from ``samples``, its label from
    ``all_labels``, step 0) and ``queue[0]`` advances, or, with no image waiting, ``images[s] = -1``. Every other slot
    is left alone.

    Args:
        committed: ``[S]`` int64 in ``[0, L]``, steps that this round makes final.
        next_states: ``[S, C, H, W]`` float32, float16 or bfloat16, the states after them.
        draft_states: ``[S, L, C, H, W]``, the states that were packed, of the same dtype.
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
    # fmt: off
    arguments = (
        committed, next_states, draft_states, features, row_offsets, state, previous, parent, steps, images, labels,
        samples, all_labels, queue, num_steps,
    )
    # fmt: on
    if isinstance(draft_states, Tensor) and use_extension("commit_drafts", draft_states.device.type, backend):
        try:
            return torch.ops.free_kernels.commit_drafts(*arguments)
        except RuntimeError as error:
            _check_commit(*arguments)
            raise_from_op("commit_drafts", error)
    _check_commit(*arguments)
    if draft_states.is_cpu and not torch.compiler.is_compiling():
        sizes = (draft_states.shape[1], features.shape[0] // parent.shape[0], samples.shape[0], num_steps)
        _check_commit_values(committed, row_offsets, steps, images, queue, *sizes)
    # fmt: off
    reference.commit_drafts(
        committed, next_states, draft_states, features, row_offsets, state=state, previous=previous, parent=parent,
        steps=steps, images=images, labels=labels, samples=samples, all_labels=all_labels, queue=queue,
        num_steps=num_steps,
    )
    # fmt: on


@when_loaded
def _register_fakes() -> None:
    @torch.library.register_fake("free_kernels::pack_drafts")
    def pack(
        states: Tensor,
        lengths: Tensor,
        steps: Tensor,
        labels: Tensor,
        timesteps: Tensor,
        num_rows: int,
        null_label: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows = num_rows if null_label is None else 2 * num_rows
        return (
            states.new_empty((rows, *states.shape[2:])),
            labels.new_empty((rows,)),
            labels.new_empty((rows,)),
            labels.new_empty((states.shape[0] + 1,)),
        )

    torch.library.register_fake("free_kernels::commit_drafts", lambda *arguments: None)
