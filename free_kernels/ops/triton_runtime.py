"""Whether Triton kernels can take tensors of a device, why they cannot, and whether a backend means Triton."""

from __future__ import annotations

import importlib

import torch

from free_kernels.tracing import assume_constant_result


@assume_constant_result
def why_no_runtime(stem: str, device_type: str, index: int | None) -> str | None:
    """Why the kernels of ``ops.<stem>.triton_launch`` cannot take tensors of a device, or None if they can."""
    try:
        kernels = importlib.import_module(f"free_kernels.ops.{stem}.triton_launch")
    except ImportError as error:
        return f"importing Triton failed: {error}"
    if device_type == "cpu" and kernels.INTERPRETED:
        return None
    if device_type != "cuda":
        return f"it needs CUDA tensors (or TRITON_INTERPRET=1 and CPU tensors), got {device_type} tensors"
    if not kernels.INTERPRETED and torch.cuda.get_device_capability(index) < (8, 0):
        return f"it needs compute capability 8.0 or higher, got {torch.cuda.get_device_capability(index)}"
    return None


def use_triton(op: str, stem: str, device: torch.device, backend: str) -> bool:
    """Whether a backend of an op means the kernels of ``free_kernels.ops.<stem>.triton_launch``.

    ``"auto"`` takes them on every device that they run on, but never the interpreter for CPU tensors.

    Raises:
        RuntimeError: ``"triton"`` was asked for and cannot run; the message says why.
    """
    if backend == "auto":
        return device.type != "cpu" and why_no_runtime(stem, device.type, device.index) is None
    if backend != "triton":
        return False
    reason = why_no_runtime(stem, device.type, device.index)
    if reason is not None:
        raise RuntimeError(f"{op}: backend 'triton' cannot be used: {reason}")
    return True
