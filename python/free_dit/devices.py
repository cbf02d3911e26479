"""Devices by name, for commands and training alike."""

from __future__ import annotations

import os

import torch

from free_kernels.validation import fail

AUTO = "auto"


def resolve_device(
    where: str,
    name: str = AUTO,
    *,
    local_rank: int | None = None,
    shared: bool = True,
    accepted: str = "'auto' or a torch device",
) -> torch.device:
    """A device that this machine has, by name.

    Args:
        where: the caller, for errors.
        name: ``"auto"``, this process's GPU, or the CPU where there is none; ``"cuda"``, its GPU; or a torch device.
        local_rank: number of the process on its machine, which says its GPU; torchrun's ``LOCAL_RANK`` if None.
        shared: whether processes beyond the number of GPUs share them, instead of being refused.
        accepted: what the error for a name that is no device lists.

    Raises:
        ValueError: no such device here.
    """
    if not isinstance(name, str):
        fail(where, "device", accepted, type(name).__name__)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == AUTO:
        name = "cuda" if count else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        fail(where, "device", accepted, repr(name))
    if device.type == "cuda":
        if device.index is None:
            rank = int(os.environ.get("LOCAL_RANK", "0")) if local_rank is None else local_rank
            device = torch.device("cuda", rank % count if shared and count else rank)
        if device.index >= count:
            fail(where, "device", f"one of {count} GPUs", str(device))
        return device
    try:
        # Read back, because a device without memory ("meta") takes tensors and gives none.
        torch.zeros(1, device=device).item()
    except Exception as error:  # backends that are not there raise errors of many kinds
        reason = str(error).partition("\n")[0]
        fail(where, "device", "one that this torch computes on", f"{name!r}: {reason}")
    return device
