"""Checks the CUDA sources without a GPU or a CUDA build of torch: build their module, forbid spills, look for the ops.

``setup.py`` itself compiles and links, with its own flags and ninja files; nvcc is asked for the compiler's report on
top. Under a CPU build of torch the module is linked to that: the sources use its stable ABI only, so it loads and
registers there too, beside the CPU module that is installed. Nothing is launched.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "csrc"))
from toolkit import Toolkit, find_toolkit  # noqa: E402

OPS = ("pack_drafts", "commit_drafts")
# A CPU build of torch says here that it is a CUDA build, and is otherwise left as it is.
BUILD = """
import runpy, sys, torch
torch.version.cuda = sys.argv.pop(1)
sys.path.insert(0, ".")
runpy.run_path("setup.py", run_name="__main__")
"""
# Before it: the CPU module is there already.
ONLY_CUDA = """
import setuptools
own = setuptools.setup
def setup(**settings):
    own(**settings | {"ext_modules": [m for m in settings["ext_modules"] if m.name.endswith("._C_cuda")]})
setuptools.setup = setup
"""
# Symbols of libtorch_cuda are absent from a CPU build of torch; lazily bound, they are missed only when called.
LOAD = """
import importlib.util, os, sys, torch
try:
    import free_kernels._C
except ImportError as error:
    sys.exit(f"the CPU module must be built first (make setup): {error}")
sys.setdlopenflags(os.RTLD_LAZY | os.RTLD_LOCAL)
spec = importlib.util.spec_from_file_location("_C_cuda", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
has = torch._C._dispatch_has_kernel_for_dispatch_key
missing = [f"{op}/{key}" for op in sys.argv[2:] for key in ("CPU", "CUDA") if not has(f"free_kernels::{op}", key)]
print("compiled for", ", ".join(module.cuda_arch_list()))
sys.exit(f"no implementation registered: {', '.join(missing)}" if missing else 0)
"""


def run(command: list[str | Path], **environment: str) -> str:
    """Run a command in the root and return its output; on failure show it and stop."""
    result = subprocess.run(
        [str(part) for part in command], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )
    if result.returncode:
        print(result.stdout + result.stderr, file=sys.stderr)
        sys.exit(f"nvcc-check: failed: {Path(str(command[0])).name} {command[-1]}")
    return result.stdout + result.stderr


def build(folder: Path, cuda: str, **environment: str) -> str:
    """Build the module into ``folder/lib`` as for a torch of CUDA version ``cuda``; return the build's output.

    Its ninja file and objects are in ``folder/temp``. ``environment`` is added to the process's own.
    """
    libraries = folder / "stub"
    libraries.mkdir(parents=True)
    # The linker wants the library by name. It is needed for no symbol, so that nothing in the result refers to it.
    run([os.environ.get("CXX") or "c++", "-shared", "-x", "c", os.devnull, "-o", libraries / "libtorch_cuda.so"])
    search = os.pathsep.join(filter(None, (os.environ.get("LIBRARY_PATH"), str(libraries))))
    command = [sys.executable, "-c", ONLY_CUDA + BUILD, cuda, "build_ext"]
    command += ["--build-temp", folder / "temp", "--build-lib", folder / "lib"]
    return run(command, LIBRARY_PATH=search, **environment)


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


def check(toolkit: Toolkit, folder: Path) -> None:
    """Build in ``folder``, report, and load."""
    flags = f"{os.environ.get('NVCC_APPEND_FLAGS', '')} -Xptxas=-v"
    spills = report(build(folder, toolkit.version, CUDA_HOME=str(toolkit.home), NVCC_APPEND_FLAGS=flags))
    if spills:
        sys.exit(f"nvcc-check: {len(spills)} kernels spill registers")
    found = list(folder.glob("lib/free_kernels/_C_cuda.*"))
    if len(found) != 1:
        sys.exit("nvcc-check: _C_cuda was not built")
    print(run([sys.executable, "-c", LOAD, *found, *OPS]).strip())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--allow-missing", action="store_true", help="succeed where there is no toolkit")
    arguments = parser.parse_args()
    import torch

    found = find_toolkit(torch.version.cuda)
    if not isinstance(found, Toolkit):
        print(f"nvcc-check: {'skipped' if arguments.allow_missing else 'failed'}: {found}", file=sys.stderr)
        sys.exit(0 if arguments.allow_missing else 2)
    with tempfile.TemporaryDirectory() as folder:
        check(found, Path(folder))
    print(f"nvcc-check: {', '.join(OPS)} compile, link and register for CUDA")


if __name__ == "__main__":
    main()
