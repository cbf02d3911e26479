"""What a launch has to know of the device that it is for."""

from __future__ import annotations

import torch


def warp_size(device: torch.device) -> int:
    """Threads of a warp: 32 on NVIDIA, 64 on most of AMD's accelerators."""
    if device.type != "cuda" or torch.version.hip is None:
        return 32
    return torch.cuda.get_device_properties(device).warp_size


def limits(device: torch.device) -> tuple[int, int]:
    """Multiprocessors, and bytes of shared memory that a program may ask for."""
    if device.type != "cuda":
        # Triton's interpreter takes any.
        return 1, 1 << 30
    found = torch.cuda.get_device_properties(device)
    # AMD has no more on request than without, and may say 0.
    return found.multi_processor_count, max(found.shared_memory_per_block, found.shared_memory_per_block_optin)
