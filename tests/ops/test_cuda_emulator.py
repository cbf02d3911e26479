"""The CUDA packing kernels, run on a CPU by ``cuda_emulator/``, against the reference; planted faults are found."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from cuda_emulator_worker import DTYPES, ROUNDS

HERE = Path(__file__).resolve().parents[1]
SOURCE = HERE.parent / "csrc" / "cuda" / "packing_kernels.cu"
COMPILER = shlex.split(os.environ.get("CXX") or "c++")
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
ENTRY_POINTS = """
extern "C" void seed_emulator(uint64_t seed) { emulator::machine.random = seed; }
extern "C" int emulate_pack(const free_kernels::PackLaunch* launch) {
  return free_kernels::launch_pack(*launch, nullptr);
}
extern "C" int emulate_commit(const free_kernels::CommitLaunch* launch) {
  return free_kernels::launch_commit(*launch, nullptr);
}
extern "C" int size_of_PackLaunch() { return sizeof(free_kernels::PackLaunch); }
extern "C" int size_of_CommitLaunch() { return sizeof(free_kernels::CommitLaunch); }
"""
# By name: what is replaced, by what, and what the worker then says. A pattern that ends in "*" needs the sanitizers.
FAULTS = {
    "missing_barrier": ("  __syncthreads();\n", "", "differs: pack_drafts|AddressSanitizer|runtime error"),
    "early_exit_before_a_ballot": (
        "    const bool exists = s < a.slots;\n",
        "    const bool exists = s < a.slots;\n    if (!exists) break;\n",
        "a warp operation that its lanes do not all reach",
    ),
    "row_of_the_next_draft": ("a.row_offsets[s] + count - 1 : -1", "a.row_offsets[s] + count : -1", "commit_drafts"),
    "label_of_the_row": (
        "a.y[row] = used ? a.labels[slot]",
        "a.y[row] = used ? a.labels[row % a.slots]",
        "pack_drafts",
    ),
    "scan_stops_at_the_row": ("(writes_offsets || before <= row)", "(writes_offsets || before < row)", "pack_drafts"),
    "image_taken_twice": ("(1u << lane) - 1)", "(1u << lane) / 2)", "commit_drafts"),
    "one_unit_too_many": ("i < count; i += stride", "i <= count; i += stride", "AddressSanitizer*"),
    "step_not_clamped": (
        "clamp(a.steps[slot] + position, 0, a.num_steps - 1)",
        "a.steps[slot] + position",
        "AddressSanitizer|runtime error*",
    ),
    "image_not_checked": (" && image < a.num_images", "", "differs: commit_drafts|AddressSanitizer|runtime error"),
    "offset_in_32_bits": ("index * bytes", "static_cast<uint32_t>(index * bytes)", "differs: |AddressSanitizer"),
}


def output_of(*command: str | Path) -> str | None:
    """What a program prints; None if it fails or is not there."""
    try:
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None


def preloads() -> list[str]:
    """The libraries that a process with sanitized code must begin with; none where there are no sanitizers."""
    found = [
        (output_of(*COMPILER, f"-print-file-name={name}") or "").strip() for name in ("libasan.so", "libstdc++.so.6")
    ]
    return found if all(Path(path).is_absolute() and Path(path).exists() for path in found) else []


def compiler_options(folder: Path, sanitized: bool) -> list[str]:
    """Of all libraries in a folder, for which the runtime's header is compiled once."""
    header = folder / "cuda_runtime_api.h"
    shutil.copy(HERE / "cuda_emulator" / header.name, header)
    options = ["-std=c++20", "-O1", "-g1", "-fPIC", *(SANITIZE if sanitized else [])]
    compile_with(*options, "-x", "c++-header", header, "-o", f"{header}.gch")
    return [*options, "-shared", f"-I{folder}", f"-I{SOURCE.parent}", "-include", header.name]


def compile_with(*arguments: str | Path) -> None:
    done = subprocess.run([*COMPILER, *(str(argument) for argument in arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def compile_kernels(folder: Path, name: str, source: str, options: list[str]) -> Path:
    """A library of the kernels, whose launches go to the emulator."""
    launches = re.compile(r"(\w+)<<<([^<>]+), ([^<>]+), 0, stream>>>\((\w+)\);")
    source, count = launches.subn(r"emulator::launch(\1, \2, \3, \4);", source)
    assert count == 3
    assert "<<<" not in source
    path, library = folder / f"{name}.cpp", folder / f"{name}.so"
    path.write_text(source + ENTRY_POINTS)
    compile_with(*options, path, "-o", library)
    return library


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the worker says of the kernels as they are (``kernels``), and of each faulty copy."""
    if not SOURCE.exists():
        pytest.skip("needs the source checkout")
    if shutil.which(COMPILER[0]) is None:
        pytest.skip(f"needs a C++ compiler: {COMPILER[0]} was not found")
    if not sys.platform.startswith("linux"):
        pytest.skip("the emulator relies on Linux's linker and fibers")
    folder, preloaded, original = tmp_path_factory.mktemp("emulator"), preloads(), SOURCE.read_text()
    sources = {"kernels": original}
    for name, (old, new, expected) in FAULTS.items():
        assert old in original, f"{name}: the kernels have changed"
        if preloaded or not expected.endswith("*"):
            sources[name] = original.replace(old, new)
    options = compiler_options(folder, bool(preloaded))
    with ThreadPoolExecutor(2) as pool:
        libraries = list(pool.map(lambda item: compile_kernels(folder, *item, options), sources.items()))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    if preloaded:
        # The interpreter itself is not built with the sanitizers and leaks what it holds until it ends.
        environment |= {"LD_PRELOAD": " ".join(preloaded), "ASAN_OPTIONS": "detect_leaks=0:handle_abort=0"}
    command = [sys.executable, HERE / "workers" / "cuda_emulator_worker.py", SOURCE.with_suffix(".h"), *libraries]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    found = {run["library"]: run for run in map(json.loads, done.stdout.splitlines())}
    return {"sanitized": bool(preloaded)} | found


def test_kernels_equal_the_reference(runs):
    run = runs["kernels"]
    assert run["status"] == 0, run["said"]
    found = run["found"]
    # The rounds are worth the name: of every dtype and alignment, with images that end, enter and stay.
    assert sum(found[str(dtype)] for dtype in DTYPES) == found["aligned"] + found["unaligned"] == ROUNDS
    assert min(found["aligned"], found["unaligned"], *(found[str(dtype)] for dtype in DTYPES)) >= ROUNDS // 8
    assert min(found[name] for name in ("ended", "entered", "left_alone", "ended_wild", "left_alone_wild")) >= 20
    if not found.get("far"):
        pytest.skip("the rest agrees; too few addresses for tensors of more than 4 GiB")


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_found(runs, name):
    if name not in runs:
        pytest.skip("needs the address sanitizer, which the compiler lacks")
    expected = FAULTS[name][2].rstrip("*")
    assert runs[name]["status"] != 0
    assert re.search(expected, runs[name]["said"]), runs[name]["said"]
