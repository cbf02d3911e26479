"""What a launch has to know of its device and of how its kernels run."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def warp_size(device: torch.device) -> int:
    """Threads of a warp: 32 on NVIDIA, 64 on most of AMD's accelerators."""
    if device.type != "cuda" or torch.version.hip is None:
        return 32
    return torch.cuda.get_device_properties(device).warp_size


def limits(device: torch.device) -> tuple[int, int]:
    """Number of multiprocessors, and the most bytes of shared memory that a program may ask for."""
    if device.type != "cuda":
        # Triton's interpreter has no limit.
        return 1, 1 << 30
    found = torch.cuda.get_device_properties(device)
    # On AMD a program may not ask for more than the default, and the second figure may be 0.
    return found.multi_processor_count, max(found.shared_memory_per_block, found.shared_memory_per_block_optin)


def current(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Makes a CUDA tensor's device the current one, on which Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
