"""Runs everything that needs a GPU, stage by stage, within a limited time: what ``run_gpu.sh OUT`` calls.

A stage has its own time limit and a failing one does not stop the next. Results, in few files: ``OUT/stages.json`` (how
each stage ended, with the end of its output), ``OUT/log.txt`` (all output), ``OUT/<device>/*.json`` (figures, as
``report.py`` reads them from ``benchmarks/results``). Nothing is installed: a stage that lacks a package or a tool is
skipped and says which. Exit status 1 if a stage failed, or if there is no GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TAIL_LINES = 25
# Left over at the end, for writing and for the shell around this.
RESERVE_S = 5
FACTS = """
import json, os, platform, torch
facts = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
facts |= {"cores": os.cpu_count(), "gpu": None, "capability": None}
try:
    import triton
    facts["triton"] = triton.__version__
except ImportError as error:
    facts["triton"] = f"none: {error}"
if torch.cuda.is_available():
    facts["gpu"] = torch.cuda.get_device_name()
    facts["capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
    facts["memory_gib"] = round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)
print(json.dumps(facts))
"""


@dataclass
class Stage:
    """One command and what it needs.

    Attributes:
        name: in stages.json.
        limit_s: its time limit.
        command: program and arguments.
        packages: modules that must be importable.
        tools: programs that must be on the path.
        environment: more environment variables.
    """

    name: str
    limit_s: int
    command: list[str]
    packages: tuple[str, ...] = ()
    tools: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


@dataclass
class Outcome:
    """How a stage ended.

    Attributes:
        name: of the stage.
        status: ok, failed, timed out or skipped.
        exit: exit status, where it ended by itself.
        seconds: how long it ran.
        why: what was missing, for a skipped stage.
        tail: the end of its output.
    """

    name: str
    status: str
    exit: int | None = None
    seconds: float = 0.0
    why: str = ""
    tail: list[str] = field(default_factory=list)


def stages(out: Path, capability: str) -> list[Stage]:
    """All stages, in order of worth: what comes late is lost first where time is short."""
    python, results = sys.executable, str(out)
    pytest = [python, "-m", "pytest", "-p", "no:cacheprovider", "-q"]
    gpu_tests = sorted(str(p) for p in (ROOT / "tests").glob("test_*.py") if "mark.gpu" in p.read_text())
    bench_packages = ("pytest", "pytest_benchmark", "triton")
    end_to_end = ("tqdm", "safetensors")

    def bench(name: str, limit_s: int, *more: str) -> Stage:
        options = ["-m", "gpu", "--benchmark-only", "--benchmark-columns=min,median,iqr", "--results", results]
        command = [*pytest, f"benchmarks/bench_{name}.py", *options]
        return Stage(f"bench_{name}", limit_s, command, (*bench_packages, *more))

    def check(name: str, limit_s: int, *more: str) -> Stage:
        return Stage(name, limit_s, [python, "benchmarks/check_kernels.py", *more], ("triton",))

    profile = [python, "benchmarks/profile_sampler.py", "--device", "cuda", "--only-parts"]
    memcheck = ["compute-sanitizer", "--error-exitcode", "9", "--tool", "memcheck", *pytest, "-m", "gpu"]
    return [
        Stage(
            "build",
            170,
            [python, "setup.py", "build_ext", "--inplace"],
            ("setuptools", "ninja"),
            ("c++",),
            {"TORCH_CUDA_ARCH_LIST": os.environ.get("TORCH_CUDA_ARCH_LIST", capability)},
        ),
        check("check_kernels", 60),
        # A module that cannot be imported must not keep the others from running.
        Stage(
            "gpu_tests",
            120,
            [*pytest, "-m", "gpu", "--continue-on-collection-errors", *gpu_tests],
            ("pytest", "hypothesis", "triton"),
        ),
        bench("coupling", 75),
        Stage(
            "bench_target",
            90,
            [python, "benchmarks/bench_target.py", "--device", "cuda", "--results", results],
            ("triton", "safetensors"),
        ),
        bench("packing", 50),
        bench("sampler", 75, *end_to_end),
        bench("attention", 100),
        Stage("profile_sampler", 45, [*profile, "--out", f"{results}/{{device}}/profile.json"], end_to_end),
        # Without the caching allocator a write past a tensor's end is a write past an allocation's end.
        Stage(
            "sanitizer",
            90,
            [*memcheck, "tests/test_packing.py"],
            ("pytest", "hypothesis"),
            ("compute-sanitizer",),
            {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        ),
    ]


def missing(stage: Stage) -> str:
    """What a stage lacks, or nothing."""
    packages = [name for name in stage.packages if importlib.util.find_spec(name) is None]
    tools = [name for name in stage.tools if shutil.which(name) is None]
    said = [f"missing Python packages: {', '.join(packages)}"] if packages else []
    return "; ".join(said + ([f"missing programs: {', '.join(tools)}"] if tools else []))


def run(stage: Stage, limit_s: float, log: Path) -> Outcome:
    """Run a stage to its end or its limit; everything that it started ends with it."""
    paths = [str(ROOT), str(ROOT / "python"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, **stage.environment, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    started = time.monotonic()
    with log.open("ab") as sink:
        sink.write(f"\n===== {stage.name}: {' '.join(stage.command)}\n".encode())
        sink.flush()
        begins = sink.tell()
        process = subprocess.Popen(
            stage.command, cwd=ROOT, env=environment, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(timeout=limit_s)
            status = "ok" if code == 0 else "failed"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code, status = None, "timed out"
    with log.open("rb") as source:
        source.seek(begins)
        lines = source.read().decode(errors="replace").splitlines()
    return Outcome(stage.name, status, code, round(time.monotonic() - started, 1), tail=lines[-TAIL_LINES:])


def device_facts() -> dict[str, object]:
    """Versions and the GPU, from a process of its own; ``{"error": ...}`` if torch cannot be used."""
    try:
        found = subprocess.run([sys.executable, "-c", FACTS], capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return {"error": "importing torch took longer than 60 s"}
    if found.returncode:
        return {"error": (found.stderr.strip().splitlines() or ["no message"])[-1]}
    return json.loads(found.stdout.splitlines()[-1])


def device_folder(gpu: str) -> str:
    """The folder's name that ``store.device_slug`` gives, without importing torch."""
    return "-".join("".join(x if x.isalnum() else " " for x in gpu.lower()).split())


