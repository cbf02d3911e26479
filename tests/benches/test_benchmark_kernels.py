"""Benchmarks that check or time kernels do so with the kernels themselves: a missing one is said, never replaced."""

from __future__ import annotations

import importlib
import sys
import time
from functools import partial
from pathlib import Path
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import pytest

from free_kernels import DDPMSchedule, extension, sample
from free_kernels.ops.declaration import KernelOp
from free_kernels.sampling import round as round_module

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
pytestmark = pytest.mark.skipif(not BENCHMARKS.exists(), reason="needs the source checkout")
needs_extension = pytest.mark.skipif(
    not extension.has_extension(), reason=f"no compiled extension: {extension.why_no_extension()}"
)


def benchmark(monkeypatch: pytest.MonkeyPatch, name: str) -> ModuleType:
    (found,) = BENCHMARKS.glob(f"*/{name}.py")
    return importlib.import_module(f"benchmarks.{found.parent.name}.{name}")


def check(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    module = benchmark(monkeypatch, "check_kernels")
    monkeypatch.setattr(sys, "argv", ["check_kernels", "--device", "cpu", "--seed", "1", *arguments])
    return module.main()


@needs_extension
def test_comparisons_are_of_the_extension(monkeypatch, capsys):
    assert check(monkeypatch, "--only", "packing", "random") == 0
    said = capsys.readouterr().out
    assert "0 of 20 comparisons failed, kernels of 0 checks are missing" in said
    assert said.count(" by extension: ") == 20


def test_a_missing_kernel_is_a_failure_and_says_why(monkeypatch, capsys):
    missing = {("pack_drafts", "cpu"): None, ("commit_drafts", "cpu"): "it was not built"}
    monkeypatch.setattr(extension, "_kernels", missing)
    assert check(monkeypatch, "--only", "packing") == 1
    assert "MISSING packing by extension: it was not built" in capsys.readouterr().out


def test_triton_needs_a_gpu_or_the_interpreter(monkeypatch, capsys):
    module = benchmark(monkeypatch, "check_kernels")
    monkeypatch.setattr(module, "why_no_runtime", lambda *_: "no GPU")
    assert module.default_checks("cpu") == ["random", "packing"]
    assert module.default_checks("cuda") == list(module.CHECKS)
    assert check(monkeypatch, "--only", "couple", "attention") == 1
    said = capsys.readouterr().out
    assert said.count("MISSING") == 2
    assert "MISSING couple by triton: no GPU" in said
    assert [module.backend_of(stem, "cuda") for stem in module.CHECKS] == ["triton"] * 3 + ["extension"]


@needs_extension
def test_a_wrong_kernel_is_found(monkeypatch, capsys):
    module = benchmark(monkeypatch, "check_kernels")
    whole = module.pack_drafts

    def wrong(*arguments, backend):
        x, t, y, offsets = whole(*arguments, backend=backend)
        return x, t + (backend == "extension"), y, offsets

    monkeypatch.setattr(module, "pack_drafts", wrong)
    assert check(monkeypatch, "--only", "packing") == 1
    assert "WRONG  packing" in capsys.readouterr().out


def ops_of_a_round(callers: tuple[Any, ...]) -> set[str]:
    """Public ops that the speculative loop calls."""
    members = {name: value for module in callers for name, value in vars(module).items()}
    kinds = FunctionType, KernelOp
    calls = {name: value for name, value in members.items() if isinstance(value, kinds)}
    ops = {name for name, value in calls.items() if value.__module__.startswith("free_kernels.ops.")}
    # What is no op; and the head's, whose time is the target's head's.
    return ops - {"use_triton", "signed_seed", "unpatchify", "final_layer"}


def test_the_profile_times_every_op_of_a_round(monkeypatch):
    module = benchmark(monkeypatch, "profile_sampler")
    timed = module.TIMED_OPS
    assert set(timed) == ops_of_a_round(module.CALLERS)
    assert {"couple", "couple_philox", "couple_block", "couple_block_philox", "pack_drafts", "commit_drafts"} <= set(
        timed
    )


def test_the_profile_sees_the_coupling_that_a_gpu_runs(monkeypatch):
    """Where the coupling draws its numbers itself, as on a GPU, its time counts too."""
    module = benchmark(monkeypatch, "profile_sampler")
    monkeypatch.setattr(round_module, "use_triton", lambda *_: True)
    monkeypatch.setattr(module, "sample", partial(sample, schedule=DDPMSchedule(10)))
    step = SimpleNamespace(stats=SimpleNamespace(elapsed_s=1.0))
    monkeypatch.setattr(module, "ancestral_sample", lambda *_, **__: step)
    parts = module.profile("cpu", 1, 3, 1.0, 1)["parts"]
    assert parts["couple"]["ms"] > 0
    monkeypatch.setattr(module, "TIMED_OPS", {"couple": "couple"})
    assert "couple" not in module.profile("cpu", 1, 3, 1.0, 1)["parts"]


def test_the_rounds_share_leaves_out_the_calls_own_start(monkeypatch):
    module = benchmark(monkeypatch, "profile_sampler")

    def slow_to_begin(*arguments: Any, **settings: Any) -> Any:
        started = time.perf_counter()
        time.sleep(0.5)
        result = sample(*arguments, schedule=DDPMSchedule(10), **settings)
        result.stats.elapsed_s = time.perf_counter() - started
        return result

    monkeypatch.setattr(module, "sample", slow_to_begin)
    step = SimpleNamespace(stats=SimpleNamespace(elapsed_s=1.0))
    monkeypatch.setattr(module, "ancestral_sample", lambda *_, **__: step)
    found = module.profile("cpu", 1, 3, 1.0, 2)
    rounds, call = found["outside_of_networks"], found["outside_of_networks_with_start"]
    assert 0 < rounds["low"] <= rounds["median"] <= rounds["high"] < 1
    # The same networks' time, over that of the rounds and over that with half a second more.
    assert rounds["median"] < call["median"] < 1
