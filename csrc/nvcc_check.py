"""Checks the CUDA sources without a GPU: compile for sm_80 and sm_90, forbid spills, link, load, and look for the ops.

The module is linked to the installed torch, which may be a CPU build: the sources use its stable ABI only, so they
load and register there too. Nothing is launched.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent
ARCHITECTURES = ("80", "90")
MACROS = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DFREE_KERNELS_CUDA", "-DUSE_CUDA"]
OPS = ("pack_drafts", "commit_drafts")
# Symbols of libtorch_cuda are absent from a CPU build of torch; lazily bound, they are missed only when called.
LOAD = """
import importlib.util, os, sys, torch
sys.setdlopenflags(os.RTLD_LAZY | os.RTLD_LOCAL)
spec = importlib.util.spec_from_file_location("_C", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
has = torch._C._dispatch_has_kernel_for_dispatch_key
missing = [f"{op}/{key}" for op in sys.argv[2:] for key in ("CPU", "CUDA") if not has(f"free_kernels::{op}", key)]
print(module.build_config())
sys.exit(f"no implementation registered: {', '.join(missing)}" if missing else 0)
"""


def run(command: list[str | Path]) -> str:
    """Run a command and return its output; on failure show it and stop."""
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if result.returncode:
        print(result.stdout + result.stderr, file=sys.stderr)
        sys.exit(f"nvcc-check: failed: {Path(str(command[0])).name} {command[-1]}")
    return result.stdout + result.stderr


def find_nvcc() -> Path | None:
    """nvcc of ``CUDA_HOME``, else of the path."""
    home = os.environ.get("CUDA_HOME")
    found = shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")
    return Path(found) if found else None


def kernel_name(mangled: str) -> str:
    """The part of a mangled name, written as its length and itself, that ends in ``_kernel``."""
    for length in re.finditer(r"(?=(\d{1,2})[A-Za-z_])", mangled):
        part = mangled[length.end(1) : length.end(1) + int(length[1])]
        if part.endswith("_kernel"):
            return part
    return mangled


def report(ptxas: str) -> list[str]:
    """Print one line per kernel and architecture from ``-Xptxas -v``; return the lines that show a spill."""
    spills = []
    pattern = re.compile(
        r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>\w+)'.*?"
        r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
        r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
        re.DOTALL,
    )
    for kernel in pattern.finditer(ptxas):
        shared = re.search(r"(\d+) bytes smem", kernel["rest"])
        spilled = int(kernel["stores"]) + int(kernel["loads"])
        line = (
            f"{kernel_name(kernel['name']):<24} {kernel['arch']}  {kernel['registers']:>3} registers  "
            f"{shared[1] if shared else 0:>5} B shared  {spilled} B spilled"
        )
        print(line)
        if spilled:
            spills.append(line)
    if not pattern.search(ptxas):
        sys.exit("nvcc-check: ptxas reported no kernel")
    return spills


def check(nvcc: Path, folder: Path) -> None:
    """Compile, report, link and load in ``folder``."""
    from torch.utils.cpp_extension import include_paths, library_paths

    includes = [f"-I{path}" for path in (*include_paths(), sysconfig.get_path("include"))]
    gencode = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES]
    # torch.utils.cpp_extension compiles with this standard; nvcc also knows where its own headers are.
    compile_object = [nvcc, "-c", "-std=c++20", "-Xcompiler=-fPIC,-fvisibility=hidden", *MACROS, *includes]
    objects, spills = [], []
    for source in sorted(ROOT.glob("**/*.cu")):
        objects.append(folder / f"{source.stem}.cu.o")
        ptxas = run([*compile_object, *gencode, "-O3", "-Xptxas", "-v", "-o", objects[-1], source])
        spills += report(ptxas)
    if spills:
        sys.exit(f"nvcc-check: {len(spills)} kernels spill registers")
    for source in sorted(ROOT.glob("**/*.cpp")):
        objects.append(folder / f"{source.parent.name}_{source.stem}.o")
        run([*compile_object, "-O0", "-o", objects[-1], source])
    module = folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    libraries = [f"-L{path}" for path in library_paths()] + ["-ltorch_cpu", "-ltorch", "-lc10"]
    run([nvcc, "-shared", "-cudart=static", "-o", module, *objects, *libraries])
    print(run([sys.executable, "-c", LOAD, module, *OPS]).strip())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--allow-missing", action="store_true", help="succeed where nvcc is not installed")
    arguments = parser.parse_args()
    nvcc = find_nvcc()
    if nvcc is None:
        print(f"nvcc-check: {'skipped' if arguments.allow_missing else 'failed'}: nvcc was not found", file=sys.stderr)
        sys.exit(0 if arguments.allow_missing else 2)
    with tempfile.TemporaryDirectory() as folder:
        check(nvcc, Path(folder))
    print(f"nvcc-check: {', '.join(OPS)} compile, link and register for CUDA")


if __name__ == "__main__":
    main()
