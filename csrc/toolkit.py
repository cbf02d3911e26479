"""Finds the CUDA toolkit that the CUDA module can be built with, or says in one line what is missing."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

NVCC = "bin/nvcc"
HEADER = "include/cuda_runtime_api.h"
USUAL_FOLDERS = ("/usr/local/cuda", "/usr/local/cuda-*", "/opt/cuda", "/usr/lib/cuda")
# Datacentre and consumer GPUs from Ampere to Blackwell; PTX of the last lets later ones compile it for themselves.
ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
PROBE = "#include <cuda_runtime_api.h>\n__global__ void probe() {}\nvoid launch() { probe<<<1, 1>>>(); }\n"


@dataclass(frozen=True)
class Toolkit:
    """A folder with nvcc and the runtime's headers, and the version that its nvcc gives, as ``"13.0"``."""

    home: Path
    version: str

    @property
    def major(self) -> str:
        """``"13"`` of ``"13.0"``."""
        return self.version.split(".")[0]

    @property
    def library_dir(self) -> Path:
        """Folder of ``libcudart_static.a``."""
        folders = [self.home / name for name in ("lib64", "lib", "lib/x86_64-linux-gnu", "lib/aarch64-linux-gnu")]
        return next((path for path in folders if (path / "libcudart_static.a").exists()), folders[0])

    def architectures(self) -> str:
        """``TORCH_CUDA_ARCH_LIST`` of those of ARCHITECTURES that this nvcc compiles for."""
        listed = output([str(self.home / NVCC), "--list-gpu-code"])
        known = [name for name in ARCHITECTURES if f"sm_{name.replace('.', '')}\n" in f"{listed}\n"]
        return ";".join(known) + "+PTX" if known else ""


def output(command: list[str]) -> str:
    """What a command prints on stdout and stderr, or nothing where it cannot be run."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return (result.stdout + result.stderr).strip()


def candidates(major: str | None) -> Iterator[Path]:
    """Folders that may be a toolkit, likeliest first; ``CUDA_HOME`` or ``CUDA_PATH`` alone where one is set."""
    chosen = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if chosen:
        yield Path(chosen)
        return
    on_path = shutil.which("nvcc")
    if on_path:
        yield Path(on_path).resolve().parents[1]
        # A wrapper lies elsewhere than the nvcc that it calls, which names its own folder.
        top = re.search(r"^#\$ TOP=(.+)$", output([on_path, "--dryrun", "-x", "cu", "-c", os.devnull]), re.MULTILINE)
        if top:
            yield Path(top[1]).resolve()
    for pattern in USUAL_FOLDERS:
        yield from sorted(Path("/").glob(pattern[1:]), reverse=True)
    for packages in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        yield from sorted(Path(packages, "nvidia").glob(f"cu{major or '[0-9]*'}"), reverse=True)


def probe(toolkit: Toolkit) -> str | None:
    """Compile and link a kernel; why that fails, or None."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cu")
        source.write_text(PROBE)
        command = [str(toolkit.home / NVCC), "-shared", "-Xcompiler=-fPIC", "-cudart=static", "-o"]
        command += [str(Path(folder, "probe.so")), str(source), *host_compiler()]
        try:
            result = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            return str(error.strerror)
    lines = (result.stderr + result.stdout).strip().splitlines() or ["no message"]
    worst = next((line for line in lines if "error" in line.lower()), lines[0])
    return worst.replace(folder + "/", "") if result.returncode else None


def host_compiler() -> list[str]:
    """nvcc's option for the host compiler where ``CC`` chooses one, as torch.utils.cpp_extension passes it."""
    chosen = os.environ.get("CC")
    return ["-ccbin", shlex.split(chosen)[0]] if chosen else []


def find_toolkit(torch_cuda: str | None) -> Toolkit | str:
    """The toolkit for a torch built for CUDA ``torch_cuda`` (None: any), or what is missing and what to install."""
    wanted = torch_cuda.split(".")[0] if torch_cuda else None
    # How far each folder came, so that the nearest to a usable one is reported.
    problems: list[tuple[int, str]] = []
    for home in dict.fromkeys(candidates(wanted)):
        has_nvcc, has_header = (home / NVCC).exists(), (home / HEADER).exists()
        if not has_nvcc and not has_header:
            continue
        if not (has_nvcc and has_header):
            held, lacked = (NVCC, HEADER) if has_nvcc else (HEADER, NVCC)
            problems.append((0, f"{home} holds {held} but no {lacked}"))
            continue
        release = re.search(r"release (\d+\.\d+)", output([str(home / NVCC), "--version"]))
        if release is None:
            problems.append((1, f"{home / NVCC} does not say its version"))
            continue
        toolkit = Toolkit(home, release[1])
        if wanted not in (None, toolkit.major):
            problems.append((2, f"{home} is CUDA {toolkit.version}, and torch was built for {torch_cuda}"))
            continue
        failure = probe(toolkit)
        if failure is None:
            return toolkit
        problems.append((3, f"the nvcc of {home} cannot build a kernel ({failure})"))
    chosen = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    problems.append((-1, f"{chosen} holds neither {NVCC} nor {HEADER}" if chosen else "no CUDA toolkit was found"))
    nearest = max(problems, key=lambda problem: problem[0])[1]
    name = f"CUDA {wanted} toolkit" if wanted else "CUDA toolkit"
    return f"{nearest}; install the {name} (nvcc and the runtime's headers), or set CUDA_HOME to it"