def main() -> int:
    """Run the stages; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for results")
    parser.add_argument("--budget", type=float, default=520.0, help="seconds for everything")
    parser.add_argument("--only", nargs="*", help="names of stages; all of them")
    arguments = parser.parse_args()
    started, out = time.monotonic(), arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    # Where the toolkit's programs are if nobody put them on the path.
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), str(toolkit)])
    facts, log, outcomes = device_facts(), out / "log.txt", []
    log.write_bytes(b"")
    print(json.dumps(facts), flush=True)
    gpu = facts.get("gpu")
    for stage in stages(out, str(facts.get("capability"))):
        if arguments.only and stage.name not in arguments.only:
            continue
        left = arguments.budget - RESERVE_S - (time.monotonic() - started)
        reason = "" if gpu else str(facts.get("error") or "no CUDA device")
        reason = "; ".join(filter(None, [reason, missing(stage), "" if left > 5 else "no time is left"]))
        if reason:
            outcome = Outcome(stage.name, "skipped", why=reason)
        else:
            stage.command = [part.replace("{device}", device_folder(str(gpu))) for part in stage.command]
            outcome = run(stage, min(stage.limit_s, left), log)
        outcomes.append(outcome)
        print(f"{outcome.status:10s}{outcome.name:16s}{outcome.seconds:7.1f} s  {outcome.why}", flush=True)
        if outcome.status in ("failed", "timed out"):
            print("\n".join(f"    {line}" for line in outcome.tail[-12:]), flush=True)
        record = {
            "facts": facts,
            "seconds": round(time.monotonic() - started, 1),
            "stages": list(map(asdict, outcomes)),
        }
        (out / "stages.json").write_text(json.dumps(record, indent=1) + "\n")
    if not gpu:
        print(f"nothing was run: {facts.get('error') or 'no CUDA device'}")
    return int(not gpu or any(outcome.status in ("failed", "timed out") for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
