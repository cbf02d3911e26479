"""One wheel under several releases of torch: built once, its CPU ops are compared with the reference under each.

``FREE_KERNELS_TORCH_PYTHONS`` lists Pythons with other builds of torch, separated as in ``PATH``; without it those of
``.venv-*`` in the checkout are taken, which ``make cuda-build`` and ``make wheel-check`` set up.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from packing_inputs import make_commit, make_pack
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]
ABOUT = (
    "import json, sys, torch; print(json.dumps([list(sys.version_info[:2]), torch.__version__, torch.version.cuda]))"
)
pytestmark = [
    pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source checkout"),
    pytest.mark.slow,
]


def other_pythons() -> list[str]:
    listed = os.environ.get("FREE_KERNELS_TORCH_PYTHONS")
    if listed is not None:
        return [path for path in listed.split(os.pathsep) if path]
    return sorted(str(path) for path in ROOT.glob(".venv-*/bin/python"))


PYTHONS = other_pythons() or [
    pytest.param("", marks=pytest.mark.skip(reason="no other torch: FREE_KERNELS_TORCH_PYTHONS, or make wheel-check"))
]


def run_any(*command: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name not in ("FREE_KERNELS_NO_EXT", "PYTHONPATH")}
    return subprocess.run(
        list(map(str, command)), cwd=cwd, env=inherited | environment, capture_output=True, text=True, timeout=900
    )


def run(*command: object, cwd: Path, **environment: str) -> str:
    result = run_any(*command, cwd=cwd, **environment)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def about(python: str, cwd: Path) -> tuple[tuple[int, int], str, str | None]:
    version, torch_version, cuda = json.loads(run(python, "-c", ABOUT, cwd=cwd))
    return tuple(version), torch_version, cuda


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of this environment's torch, unpacked."""
    folder = tmp_path_factory.mktemp("wheel")
    left_out = shutil.ignore_patterns(".*", "build", "dist", "outputs", "runs", "tests", "docs", "*.egg-info", "*.so")
    shutil.copytree(ROOT, folder / "source", ignore=left_out)
    pip = ("-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir")
    run(sys.executable, *pip, folder / "built", ".", cwd=folder / "source")
    (built,) = (folder / "built").iterdir()
    with zipfile.ZipFile(built) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> Path:
    tensors: dict[str, torch.Tensor] = {}
    latents = [(4, 8, 8), (1, 3, 5), (3, 1, 1)]
    made: list[dict[str, Any]] = [
        make(seed, slots, draft_length, latent, last)
        for seed, (slots, draft_length, latent) in enumerate(itertools.product((1, 3, 17), (1, 6), latents))
        for make, last in ((make_pack, seed % 3), (make_commit, 1 + seed % 2))
    ]
    for number, case in enumerate(made):
        for name, value in case.items():
            tensors[f"{number}.{name}"] = value if isinstance(value, torch.Tensor) else torch.tensor(value)
    path = tmp_path_factory.mktemp("cases") / "cases.safetensors"
    save_file(tensors, path)
    return path


def compare(python: str, site: Path, cases: Path, cwd: Path) -> dict[str, Any]:
    worker = Path(__file__).parents[1].joinpath("workers", "wheel_worker.py")
    result = json.loads(run(python, worker, site, cases, cwd=cwd, OMP_NUM_THREADS="1"))
    assert result["cases"] == 36
    return result


@pytest.mark.parametrize("python", PYTHONS)
def test_one_wheel_under_another_release(python, wheel, cases, tmp_path):
    version, torch_version, _ = about(python, tmp_path)
    if version != sys.version_info[:2]:
        pytest.skip(f"the wheel is for Python {sys.version_info[0]}.{sys.version_info[1]}, {python} is {version}")
    if torch_version == torch.__version__:
        pytest.skip(f"the wheel was built under the same torch {torch_version}")
    result = compare(python, wheel, cases, tmp_path)
    print(f"built under torch {torch.__version__}, compared under {torch_version}")
    assert result["torch"] == torch_version
    assert result["built"] == torch.__version__.partition("+")[0]
    assert not result["cuda"]


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.skipif(torch.version.cuda is not None, reason="needs a CPU build of torch here")
def test_a_cuda_build_keeps_its_cpu_ops_under_a_cpu_torch(python, cases, tmp_path):
    _, torch_version, cuda = about(python, tmp_path)
    find = "import pathlib, free_kernels; print(pathlib.Path(free_kernels.__file__).parent)"
    found = run_any(python, "-c", find, cwd=tmp_path)
    if found.returncode or not list(Path(found.stdout.strip()).glob("_C_cuda.*")):
        pytest.skip(f"{python} holds no free_kernels with CUDA ops (torch {torch_version}, CUDA {cuda})")
    shutil.copytree(found.stdout.strip(), tmp_path / "site" / "free_kernels")
    result = compare(sys.executable, tmp_path / "site", cases, tmp_path)
    assert result["built"] == torch_version.partition("+")[0]
    assert not result["cuda"]
    assert result["why_no_cuda"].endswith(f"torch {torch.__version__} is not a CUDA build")
