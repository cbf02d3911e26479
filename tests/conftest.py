"""``--reliability OUT.json``: writes down which faults the tests of this run injected, how often, and how it ended.

Tests report through the fixture ``fault_log``. A file that exists is renewed test by test, so parts of the suite may
run one after the other; ``tests/helpers/render_reliability.py`` makes docs/reliability.md of it.
"""

from __future__ import annotations

import os
import signal
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from render_reliability import write_log

from free_kernels.sampling.speculative import Speculation

HELPERS = str(Path(__file__).parent / "helpers")
# Files that take a minute or more, longest first. They are begun first, so that processes which share the files end
# together; a file that is not named here is run after them.
LONGEST = (
    "test_triton_coupling",
    "test_triton_aot",
    "test_bundled",
    "test_distribution",
    "test_distributed",
    "test_training_processes",
    "test_build",
    "test_interrupts",
    "test_triton_sampler",
    "test_policy_bundled",
    "test_report",
    "test_generate",
    "test_triton_drafting",
    "test_training",
    "test_attention",
    "test_defaults",
    "test_triton_block",
    "test_cuda_emulator",
    "test_cli",
    "test_run_gpu",
)
LOGS = pytest.StashKey[dict[str, dict]]()
PASSED = pytest.StashKey[bool]()


class FaultLog:
    """Faults that one test injected, by kind and outcome."""

    def __init__(self) -> None:
        self.counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.figures: dict[str, float] = {}

    def __call__(self, fault: str, outcome: str, count: int = 1) -> None:
        """Count ``count`` faults of a kind that ended alike."""
        self.counts[fault][outcome] += count

    def figure(self, name: str, value: float) -> None:
        """A measured figure, with its unit in the name."""
        self.figures[name] = round(float(value), 4)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--reliability", type=Path, metavar="OUT.json", help="write the faults that tests injected")


def pytest_configure(config: pytest.Config) -> None:
    # Workers that tests start import what the tests share.
    os.environ["PYTHONPATH"] = os.pathsep.join([HELPERS, *filter(None, [os.environ.get("PYTHONPATH")])])
    config.stash[LOGS] = {}
    # A script's background jobs ignore it, and so would the processes that tests interrupt.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture
def fault_log(request: pytest.FixtureRequest) -> Iterator[FaultLog]:
    log = FaultLog()
    yield log
    if log.counts or log.figures:
        entry = {"faults": {fault: dict(outcomes) for fault, outcomes in sorted(log.counts.items())}}
        if log.figures:
            entry["figures"] = log.figures
        request.config.stash[LOGS][request.node.nodeid] = entry


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    report = yield
    if report.when == "call":
        item.stash[PASSED] = report.passed
    logs = item.config.stash[LOGS]
    if report.when == "teardown" and item.nodeid in logs:
        logs[item.nodeid]["passed"] = item.stash.get(PASSED, False)
        path = item.config.getoption("reliability")
        # After every test: a run that is cut short leaves what it got to.
        if path is not None:
            write_log(path, logs)
    return report


@pytest.fixture
def uncorrected(monkeypatch):
    """Drafts after a refusal are the drafter's own: for drafters whose very errors are looked at."""
    begin = Speculation.__init__

    def without(self, job, **settings):
        begin(self, replace(job, options=replace(job.options, reuse_refused=False)), **settings)

    monkeypatch.setattr(Speculation, "__init__", without)
