"""Runs stages within a limited time and writes how each ended, so that nothing is lost if the run itself is killed."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TAIL_LINES = 25
# Of each command's output, in the log.
LOG_BYTES = 200_000
# Less than this is no use to a stage.
LEAST_S = 5.0
# Left over at the end, for ending a stage and for the summary.
END_S = 10.0
# Lines with which check_kernels.py begins what it says of a comparison.
VERDICT = re.compile(r"^(ok|WRONG|MISSING)\s")
FIGURES = "figures: "


@dataclass(frozen=True)
class Stage:
    """Commands that run side by side, and what they need.

    Attributes:
        name: in the summary.
        limit_s: seconds that it may take; more where earlier stages left some of theirs.
        commands: program and arguments of each.
        packages: modules that must be importable.
        tools: programs that must be on the path.
        environment: more environment variables.
        results: file in the device's folder that it adds benchmarks to; the summary names those that it added.
        excuses: texts of its output that tell that the machine cannot do this, which then counts as skipped.
        required: whether nothing after it makes sense unless it is ok.
    """

    name: str
    limit_s: float
    commands: tuple[tuple[str, ...], ...]
    packages: tuple[str, ...] = ()
    tools: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    results: str = ""
    excuses: tuple[str, ...] = ()
    required: bool = False


@dataclass
class Outcome:
    """How a stage ended.

    Attributes:
        name: of the stage.
        status: ok, failed, cut (its time was over; it keeps what it had written) or skipped.
        seconds: how long it ran.
        why: the reason, unless it is ok.
        figures: what it measured or counted.
        tail: the end of its output.
    """

    name: str
    status: str
    seconds: float = 0.0
    why: str = ""
    figures: dict[str, Any] = field(default_factory=dict)
    tail: list[str] = field(default_factory=list)


# Stages that may run side by side.
Plan = Sequence[Sequence[Stage]]


def seconds_of(plan: Plan) -> float:
    """Time that the stages may take, one group after the other."""
    return sum(max(stage.limit_s for stage in group) for group in plan)


def missing(stage: Stage) -> str:
    """What a stage lacks, or nothing."""
    packages = [name for name in stage.packages if importlib.util.find_spec(name) is None]
    tools = [name for name in stage.tools if shutil.which(name) is None]
    said = [f"missing Python packages: {', '.join(packages)}"] if packages else []
    return "; ".join(said + ([f"missing programs: {', '.join(tools)}"] if tools else []))


class Runner:
    """Runs a plan.

    Args:
        out: folder of the summary and the log.
        call: name of the plan, part of their names.
        facts: of the machine, kept in the summary.
        device_folder: where benchmarks' results go.
        environment: that of every stage.
        clock: seconds, for tests.
    """

    def __init__(
        self,
        out: Path,
        call: str,
        facts: dict[str, Any],
        device_folder: Path,
        environment: dict[str, str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.out, self.call, self.facts = out, call, facts
        self.device_folder, self.environment, self.clock = device_folder, environment, clock
        self.started = clock()
        self.outcomes: dict[str, Outcome] = {}
        self._running: set[int] = set()
        self._lock = threading.Lock()
        out.mkdir(parents=True, exist_ok=True)
        self.log = out / f"log_{call}.txt"
        self.log.write_bytes(b"")

    def run(self, plan: Plan, budget_s: float, refusal: str = "") -> int:
        """Run a plan's groups in order; returns the exit status.

        Args:
            plan: the groups.
            budget_s: seconds from the runner's start for everything.
            refusal: why nothing can run, if so.

        Returns:
            0 if every stage is ok, 1 if one failed or nothing ran, 3 if none failed but one was cut or skipped.
        """
        for stage in (stage for group in plan for stage in group):
            self.outcomes[stage.name] = Outcome(stage.name, "skipped", why="not reached: the run ended before it")
        self.write_summary()
        # Each group may run until the end of what it and those before it were given: what one leaves, later ones have.
        last = self.started + budget_s - END_S
        deadline = max(self.clock(), last - seconds_of(plan))
        try:
            for group in plan:
                deadline = min(last, deadline + max(stage.limit_s for stage in group))
                refusal = self._run_group(group, deadline, refusal)
        finally:
            self.end_all()
            self.write_summary()
            # Files of which a stage that was cut had written a part.
            for part in self.out.rglob("*.tmp"):
                part.unlink()
        statuses = {outcome.status for outcome in self.outcomes.values()}
        if "failed" in statuses or "ok" not in statuses:
            return 1
        return 0 if statuses == {"ok"} else 3

    def _run_group(self, group: Sequence[Stage], deadline: float, refusal: str) -> str:
        """Run stages side by side; returns why those after them cannot run, if so."""
        wanted = []
        for stage in group:
            left = deadline - self.clock()
            why = "; ".join(filter(None, [refusal, missing(stage), "" if left > LEAST_S else "no time is left"]))
            if why:
                self._keep(Outcome(stage.name, "skipped", why=why))
            else:
                wanted.append(stage)
                # Stands if this process is killed while the stage runs.
                self.outcomes[stage.name] = Outcome(stage.name, "cut", why="the run ended while it ran")
        self.write_summary()
        if wanted:
            with ThreadPoolExecutor(len(wanted)) as pool:
                running = [pool.submit(self.run_stage, stage, deadline - self.clock()) for stage in wanted]
                try:
                    for done in as_completed(running):
                        self._keep(done.result())
                except BaseException:
                    # Told to end: the threads wait for their stages.
                    self.end_all()
                    raise
        for stage in group:
            outcome = self.outcomes[stage.name]
            if not refusal and stage.required and outcome.status != "ok":
                refusal = f"{stage.name} {outcome.status}: {outcome.why}"
        return refusal

    def run_stage(self, stage: Stage, limit_s: float) -> Outcome:
        """Run a stage to its end or its limit; everything that it started ends with it."""
        started, environment = self.clock(), {**self.environment, **stage.environment}
        before = self._entries(stage)
        with contextlib.ExitStack() as files:
            sinks = [files.enter_context(tempfile.TemporaryFile()) for _ in stage.commands]
            processes: list[subprocess.Popen[bytes]] = []
            problem, cut = "", False
            try:
                for command, sink in zip(stage.commands, sinks, strict=True):
                    streams = {"stdout": sink, "stderr": subprocess.STDOUT}
                    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **streams)
                    processes.append(process)
                    with self._lock:
                        self._running.add(process.pid)
                for process in processes:
                    process.wait(timeout=max(0.0, limit_s - (self.clock() - started)))
            except subprocess.TimeoutExpired:
                cut = True
            except OSError as error:
                problem = f"cannot run {error.filename}: {error.strerror}"
            finally:
                # Also where a command is over: what it started in the background is not.
                for process in processes:
                    self._end(process.pid)
                    process.wait()
            outputs = [self._take_output(stage, *pair) for pair in zip(stage.commands, sinks, strict=True)]
        seconds = round(self.clock() - started, 1)
        lines = [line for output in outputs for line in output]
        figures = self._figures(stage, lines, before)
        codes = [process.returncode for process in processes]
        tail = [line for output in outputs for line in output[-max(5, TAIL_LINES // len(outputs)) :]]
        if problem:
            return Outcome(stage.name, "failed", seconds, problem, figures, tail)
        if cut:
            return Outcome(stage.name, "cut", seconds, f"its {limit_s:.0f} s were over", figures, tail)
        if not any(codes):
            if stage.results and not figures["measured"]:
                return Outcome(stage.name, "failed", seconds, "nothing was measured", figures, tail)
            return Outcome(stage.name, "ok", seconds, "", figures, tail)
        excuse = next((text for text in stage.excuses if any(text in line for line in lines)), "")
        if excuse:
            return Outcome(stage.name, "skipped", seconds, f"this machine cannot: {excuse}", figures, tail)
        return Outcome(stage.name, "failed", seconds, f"exit status {', '.join(map(str, codes))}", figures, tail)

    def end_all(self) -> None:
        """Kill what still runs."""
        for pid in list(self._running):
            self._end(pid)

    def _end(self, pid: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
        with self._lock:
            self._running.discard(pid)

    def _take_output(self, stage: Stage, command: tuple[str, ...], sink: Any) -> list[str]:
        """Lines of a command's output, whose beginning and end go to the log."""
        sink.seek(0)
        output = sink.read()
        half = LOG_BYTES // 2
        shown = output if len(output) <= LOG_BYTES else output[:half] + b"\n... left out ...\n" + output[-half:]
        with self._lock, self.log.open("ab") as log:
            log.write(f"\n===== {stage.name}: {' '.join(command)}\n".encode() + shown)
        return output.decode(errors="replace").splitlines()

    def _entries(self, stage: Stage) -> dict[str, Any]:
        """Benchmarks in the stage's results file."""
        path = self.device_folder / stage.results
        if not stage.results or not path.exists():
            return {}
        try:
            return json.loads(path.read_text())["benchmarks"]
        except (ValueError, KeyError):
            return {}

    def _figures(self, stage: Stage, lines: list[str], before: dict[str, Any]) -> dict[str, Any]:
        """What a stage said on its last line of figures, verdicts on comparisons, and benchmarks that it added."""
        found: dict[str, Any] = {}
        verdicts = Counter(match[1] for match in map(VERDICT.match, lines) if match)
        if verdicts:
            found["comparisons"] = dict(verdicts)
            found["not ok"] = [line for line in lines if VERDICT.match(line) and not line.startswith("ok")]
        for line in lines:
            if line.startswith(FIGURES):
                with contextlib.suppress(ValueError):
                    found |= json.loads(line.removeprefix(FIGURES))
        if stage.results:
            found["file"] = f"{self.device_folder.name}/{stage.results}"
            found["measured"] = sorted(name for name, x in self._entries(stage).items() if before.get(name) != x)
        return found

    def _keep(self, outcome: Outcome) -> None:
        self.outcomes[outcome.name] = outcome
        self.write_summary()
        print(f"{outcome.status:8s}{outcome.name:18s}{outcome.seconds:7.1f} s  {outcome.why}", flush=True)
        if outcome.figures:
            print(f"    {json.dumps(outcome.figures)[:400]}", flush=True)
        if outcome.status in ("failed", "cut"):
            print("\n".join(f"    {line[:300]}" for line in outcome.tail[-12:]), flush=True)

    def write_summary(self) -> None:
        """Replace the summary as a whole: a reader never finds half of one."""
        record = {
            "call": self.call,
            "facts": self.facts,
            "seconds": round(self.clock() - self.started, 1),
            "stages": [asdict(outcome) for outcome in self.outcomes.values()],
        }
        with self._lock:
            draft = self.out / f"summary_{self.call}.tmp"
            draft.write_text(json.dumps(record, indent=1) + "\n")
            draft.replace(self.out / f"summary_{self.call}.json")
