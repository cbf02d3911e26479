"""Runs tests in several processes on one GPU; counts a test that took its process with it as failed.

Each process collects all of the tests and claims the next one that no other has, so that a slow test holds up only its
own process and nothing but pytest is needed. Most of their time goes to compiling kernels, which they share through
Triton's cache. ``--out`` is renewed while they run. Exit status 0 if something passed in every file, and all did that
was not skipped.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
CLAIMS = "GPU_TESTS_CLAIMS"
MAX_STARTS = 3
# A CUDA error of these stays with the process, whose later tests would all fail.
FATAL = ("CUDA error", "cudaError", "illegal memory access", "device-side assert")


class Claimer:
    """A plugin of pytest: runs the tests that this process claims, and writes down what becomes of them.

    Args:
        folder: shared by the processes; a file for every claim, and lines of JSON of each process.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lines = (folder / f"{os.getpid()}.jsonl").open("a")

    def write(self, **event: Any) -> None:
        """One line, at once: this process may die next."""
        self._lines.write(json.dumps(event) + "\n")
        self._lines.flush()

    def claim(self, number: int) -> bool:
        """Whether the test of this number is this process's."""
        try:
            os.close(os.open(self.folder / f"{number}.claim", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be imported is a failure."""
        if report.failed:
            self.write(broken=report.nodeid, text=str(report.longrepr)[-2000:])

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Instead of pytest's own loop over all tests."""
        self.write(collected=[item.nodeid for item in session.items])
        for number, item in enumerate(session.items):
            if session.shouldstop:
                break
            if self.claim(number):
                self.write(began=item.nodeid)
                # Nothing is kept for the next one, which another process may claim.
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
                self.write(ended=item.nodeid)
        return True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A part of a test: its set-up, itself or its end."""
        text = "" if report.passed else str(report.longrepr)
        self.write(test=report.nodeid, outcome=report.outcome, seconds=report.duration, text=text[-2000:])
        if report.failed and any(word in text for word in FATAL):
            self.write(fatal=report.nodeid)
            os._exit(70)


def pytest_configure(config: pytest.Config) -> None:
    """What makes this file a plugin, in the processes that were told where to claim."""
    if CLAIMS in os.environ:
        config.pluginmanager.register(Claimer(Path(os.environ[CLAIMS])), "claimer")


def events(folder: Path) -> Iterator[dict[str, Any]]:
    """What all processes wrote so far; the last line of one may be half written."""
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            with contextlib.suppress(ValueError):
                yield json.loads(line)


def gathered(folder: Path, ended: bool) -> dict[str, Any]:
    """Tests by id with outcome, seconds and text, files that are broken, tests not reached.

    Args:
        folder: of the claims.
        ended: whether no process runs: a test without an end has then taken its process with it.
    """
    collected: list[str] = []
    tests: dict[str, dict[str, Any]] = {}
    broken: dict[str, str] = {}
    open_tests: dict[str, None] = {}
    for event in events(folder):
        if "collected" in event:
            collected = max(collected, event["collected"], key=len)
        elif "broken" in event:
            broken[event["broken"]] = event["text"]
        elif "began" in event:
            open_tests[event["began"]] = None
        elif "ended" in event or "fatal" in event:
            open_tests.pop(event.get("ended") or event["fatal"], None)
        else:
            held = tests.setdefault(event["test"], {"outcome": "passed", "seconds": 0.0})
            held["seconds"] = round(held["seconds"] + event["seconds"], 2)
            # Failing once is failing, whatever the other parts do.
            if event["outcome"] != "passed" and held["outcome"] != "failed":
                held |= {"outcome": event["outcome"], "text": event["text"]}
    for name in open_tests:
        tests.pop(name, None)
        if ended:
            tests[name] = {"outcome": "crashed", "seconds": 0.0, "text": "its process ended while it ran"}
    return {"tests": tests, "broken": broken, "not reached": [name for name in collected if name not in tests]}


def figures(found: dict[str, Any]) -> dict[str, Any]:
    """Counts, and the names of what is wrong."""
    tests = found["tests"]
    counts = Counter(test["outcome"] for test in tests.values())
    wrong = [name for name, test in tests.items() if test["outcome"] in ("failed", "crashed")]
    reasons = Counter(test["text"].rpartition("Skipped: ")[2][:100] for test in tests.values() if _skipped(test))
    shown: dict[str, Any] = {"tests": dict(counts), "not reached": len(found["not reached"])}
    return shown | {"wrong": wrong[:40], "broken files": sorted(found["broken"]), "skipped because": dict(reasons)}


def _skipped(test: dict[str, Any]) -> bool:
    return test["outcome"] == "skipped"


def verdict(found: dict[str, Any], files: list[str]) -> list[str]:
    """What keeps this from being a success."""
    counts = Counter(test["outcome"] for test in found["tests"].values())
    said = [f"{counts[kind]} {kind}" for kind in ("failed", "crashed") if counts[kind]]
    said += [f"cannot be collected: {name}" for name in found["broken"]]
    if found["not reached"]:
        said.append(f"{len(found['not reached'])} were not reached")
    passed = {name.partition("::")[0] for name, test in found["tests"].items() if test["outcome"] == "passed"}
    return said + [f"nothing passed in {name}" for name in files if name not in passed]


def write(out: Path, found: dict[str, Any]) -> None:
    """Replace the file as a whole."""
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = out.with_suffix(".tmp")
    draft.write_text(json.dumps(figures(found) | found, indent=1) + "\n")
    draft.replace(out)


def run(files: list[str], select: str, workers: int, out: Path, folder: Path) -> dict[str, Any]:
    """Run the tests; what became of them."""
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": paths, CLAIMS: str(folder)}
    # A module that cannot be imported must not keep the others from running.
    options = [
        "-q",
        "-p",
        "benchmarks.gpu.gpu_tests",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "--continue-on-collection-errors",
    ]
    command = [sys.executable, "-m", "pytest", *options, "-m", select, *files]

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(command, cwd=ROOT, env=environment)

    running, starts, shown = [start() for _ in range(workers)], workers, ""
    while running:
        time.sleep(1)
        alive = [process for process in running if process.poll() is None]
        died = sum(process.returncode not in (0, 1, 5) for process in running if process not in alive)
        found = gathered(folder, ended=False)
        write(out, found)
        if (line := json.dumps(figures(found))) != shown:
            shown = line
            print(f"figures: {line}", flush=True)
        # A process that a test took with it is replaced.
        while died and found["not reached"] and starts < MAX_STARTS * workers:
            alive.append(start())
            died, starts = died - 1, starts + 1
        running = alive
    return gathered(folder, ended=True)


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", help="relative to the checkout's root")
    parser.add_argument("--out", type=Path, required=True, help="JSON of all tests")
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--select", default="gpu", help="expression of markers; %(default)s")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = run(arguments.files, arguments.select, arguments.workers, arguments.out, Path(folder))
    write(arguments.out, found)
    print(f"figures: {json.dumps(figures(found))}")
    problems = verdict(found, arguments.files)
    print("\n".join(problems) or "every test passed or was skipped")
    return int(bool(problems))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    sys.exit(main())
