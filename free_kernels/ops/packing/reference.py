"""Draft packing and committing in plain PyTorch: the oracle and the fallback of the compiled ops.

Everything is a gather or a masked write of a fixed shape, so nothing waits for the device. Values out of range are
undefined here; ``free_kernels.ops.packing`` checks them on the CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pack_drafts(
    states: Tensor,
    lengths: Tensor,
    steps: Tensor,
    labels: Tensor,
    timesteps: Tensor,
    num_rows: int,
    null_label: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Contract of :func:`free_kernels.ops.packing.pack_drafts`."""
    slots, draft_length = states.shape[:2]
    row_offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    row = torch.arange(num_rows, device=states.device)
    # Idle slots own no rows: the first end beyond a row belongs to the slot that holds it.
    slot = torch.searchsorted(row_offsets[1:], row, right=True)
    used = slot < slots
    slot = slot.clamp(max=slots - 1)
    position = torch.where(used, row - row_offsets[slot], 0)

    x = states.flatten(0, 1)[slot * draft_length + position]
    x = torch.where(used[:, None, None, None], x, torch.zeros((), dtype=x.dtype, device=x.device))
    t = timesteps[torch.where(used, steps[slot] + position, timesteps.shape[0] - 1)]
    y = torch.where(used, labels[slot], 0)
    if null_label is not None:
        x, t, y = torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, torch.full_like(y, null_label)])
    return x, t, y, row_offsets


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
) -> None:
    """Contract of :func:`free_kernels.ops.packing.commit_drafts`."""
    slots, branches, num_images = state.shape[0], parent.shape[0], samples.shape[0]
    slot = torch.arange(slots, device=state.device)
    live = (images >= 0) & (committed >= 1)
    last = torch.where(live, committed - 1, 0)
    row = torch.where(live, row_offsets[:-1] + last, 0)

    previous.copy_(torch.where(live[:, None, None, None], draft_states[slot, last], previous))
    rows = features.unflatten(0, (branches, -1))[:, row]
    parent.copy_(torch.where(live[:, None, None], rows, parent))
    advanced = torch.where(live, steps + committed, steps)
    done = live & (advanced == num_steps)

    # A write of a fixed shape for an unknown number of finished slots: the others repeat the first finished one's
    # write, or, if there is none, write an entry's own value to it.
    source = torch.where(done, slot, done.int().argmax())
    target = images[source].clamp(min=0)
    samples[target] = torch.where(done.any(), next_states[source], samples[target])

    waiting = queue + done.cumsum(0) - 1
    refilled = done & (waiting < num_images)
    waiting = torch.where(refilled, waiting, 0)
    new_state = torch.where(refilled[:, None, None, None], samples[waiting], next_states)
    state.copy_(torch.where(live[:, None, None, None], new_state, state))
    steps.copy_(torch.where(refilled, 0, advanced))
    labels.copy_(torch.where(refilled, all_labels[waiting], labels))
    images.copy_(torch.where(done, torch.where(refilled, waiting, -1), images))
    queue.add_(refilled.sum())
