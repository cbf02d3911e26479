"""The packed target call: all rows of a round, in as many parts as memory asks for."""

from __future__ import annotations

import torch
from torch import Tensor

from free_kernels.sampling.cuda_graphs import CaptureAgain
from free_kernels.sampling.job import Chain


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the CPU, where it is a plain RuntimeError."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


class PackedCall:
    """Features and output of all rows of a round.

    Where memory runs out, the rows are cut in halves until they fit, and later calls are no larger: rows do not depend
    on one another, so images stay the same up to the network's rounding.

    Args:
        chain: the job, hoisted.

    Attributes:
        most_rows: network rows of a call; None as long as memory was enough.
    """

    def __init__(self, chain: Chain) -> None:
        self._chain = chain
        self.most_rows: int | None = None

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Features ``[R, T, D]`` and output ``[R, C or 2C, H, W]`` of rows ``x [R, C, H, W]``, ``t [R]``, ``y [R]``.

        Raises:
            torch.OutOfMemoryError, RuntimeError: a single row does not fit.
            CaptureAgain: memory ran out within the capture of a CUDA graph, where it cannot be given back; the next
                call is smaller.
        """
        while True:
            size = len(x) if self.most_rows is None else min(self.most_rows, len(x))
            try:
                return self._in_parts(x, t, y, size)
            except RuntimeError as error:
                if size <= 1 or not is_out_of_memory(error):
                    raise
            # Out of the handler: the error would keep the failed call's tensors alive.
            self.most_rows = -(-size // 2)
            if x.is_cuda:
                if torch.cuda.is_current_stream_capturing():
                    raise CaptureAgain(f"out of memory with {size} rows in a capture")
                torch.cuda.empty_cache()

    def settle(self) -> None:
        """Wait for features that are still on their way; a target says so by ``settle()``."""
        wait = getattr(self._chain.target, "settle", None)
        if callable(wait):
            wait()

    def _in_parts(self, x: Tensor, t: Tensor, y: Tensor, size: int) -> tuple[Tensor, Tensor]:
        if size >= len(x):
            return self._call(x, t, y)
        parts = []
        for part in zip(x.split(size), t.split(size), y.split(size), strict=True):
            parts.append(self._call(*part))
            self.settle()
        features, outputs = zip(*parts, strict=True)
        return torch.cat(features), torch.cat(outputs)

    def _call(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        features = self._chain.features(x, t, y)
        return features, self._chain.head(features, t, y)
