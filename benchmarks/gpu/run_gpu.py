"""Runs what needs a GPU, stage by stage, within a limited time: what ``run_gpu.sh CALL OUT`` calls.

Three calls of nine minutes, what matters first: ``a`` builds and checks, ``b`` measures, ``c`` has ablations and
profiles. Each builds first, unless this machine has done so, and nothing after a failed build is run. Results, in at
most eight files: ``OUT/summary_CALL.json`` (how each stage ended: ok, failed, cut or skipped, why, seconds, figures),
``OUT/log_CALL.txt`` (output), ``OUT/*.json`` and ``OUT/<device>/*.json`` (figures, as ``report.py`` reads them from
``benchmarks/results``; ``run_gpu.py collect OUT ...`` merges them into it). A stage that is cut keeps what it wrote.
Packages are not installed from elsewhere: a stage that lacks one, or a tool, is skipped and says which.

``--dry-run`` runs every stage of a call on the CPU, as short as can be: no figures, but the same order and files.

Exit status: 0 if every stage is ok; 1 if one failed, or nothing could be run; 3 if one was cut or skipped.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.gpu.gpu_runner import ROOT, Runner
from benchmarks.gpu.gpu_stages import CALL_S, CALLS, Stages

FACTS = """
import importlib.metadata, json, os, platform, shutil, torch
facts = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
facts |= {"cores": os.cpu_count(), "gpu": None, "capability": None}
names = ("triton", "numpy", "setuptools", "ninja", "pybind11", "pytest", "pytest-benchmark", "hypothesis")
names += ("safetensors", "tqdm")
for name in names:
    try:
        facts[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        facts[name] = None
facts |= {tool: shutil.which(tool) for tool in ("nvcc", "c++", "compute-sanitizer")}
if torch.cuda.is_available():
    facts["gpu"] = torch.cuda.get_device_name()
    facts["capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
    facts["memory_gib"] = round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)
print(json.dumps(facts))
"""
# What is done without, said at the start: a stage that cannot do without a package says so itself.
WITHOUT = {
    "ninja": "the build compiles one file after the other",
    "pybind11": "the build takes torch's own copy of its headers",
    "pytest-benchmark": "benchmarks of single ops are skipped",
    "pytest": "tests and benchmarks of single ops are skipped",
    "hypothesis": "tests are skipped",
    "triton": "nothing but the build is run",
    "safetensors": "tests and whole runs of the sampler are skipped",
    "tqdm": "tests and whole runs of the sampler are skipped",
    "compute-sanitizer": "the memory checker is skipped",
    "nvcc": "the build looks for a toolkit in CUDA_HOME, and fails where there is none",
}


def device_facts() -> dict[str, Any]:
    """Versions, tools and the GPU, from a process of its own; ``{"error": ...}`` if torch cannot be used."""
    try:
        found = subprocess.run([sys.executable, "-c", FACTS], capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return {"error": "importing torch took longer than 60 s"}
    if found.returncode:
        return {"error": (found.stderr.strip().splitlines() or ["no message"])[-1]}
    return json.loads(found.stdout.splitlines()[-1])


def device_folder(gpu: str) -> str:
    """The folder's name that ``store.device_slug`` gives, without importing torch."""
    return "-".join("".join(x if x.isascii() and x.isalnum() else " " for x in gpu.lower()).split())


def stage_environment(scratch: Path, facts: dict[str, Any]) -> dict[str, str]:
    """The environment of every stage: this checkout's packages, and one cache for whatever is compiled."""
    # Switches of the library that would hide what is to be tested.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("FREE_KERNELS_", "TRITON_"))}
    paths = [str(ROOT), str(ROOT / "python"), *filter(None, [os.environ.get("PYTHONPATH")])]
    made = {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "TRITON_CACHE_DIR": str(scratch / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),
    }
    if facts.get("capability"):
        made["TORCH_CUDA_ARCH_LIST"] = os.environ.get("TORCH_CUDA_ARCH_LIST", str(facts["capability"]))
    return inherited | made


def run_call(call: str, out: Path, budget_s: float, dry: bool, only: list[str] | None) -> int:
    """One call; returns its exit status."""
    # Where the toolkit's programs are if nobody put them on the path.
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), str(toolkit)])
    with tempfile.TemporaryDirectory() as temporary:
        # On a GPU machine the next call finds what this one compiled, as long as the machine is held.
        scratch = Path(temporary) if dry else ROOT / "build" / "gpu"
        scratch.mkdir(parents=True, exist_ok=True)
        # Made first: its clock counts the facts too.
        runner = Runner(out, call, {}, out / "cpu", {})
        facts = runner.facts = device_facts()
        print(json.dumps(facts), flush=True)
        for name, consequence in WITHOUT.items():
            if "error" not in facts and facts.get(name) is None:
                print(f"without {name}: {consequence}", flush=True)
        gpu = facts.get("gpu")
        refusal = str(facts.get("error") or ("" if gpu or dry else "no CUDA device"))
        if gpu and not dry:
            runner.device_folder = out / device_folder(str(gpu))
        runner.environment = stage_environment(scratch, facts)
        plan = Stages(out, "cpu" if dry else "cuda", scratch).plan(call)
        if only:
            plan = [kept for group in plan if (kept := [stage for stage in group if stage.name in only])]
        status = runner.run(plan, budget_s, refusal)
        if refusal:
            print(f"nothing was run: {refusal}")
        return status


def main() -> int:
    """Command line; returns the exit status."""
    if sys.argv[1:2] == ["collect"]:
        from benchmarks.gpu.gpu_collect import collect

        return collect([Path(name) for name in sys.argv[2:]])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("call", choices=list(CALLS), help="; ".join(f"{name}: {what}" for name, what in CALLS.items()))
    parser.add_argument("out", type=Path, help="folder for results")
    parser.add_argument("--budget", type=float, default=CALL_S, help="seconds for everything; %(default)s")
    parser.add_argument("--only", nargs="*", help="names of stages; all of them")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, as short as can be")
    arguments = parser.parse_args()
    # Stages are in sessions of their own: they would outlive a run that is told to end.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    return run_call(arguments.call, arguments.out.resolve(), arguments.budget, arguments.dry_run, arguments.only)


if __name__ == "__main__":
    sys.exit(main())
