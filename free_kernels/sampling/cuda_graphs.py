"""CUDA graphs of work on fixed tensors: one launch instead of hundreds, nothing for Python to do in between."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

from free_kernels.protocols import TargetDefaults
from free_kernels.validation import fail

Result = TypeVar("Result")
_WARM_UPS = 2


class CaptureAgain(RuntimeError):
    """Raised inside a capture by a function that needs less memory when it is called again."""


class CapturedCalls(Generic[Result]):
    """A function that reads and writes the same tensors whenever it is called, captured once for each of its keys.

    Args:
        function: maps a key to a result that holds tensors. It must not wait for the device, and its shapes must
            depend on the key only. :class:`CaptureAgain` from it makes the capture begin anew.
        preserved: tensors that the calls before a capture must not leave changed.
        idle: makes the function do nothing of consequence to whatever else it writes, through ``preserved`` tensors.
        device: where the work runs.
    """

    def __init__(
        self,
        function: Callable[[Hashable], Result],
        preserved: Sequence[Tensor],
        idle: Callable[[], object],
        device: torch.device,
    ) -> None:
        self._function, self._preserved, self._idle, self._device = function, preserved, idle, device
        self._captured: dict[Hashable, tuple[Callable[[], None], Result]] = {}
        self._pool: object = None

    def __call__(self, key: Hashable) -> Result:
        """Do the work of ``key``; its tensors are overwritten by the next call."""
        if key not in self._captured:
            self._warm_up(key)
            self._captured[key] = self._capture(key)
        replay, result = self._captured[key]
        replay()
        return result

    def _warm_up(self, key: Hashable) -> None:
        """Let compilers, tables and workspaces be made before the capture, without consequences."""
        saved = [tensor.clone() for tensor in self._preserved]
        self._idle()
        self._run_aside(key)
        for tensor, value in zip(self._preserved, saved, strict=True):
            tensor.copy_(value)

    def _run_aside(self, key: Hashable) -> None:
        with torch.cuda.device(self._device):
            current, aside = torch.cuda.current_stream(), torch.cuda.Stream()
            aside.wait_stream(current)
            with torch.cuda.stream(aside):
                for _ in range(_WARM_UPS):
                    self._function(key)
            current.wait_stream(aside)

    def _capture(self, key: Hashable) -> tuple[Callable[[], None], Result]:
        while True:
            captured = self._try_to_capture(key)
            if captured is not None:
                return captured
            # Here and not earlier: memory cannot be given back within a capture, and the abandoned graph held some.
            torch.cuda.empty_cache()

    def _try_to_capture(self, key: Hashable) -> tuple[Callable[[], None], Result] | None:
        """A capture, or None where it has to begin anew."""
        with torch.cuda.device(self._device):
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            try:
                # A capture whose end fails leaves its own stream as the current one.
                with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, pool=self._pool):
                    result = self._function(key)
            except RuntimeError as error:
                # Ending an abandoned capture may raise as well; the reason is then its context.
                if not any(isinstance(reason, CaptureAgain) for reason in (error, error.__context__)):
                    raise
                return None
        return graph.replay, result


def check_cuda_graphs(where: str, cuda_graphs: object, device: torch.device) -> bool:
    """The argument as a bool.

    Raises:
        TypeError: not a bool.
        ValueError: asked for on a device without them.
    """
    if not isinstance(cuda_graphs, bool):
        fail(where, "cuda_graphs", "a bool", cuda_graphs, TypeError)
    if cuda_graphs and device.type != "cuda":
        fail(where, "cuda_graphs", f"False for a target on {device}", cuda_graphs)
    return cuda_graphs


def check_capturable(where: str, cuda_graphs: bool, target: object) -> None:
    """Raise ValueError where graphs are asked for of a target whose calls wait for the host."""
    if cuda_graphs and not TargetDefaults.read(target, "is_capturable"):
        fail(where, "cuda_graphs", f"False for {type(target).__name__}, whose calls wait for the host", cuda_graphs)


def row_bucket(rows: int, most: int, buckets: int = 8) -> int:
    """The smallest multiple of ``most / buckets``, rounded up, that holds ``rows``; at most ``most``."""
    width = -(-most // buckets)
    return min(most, max(1, -(-rows // width)) * width)
