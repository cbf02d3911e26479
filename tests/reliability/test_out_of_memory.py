"""A target call that does not fit is made in parts: the images stay, and nothing that was committed is lost."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from analytic import BiasedDrafter, GaussianTarget
from coupling_calls import needs_extension
from fresh_process import in_fresh_process

from free_kernels import DDPMSchedule, sample
from free_kernels.sampling.cuda_graphs import CapturedCalls
from free_kernels.sampling.job import make_job
from free_kernels.sampling.options import Options
from free_kernels.sampling.target_call import TargetCall

LABELS = torch.arange(6) % 3
STEPS = DDPMSchedule(15)
CPU_MESSAGE = "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory"


class Small(GaussianTarget):
    """A target that holds so many rows; memory may also be short at the head, or for a while only."""

    def __init__(self, rows: int, error: Exception, at: str = "features", failures: int = 10**9) -> None:
        super().__init__(learns_variance=True)
        self.rows, self.error, self.at, self.failures = rows, error, at, failures
        self.calls: list[int] = []

    def _check(self, place: str, rows: int) -> None:
        if place == self.at and rows > self.rows and self.failures > 0:
            self.failures -= 1
            raise self.error

    def features(self, x, t, y):
        self._check("features", len(x))
        self.calls.append(len(x))
        return super().features(x, t, y)

    def head(self, h, t, y):
        self._check("head", len(h))
        return super().head(h, t, y)


@pytest.mark.parametrize("at", ["features", "head"])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError(CPU_MESSAGE)])
@pytest.mark.parametrize("rows", [1, 6, 9])
def test_images_are_those_of_enough_memory(rows, error, at, fault_log):
    if at == "head" and rows < 6:
        pytest.skip("drafting calls the head with a row for each of six slots")
    settings = {"schedule": STEPS, "draft_length": 5, "seed": 4}
    roomy = GaussianTarget(learns_variance=True)
    want = sample(roomy, LABELS, drafter=BiasedDrafter(roomy), **settings)
    small = Small(rows, error, at)
    got = sample(small, LABELS, drafter=BiasedDrafter(roomy), **settings)
    torch.testing.assert_close(got.samples, want.samples, rtol=1e-5, atol=1e-5)
    assert got.stats.rounds_per_image.tolist() == want.stats.rounds_per_image.tolist()
    assert max(small.calls[-10:]) <= rows
    fault_log(f"out of memory in the target's {at}", "calls made in parts: the same images")


def test_a_failure_for_a_moment(fault_log):
    roomy, small = GaussianTarget(learns_variance=True), Small(8, torch.OutOfMemoryError("once"), failures=1)
    settings = {"schedule": STEPS, "draft_length": 5, "seed": 4, "drafter": BiasedDrafter(roomy)}
    torch.testing.assert_close(sample(small, LABELS, **settings).samples, sample(roomy, LABELS, **settings).samples)
    fault_log("out of memory for a moment", "calls made in parts: the same images")


def test_rows_are_halved_and_the_limit_is_kept():
    target = Small(3, torch.OutOfMemoryError("CUDA out of memory"))
    job = make_job("sample", target, torch.zeros(20, dtype=torch.int64), Options(schedule=STEPS))
    network = TargetCall(job)
    x, t, y = torch.randn(20, *target.latent_shape), job.timesteps[:1].repeat(20), torch.zeros(20, dtype=torch.int64)
    output, wait = network(x, t, y)
    features = wait()
    assert network.most_rows == 3
    assert target.calls == [3] * 6 + [2]
    torch.testing.assert_close(features, GaussianTarget.features(target, x, t, y))
    assert len(output) == 20
    network(x[:5], t[:5], y[:5])
    assert target.calls[-2:] == [3, 2]


def test_what_cannot_fit_is_an_error_and_other_errors_pass():
    for rows, error in ((0, torch.OutOfMemoryError("CUDA out of memory")), (4, RuntimeError("shapes do not match"))):
        with pytest.raises(type(error), match=str(error)):
            sample(Small(rows, error), LABELS, schedule=STEPS, draft_length=5)


class Cuda:
    """What a capture uses of ``torch.cuda``; keeps a list of what was done, and within which capture."""

    def __init__(self, end_fails: bool = False) -> None:
        self.done: list[str] = []
        self.capturing, self.end_fails = False, end_fails

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("device", "stream"):
            monkeypatch.setattr(torch.cuda, name, lambda _: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
        monkeypatch.setattr(torch.cuda, "graph", self.graph)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: self.done.append(f"empty, capturing {self.capturing}"))

    @contextlib.contextmanager
    def graph(self, graph: object, pool: object) -> Iterator[None]:
        self.capturing = True
        failed = True
        try:
            yield
            failed = False
        finally:
            self.capturing = False
            self.done.append("abandoned" if failed else "captured")
            if failed and self.end_fails:
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture")


class OnCuda(torch.Tensor):
    """A CPU tensor that says that it is on a GPU."""

    is_cuda = True


def captured_call(monkeypatch, rows: int, error: Exception, cuda: Cuda):
    """A capture of a packed call of twelve rows, with a target that holds ``rows``."""
    cuda.patch(monkeypatch)
    target = Small(rows, error)
    job = make_job("sample", target, torch.zeros(12, dtype=torch.int64), Options(schedule=STEPS))
    network = TargetCall(job)
    x = torch.randn(12, *target.latent_shape).as_subclass(OnCuda)
    t, y = job.timesteps[:1].repeat(12), torch.zeros(12, dtype=torch.int64)
    calls = CapturedCalls(lambda key: network(x, t, y), [], lambda: None, torch.device("cuda"))
    return target, network, calls._capture(0)


@pytest.mark.parametrize("end_fails", [False, True])
def test_memory_is_given_back_between_captures_never_within(monkeypatch, end_fails):
    cuda = Cuda(end_fails)
    target, network, (_, (output, wait)) = captured_call(
        monkeypatch, 3, torch.OutOfMemoryError("CUDA out of memory"), cuda
    )
    # Twelve rows, then six, then three: each size is captured from its beginning.
    empty = "empty, capturing False"
    assert cuda.done == ["abandoned", empty, "abandoned", empty, "captured"]
    assert (network.most_rows, target.calls) == (3, [3] * 4)
    assert len(wait()) == len(output) == 12


@pytest.mark.parametrize("end_fails", [False, True])
def test_what_no_capture_can_hold_is_an_error(monkeypatch, end_fails):
    cuda = Cuda(end_fails)
    with pytest.raises(RuntimeError, match="CUDA (out of memory|error)"):
        captured_call(monkeypatch, 0, torch.OutOfMemoryError("CUDA out of memory"), cuda)
    assert cuda.done.count("abandoned") == 5
    cuda = Cuda(end_fails)
    with pytest.raises(RuntimeError, match="shapes do not match|CUDA error"):
        captured_call(monkeypatch, 3, RuntimeError("shapes do not match"), cuda)
    assert cuda.done == ["abandoned"]


def test_memory_is_given_back_at_once_outside_of_captures(monkeypatch):
    cuda = Cuda()
    cuda.patch(monkeypatch)
    target = Small(3, torch.OutOfMemoryError("CUDA out of memory"))
    job = make_job("sample", target, torch.zeros(12, dtype=torch.int64), Options(schedule=STEPS))
    x = torch.randn(12, *target.latent_shape).as_subclass(OnCuda)
    TargetCall(job)(x, job.timesteps[:1].repeat(12), torch.zeros(12, dtype=torch.int64))
    assert cuda.done == ["empty, capturing False"] * 2


@needs_extension
def test_an_op_that_finds_no_memory_is_understood():
    """The ops on the stable ABI word it in another way, from one torch to the next."""
    code = """
import resource
import torch
from free_kernels import ops
from free_kernels.sampling.target_call import is_out_of_memory

keys = torch.arange(2)
ops.philox_normal(1, keys, keys, 1, 4)
mapped = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (mapped + (8 << 30),) * 2)
for backend in ("extension", "reference"):
    try:
        ops.philox_normal(1, keys, keys, 1, 2**33, backend=backend)
    except (RuntimeError, MemoryError) as error:
        print(backend, is_out_of_memory(error))
"""
    assert in_fresh_process(code).split() == ["extension", "True", "reference", "True"]
