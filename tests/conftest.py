"""``--reliability OUT.json``: writes down which faults the tests of this run injected, how often, and how it ended.

Tests report through the fixture ``fault_log``. A file that exists is renewed test by test, so parts of the suite may
run one after the other; ``tests/render_reliability.py`` makes docs/reliability.md of it.
"""

from __future__ import annotations

import json
import os
import platform
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

LOGS = pytest.StashKey[dict[str, dict]]()


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
    config.stash[LOGS] = {}


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
        item.stash.setdefault(PASSED, {})[report.when] = report.passed
    if report.when == "teardown" and item.nodeid in item.config.stash[LOGS]:
        item.config.stash[LOGS][item.nodeid]["passed"] = item.stash.get(PASSED, {}).get("call", False)
    return report


PASSED = pytest.StashKey[dict[str, bool]]()


def pytest_sessionfinish(session: pytest.Session) -> None:
    path, logs = session.config.getoption("reliability"), session.config.stash[LOGS]
    if path is None or not logs:
        return
    kept = json.loads(path.read_text())["tests"] if path.exists() else {}
    # What a parametrised test was called before would be counted beside its new names.
    renewed = {name.partition("[")[0] for name in logs}
    kept = {name: entry for name, entry in kept.items() if name.partition("[")[0] not in renewed}
    facts = {"machine": platform.machine(), "python": platform.python_version(), "torch": torch.__version__}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    partial.write_text(json.dumps({**facts, "tests": dict(sorted((kept | logs).items()))}, indent=1) + "\n")
    partial.replace(path)
