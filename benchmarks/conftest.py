"""What the benchmarks share: options, one thread, and how a call is measured and its figures are kept.

``--results DIR`` merges figures into ``DIR/<device>/<name>.json`` after every benchmark, so that a run that is cut
short keeps what it measured. Without it nothing is written. ``--quick`` only shows that everything runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.report import store, timing

# Rivals that torch.compile makes anew for every problem.
COMPILED_RIVALS = ("compiled", "flex")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("results")
    group.addoption("--results", type=Path, metavar="DIR", help="merge figures into DIR/<device>/<name>.json")
    group.addoption("--quick", action="store_true", help="two rounds of everything: a smoke run, no figures")


def pytest_configure(config: pytest.Config) -> None:
    folder = config.getoption("--results")
    if config.getoption("--quick") and folder is not None and folder.resolve() == store.RESULTS:
        raise pytest.UsageError("--quick measures nothing worth keeping: give it another --results folder")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Large problems first, and rivals that have to be compiled last: a run that is cut short has what is wanted most.

    Problems of one size keep the order of their file: the ops in turn, ours before its eager rivals.
    """
    items.sort(key=_worth)


def _worth(item: pytest.Item) -> tuple[bool, int]:
    params = getattr(item, "callspec", None)
    values = {} if params is None else params.params
    sizes = (values.get(name, 1) for name in ("slots", "length", "latent", "rows", "tokens", "keys", "numel"))
    return values.get("rival") in COMPILED_RIVALS, -math.prod(
        math.prod(x) if isinstance(x, tuple) else x for x in sizes
    )


@pytest.fixture
def one_thread() -> Iterator[None]:
    """PyTorch on one thread; for ops so short that a second one only adds noise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def keeper(request: pytest.FixtureRequest) -> store.Keeper:
    stem = request.path.stem.removeprefix("bench_")
    return store.Keeper(request.config.getoption("--results"), stem, request.node.name)


@pytest.fixture
def quick(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--quick"))


@pytest.fixture
def measure(benchmark: Any, keeper: store.Keeper, quick: bool) -> Callable[..., None]:
    """A function that times a call and keeps its figures."""

    def run(
        call: Callable[[], object],
        *,
        device: str,
        op: str,
        case: str,
        backend: str,
        ours: bool,
        moved: int,
        flops: int = 0,
        dtype: torch.dtype = torch.float32,
        iterations: int = 10,
        params: dict[str, Any] | None = None,
    ) -> None:
        """Time ``call``.

        Args:
            call: what is measured.
            device: where it runs, ``"cpu"`` or ``"cuda"``.
            op: the op's name; a table of the report.
            case: the problem; calls of the same op and case are rivals.
            backend: which rival this is.
            ours: whether it is the one that the others are compared with.
            moved: bytes that have to be read and written.
            flops: floating-point operations that have to be done.
            dtype: that of the matrix rate that these are held against.
            iterations: calls of a round on the CPU; on a GPU 1, with the L2 cache flushed before.
            params: more about the problem, for the record.
        """
        keeper.path(device)
        kept, mode, host_s = None, "", 0.0
        if device == "cuda":
            with torch.inference_mode():
                call, kept, mode, host_s = timing.without_launches(call)
        rounds, warm_ups = (100, 10) if device == "cuda" else (30, 2)
        if quick:
            rounds, warm_ups, iterations = 2, 1, 1
        benchmark._timer = timing.clock(device, host_s)
        with torch.inference_mode():
            benchmark.pedantic(
                call, rounds=rounds, iterations=1 if device == "cuda" else iterations, warmup_rounds=warm_ups
            )
        # What a graph reads and writes was needed until here.
        del kept
        if benchmark.stats is None:
            return
        found, roofs = benchmark.stats.stats, timing.roofs(device, quick)
        entry = {"op": op, "case": case, "backend": backend, "ours": ours, "dtype": timing.dtype_name(dtype)}
        entry |= {"params": params or {}}
        entry |= {"threads": torch.get_num_threads()} if device == "cpu" else {"mode": mode}
        entry |= {"median_s": found.median, "iqr_s": found.iqr, "min_s": found.min, "max_s": found.max}
        entry |= {"rounds": rounds, "bytes": moved, "flops": flops, "gb_per_s": moved / found.median / 1e9}
        entry["percent_of_copy"] = 100 * entry["gb_per_s"] / roofs["copy_gb_per_s"]
        if flops:
            entry["gflop_per_s"] = flops / found.median / 1e9
            rate = roofs["matrix_gflop_per_s"][timing.dtype_name(dtype)]
            entry["percent_of_matrix"] = 100 * entry["gflop_per_s"] / rate
        benchmark.extra_info.update(store.rounded(entry))
        keeper.keep(device, entry, roofs)

    return run
