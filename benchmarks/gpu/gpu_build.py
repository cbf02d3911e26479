"""Installs the package as the README says, and fails unless the compiled ops of a device are registered and work.

``pip install --no-build-isolation .`` into a folder of its own, so that nothing installed is changed; the modules that
it compiled are then put beside this checkout's sources, from which tests and benchmarks run. Where they are there
already, made from the same sources for the same torch, nothing is done. With ``--device cpu`` only the installation is
tried.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "free_kernels"
# Run where only the installation can be imported, or only the checkout.
CHECK = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import free_kernels
from free_kernels import extension
from free_kernels.ops.packing import pack_drafts
device = sys.argv[2]
assert free_kernels.__file__.startswith(sys.argv[1]), f"imported from {free_kernels.__file__}"
ops = extension.CUDA_OPS if device == "cuda" else extension.OPS
missing = [f"{op}: {why}" for op in ops if (why := extension.why_no_kernel(op, device)) is not None]
if missing:
    sys.exit(f"no compiled op for {device} tensors: " + "; ".join(missing))
modules = {name: module.__file__ for name, module in sys.modules.items() if name.startswith("free_kernels._C")}
# An editable installation of another checkout offers its modules to whatever package lacks them.
foreign = [path for path in modules.values() if not path.startswith(sys.argv[1])]
if foreign or not modules:
    sys.exit(f"compiled modules of another place: {foreign}")
print("figures:", __import__("json").dumps({"build": extension.build_config()}))
states, lengths = torch.randn(2, 3, 1, 2, 2), torch.tensor([3, 1])
steps, times = torch.tensor([0, 2]), torch.arange(9)
both = []
for place, backend in (("cpu", "reference"), (device, "extension")):
    tensors = [x.to(place) for x in (states, lengths, steps, steps, times)]
    both.append([x.cpu() for x in pack_drafts(*tensors, 4, None, backend=backend)])
if not all(map(torch.equal, *both)):
    sys.exit("pack_drafts differs from the reference")
print("registered and working:", ", ".join(ops), "for", device)
"""


def environment() -> dict[str, str]:
    """This process's, without what would leave compiled ops out or put this checkout before the installation."""
    found = {name: value for name, value in os.environ.items() if not name.startswith("FREE_KERNELS_")}
    # Packages that the machine has elsewhere stay.
    paths = [path for path in found.pop("PYTHONPATH", "").split(os.pathsep) if path]
    others = [path for path in paths if not Path(path).resolve().is_relative_to(ROOT)]
    return found | ({"PYTHONPATH": os.pathsep.join(others)} if others else {})


def check(place: Path, device: str, quiet: bool = False) -> bool:
    """Whether the package of a folder has its ops, in a fresh process."""
    # -P: the working directory is not searched.
    command = [sys.executable, "-P", "-c", CHECK, str(place), device]
    result = subprocess.run(command, env=environment(), capture_output=quiet)
    return result.returncode == 0


def stamp() -> str:
    """What the modules were made from: sources, interpreter, torch, architectures."""
    found = hashlib.sha256()
    sources = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cpp", ".h", ".cu", ".cuh", ".py"))
    for path in (*sources, ROOT / "setup.py"):
        found.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    torch = subprocess.run([sys.executable, "-c", "import torch; print(torch.__version__)"], capture_output=True)
    found.update(sys.version.encode() + torch.stdout + os.environ.get("TORCH_CUDA_ARCH_LIST", "").encode())
    return found.hexdigest()


def install(site: Path) -> int:
    """Install into a folder without looking for anything elsewhere; returns pip's exit status."""
    pip = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--verbose", "--disable-pip-version-check"]
    command = [*pip, "--no-index", "--no-deps", "--no-compile", "--target", str(site), str(ROOT)]
    print(" ".join(command), flush=True)
    return subprocess.run(command, env=environment(), cwd=site.parent).returncode


def adopt(site: Path) -> None:
    """Put the modules that an installation compiled beside the checkout's sources."""
    for old in PACKAGE.glob("_C*.so"):
        old.unlink()
    for new in (site / "free_kernels").glob("_C*.so"):
        shutil.copy2(new, PACKAGE)


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--scratch", type=Path, required=True, help="folder for the mark of a finished build")
    arguments = parser.parse_args()
    device, mark, made_from = arguments.device, arguments.scratch / "built", stamp()
    if device == "cuda" and mark.exists() and mark.read_text() == made_from and check(ROOT, device):
        print("built before from the same sources")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        site, began = Path(folder, "site"), time.monotonic()
        status = install(site)
        if status:
            print(f"build: pip ended with exit status {status}")
            return 1
        print(f"installed in {time.monotonic() - began:.0f} s", flush=True)
        if not check(site, device):
            print("build: the installation lacks its compiled ops")
            return 1
        if device == "cpu":
            return 0
        adopt(site)
    if not check(ROOT, device):
        print("build: the checkout lacks its compiled ops")
        return 1
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    mark.write_text(made_from)
    return 0


if __name__ == "__main__":
    sys.exit(main())
