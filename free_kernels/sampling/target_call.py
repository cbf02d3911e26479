"""The packed target call: all rows of a round, in as many parts as memory asks for."""

from __future__ import annotations

import torch
from torch import Tensor

from free_kernels.sampling.cuda_graphs import CaptureAgain
from free_kernels.sampling.job import Job, Verified

# What plain RuntimeErrors say where memory ran out: the CPU's allocator, and any allocation of an op on the stable ABI.
_SAID = ("DefaultCPUAllocator", "aoti_torch_empty_strided(")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the CPU, where it is a plain RuntimeError."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error) for said in _SAID)


class TargetCall:
    """Output and features of all rows of a round.

    Where memory runs out, the rows are cut in halves until they fit, and later calls are no larger: rows do not depend
    on one another, so images stay the same up to the network's rounding.

    Args:
        job: the job, hoisted.

    Attributes:
        most_rows: network rows of a call; None as long as memory was enough.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self.most_rows: int | None = None

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Verified:
        """The target on rows ``x [R, C, H, W]``, ``t [R]``, ``y [R]``.

        Raises:
            torch.OutOfMemoryError, RuntimeError: a single row does not fit.
            CaptureAgain: memory ran out within the capture of a CUDA graph, where it cannot be given back; the next
                call is smaller.
        """
        while True:
            size = x.shape[0] if self.most_rows is None else min(self.most_rows, x.shape[0])
            try:
                return self._in_parts(x, t, y, size)
            except RuntimeError as error:
                if size <= 1 or not is_out_of_memory(error):
                    raise
            # After the handler: the error would keep the failed call's tensors alive.
            self.most_rows = -(-size // 2)
            if x.is_cuda:
                if torch.cuda.is_current_stream_capturing():
                    raise CaptureAgain(f"out of memory with {size} rows in a capture")
                torch.cuda.empty_cache()

    def _in_parts(self, x: Tensor, t: Tensor, y: Tensor, size: int) -> Verified:
        if size >= x.shape[0]:
            return self._job.verify(x, t, y)
        outputs, features = [], []
        for part in zip(x.split(size), t.split(size), y.split(size), strict=True):
            output, wait = self._job.verify(*part)
            outputs.append(output)
            # Before the next call, as a target with a packed call of its own asks.
            features.append(wait())
        whole = torch.cat(features)
        return Verified(torch.cat(outputs), lambda: whole)
