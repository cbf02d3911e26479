"""Draft packing and committing in plain PyTorch: the oracle and the fallback of the compiled ops.

Everything is a gather or a masked write of a fixed shape, so the host never waits for the device. Values out of range
give undefined results here; ``free_kernels.ops.packing`` checks them for CPU tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from free_kernels.ops.packing.arguments import CommitArguments, PackArguments


def pack_drafts(arguments: PackArguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Contract of :func:`free_kernels.ops.packing.pack_drafts`."""
    states, lengths, steps, labels, timesteps, num_rows, null_label = arguments
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


def commit_drafts(a: CommitArguments) -> None:
    """Contract of :func:`free_kernels.ops.packing.commit_drafts`."""
    slots, branches, num_images = a.state.shape[0], a.parent.shape[0], a.samples.shape[0]
    slot = torch.arange(slots, device=a.state.device)
    live = (a.images >= 0) & (a.committed >= 1)
    last = torch.where(live, a.committed - 1, 0)
    row = torch.where(live, a.row_offsets[:-1] + last, 0)

    a.previous.copy_(torch.where(live[:, None, None, None], a.draft_states[slot, last], a.previous))
    rows = a.features.unflatten(0, (branches, -1))[:, row]
    a.parent.copy_(torch.where(live[:, None, None], rows, a.parent))
    advanced = torch.where(live, a.steps + a.committed, a.steps)
    done = live & (advanced == a.num_steps)

    # The number of finished slots is not known here, but the write must have a fixed shape. So every other slot repeats
    # the write of the first finished one; if none is finished, all write to one entry the value that it already has.
    source = torch.where(done, slot, done.int().argmax())
    target = a.images[source].clamp(min=0)
    a.samples[target] = torch.where(done.any(), a.next_states[source], a.samples[target])

    waiting = a.queue + done.cumsum(0) - 1
    refilled = done & (waiting < num_images)
    waiting = torch.where(refilled, waiting, 0)
    new_state = torch.where(refilled[:, None, None, None], a.samples[waiting], a.next_states)
    a.state.copy_(torch.where(live[:, None, None, None], new_state, a.state))
    a.steps.copy_(torch.where(refilled, 0, advanced))
    a.labels.copy_(torch.where(refilled, a.all_labels[waiting], a.labels))
    a.images.copy_(torch.where(done, torch.where(refilled, waiting, -1), a.images))
    a.queue.add_(refilled.sum())
