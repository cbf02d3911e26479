"""Device clock and bandwidth that GPU benchmarks are measured with and against."""

from __future__ import annotations

from functools import cache

import torch

# Well beyond the L2 cache of any GPU.
_FLUSH_BYTES = 256 * 2**20


class DeviceClock:
    """A clock for pytest-benchmark: device seconds between two calls, by events.

    The first call of a pair flushes the L2 cache and starts, the second waits and stops. The device first sleeps for
    longer than the host takes to launch a call's kernels, so launch time does not count.
    """

    def __init__(self) -> None:
        self._total, self._running = 0.0, False

    def __call__(self) -> float:
        start, end, flush = _events_and_flush()
        if self._running:
            end.record()
            end.synchronize()
            self._total += start.elapsed_time(end) / 1e3
        else:
            torch.cuda._sleep(2 * 10**6)
            flush.zero_()
            start.record()
        self._running = not self._running
        return self._total


@cache
def _events_and_flush() -> tuple[torch.cuda.Event, torch.cuda.Event, torch.Tensor]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    return start, end, torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")


@cache
def copy_bandwidth() -> float:
    """Bytes read plus bytes written per second by a large copy on the current GPU: median of 20."""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    clock, seconds = DeviceClock(), []
    for _ in range(25):
        begin = clock()
        target.copy_(source)
        seconds.append(clock() - begin)
    return 2 * source.nbytes / sorted(seconds[5:])[10]
