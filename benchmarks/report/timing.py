"""Device clock, and the roofs that benchmarks are measured against: copy bandwidth and matrix rate."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import torch

# Well beyond the L2 cache of any GPU.
_FLUSH_BYTES = 256 * 2**20
# The device waits this long (some 2 ms) while the host launches what is measured; longer where the host takes longer.
_SLEEP_CYCLES = 4 * 10**6
# At least what a GPU runs at.
_CYCLES_PER_S = 2 * 10**9
_WARM_UPS = 3


class DeviceClock:
    """A clock for pytest-benchmark: device seconds between two calls, by events.

    The first call of a pair flushes the L2 cache and starts, the second waits and stops. The device first sleeps for
    longer than the host takes to launch a call's kernels, so launch time does not count.

    Args:
        host_s: seconds that the host takes to launch a call.
    """

    def __init__(self, host_s: float = 0.0) -> None:
        self._total, self._running = 0.0, False
        self._cycles = max(_SLEEP_CYCLES, round(2 * host_s * _CYCLES_PER_S))

    def __call__(self) -> float:
        start, end, flush = _events_and_flush()
        if self._running:
            end.record()
            end.synchronize()
            self._total += start.elapsed_time(end) / 1e3
        else:
            torch.cuda._sleep(self._cycles)
            flush.zero_()
            start.record()
        self._running = not self._running
        return self._total


@cache
def _events_and_flush() -> tuple[torch.cuda.Event, torch.cuda.Event, torch.Tensor]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    return start, end, torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")


def clock(device: str, host_s: float = 0.0) -> Callable[[], float]:
    """Seconds on a device: events on a GPU, with launches of ``host_s`` seconds left out; else wall-clock."""
    return DeviceClock(host_s) if device == "cuda" else time.perf_counter


def captured(call: Callable[[], object], pool: object = None) -> tuple[Callable[[], object], object]:
    """A call as a CUDA graph, and what must outlive its replays.

    Raises:
        RuntimeError: it cannot be captured, because it waits for the device or copies from the host, say.
    """
    current, aside = torch.cuda.current_stream(), torch.cuda.Stream()
    aside.wait_stream(current)
    with torch.cuda.stream(aside):
        for _ in range(_WARM_UPS):
            call()
    current.wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    # A capture whose end fails leaves its own stream as the current one.
    with torch.cuda.stream(current), torch.cuda.graph(graph, pool=pool):
        result = call()
    return graph.replay, (graph, result, call)


def without_launches(call: Callable[[], object]) -> tuple[Callable[[], object], object, str, float]:
    """A call on a GPU such that launch time flatters no rival: as a CUDA graph where it can be captured.

    Returns:
        The call or its graph's replay, what must outlive it, ``"CUDA graph"`` or why there is none, and the seconds
        that the host takes to launch it.
    """
    try:
        replay, kept = captured(call)
        mode = "CUDA graph"
    except RuntimeError as error:
        replay, kept, mode = call, None, f"launches: {str(error).splitlines()[0][:100]}"
    replay()
    torch.cuda.synchronize()
    began = time.perf_counter()
    replay()
    host_s = time.perf_counter() - began
    torch.cuda.synchronize()
    return replay, kept, mode, host_s


def _median_seconds(device: str, call: Callable[[], object], rounds: int, warm_ups: int) -> float:
    now, seconds = clock(device), []
    for _ in range(warm_ups + rounds):
        begin = now()
        call()
        seconds.append(now() - begin)
    return sorted(seconds[warm_ups:])[rounds // 2]


@cache
def copy_bandwidth(device: str, threads: int, quick: bool = False) -> float:
    """Bytes read plus bytes written per second by a large copy: median of many, with the threads now in use.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        threads: ``torch.get_num_threads()``; what is remembered is remembered for it.
        quick: a small copy, for smoke runs.
    """
    elements = 2**16 if quick else 2**28 if device == "cuda" else 2**26
    source = torch.randn(elements, device=device)
    target = torch.empty_like(source)
    seconds = _median_seconds(device, lambda: target.copy_(source), *((3, 1) if quick else (20, 5)))
    return 2 * source.nbytes / seconds


@cache
def matrix_rate(device: str, dtype: torch.dtype, threads: int, quick: bool = False) -> float:
    """FLOP per second of a large square matrix product of random numbers; arguments as in :func:`copy_bandwidth`."""
    size = 64 if quick else 8192 if device == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = _median_seconds(device, lambda: a @ b, *((3, 1) if quick else (20, 5)))
    return 2 * size**3 / seconds


def matrix_dtypes(device: str) -> tuple[torch.dtype, ...]:
    """What a device's benchmarks compute in."""
    return (torch.float32, torch.bfloat16) if device == "cuda" else (torch.float32,)


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` rather than ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def roofs(device: str, quick: bool = False) -> dict[str, object]:
    """Copy bandwidth and matrix rates with the threads now in use."""
    threads = torch.get_num_threads()
    rates = {dtype_name(x): matrix_rate(device, x, threads, quick) / 1e9 for x in matrix_dtypes(device)}
    found: dict[str, object] = {"copy_gb_per_s": copy_bandwidth(device, threads, quick) / 1e9}
    return found | {"matrix_gflop_per_s": rates} | ({"threads": threads} if device == "cpu" else {})
