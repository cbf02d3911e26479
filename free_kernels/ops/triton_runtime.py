"""Whether Triton kernels can take tensors of a device, and if not, why."""

from __future__ import annotations

import importlib

import torch


@torch.compiler.assume_constant_result
def why_no_runtime(stem: str, device_type: str, index: int | None) -> str | None:
    """Why the kernels of ``free_kernels.triton.<stem>`` cannot take tensors of a device, or None if they can."""
    try:
        kernels = importlib.import_module(f"free_kernels.triton.{stem}")
    except ImportError as error:
        return f"importing Triton failed: {error}"
    if device_type == "cpu" and kernels.INTERPRETED:
        return None
    if device_type != "cuda":
        return f"it needs CUDA tensors (or TRITON_INTERPRET=1 and CPU tensors), got {device_type} tensors"
    if not kernels.INTERPRETED and torch.cuda.get_device_capability(index) < (8, 0):
        return f"it needs compute capability 8.0 or higher, got {torch.cuda.get_device_capability(index)}"
    return None
