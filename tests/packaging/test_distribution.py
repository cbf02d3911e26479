"""What users install: the sdist, and wheels built from it, in processes that cannot see the checkout.

The compiled wheel is built once, and its CPU ops are compared with the reference under several releases of torch.
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
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from packing_inputs import make_commit, make_pack
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source checkout"),
    pytest.mark.slow,
]
ABOUT = (
    "import json, sys, torch; print(json.dumps([list(sys.version_info[:2]), torch.__version__, torch.version.cuda]))"
)
LEFT_OUT = (".git", ".venv*", ".hypothesis", ".*_cache", "__pycache__", "build", "dist", "outputs", "runs")

USE = """
import sys
from pathlib import Path
site, checkout = sys.argv[1:]
# An editable install would lead back to the checkout.
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in str(finder)]
sys.path = [site] + [path for path in sys.path if path and not Path(path).is_relative_to(checkout + "/python")]
sys.path = [path for path in sys.path if path != checkout]
import torch, free_dit, free_kernels
from free_kernels import extension
target, drafter = free_dit.load_bundled("digits")
schedule = free_kernels.DDPMSchedule(10)
result = free_kernels.sample(target, torch.arange(3), schedule=schedule, drafter=drafter, guidance_scale=2.0)
assert result.samples.shape == (3, 1, 8, 8) and result.samples.isfinite().all()
for name, module in list(sys.modules.items()):
    if name.partition(".")[0] in ("free_kernels", "free_dit") and getattr(module, "__file__", None):
        assert Path(module.__file__).is_relative_to(site), (name, module.__file__)
print("extension" if extension.has_extension() else "pure", free_kernels.__version__)
"""


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


def backend(hook: str, source: Path, out: Path, **environment: str) -> Path:
    """What ``python -m build --no-isolation`` calls."""
    out.mkdir()
    code = f"import sys, setuptools.build_meta as backend; backend.{hook}(sys.argv[1])"
    run(sys.executable, "-c", code, out, cwd=source, **environment)
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    shutil.copytree(ROOT, folder / "checkout", ignore=shutil.ignore_patterns(*LEFT_OUT, "*.egg-info", "*.so"))
    return backend("build_sdist", folder / "checkout", folder / "built", FREE_KERNELS_NO_EXT="1")


@pytest.fixture(scope="module")
def unpacked(sdist, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (root,) = folder.iterdir()
    return root


def tracked(folder: Path, *patterns: str) -> set[str]:
    return {str(path.relative_to(folder)) for pattern in patterns for path in folder.rglob(pattern) if path.is_file()}


def test_the_sdist_holds_what_a_build_needs(unpacked):
    for name in ("LICENSE", "README.md", "pyproject.toml", "setup.py"):
        assert (unpacked / name).is_file()
    assert tracked(unpacked / "csrc", "*.cpp", "*.cu", "*.h") == tracked(ROOT / "csrc", "*.cpp", "*.cu", "*.h")
    assert (unpacked / "python/free_dit/models/digits/model.safetensors").is_file()
    assert not list(unpacked.rglob("*.so"))


def check_wheel(wheel: Path, tmp_path: Path, kind: str) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {"free_kernels", "free_dit"}
    kinds = ("*.py", "*.toml", "*.json", "*.safetensors", "*.md", "py.typed")
    wanted = {f"free_kernels/{name}" for name in tracked(ROOT / "free_kernels", *kinds)}
    wanted |= {f"free_dit/{name}" for name in tracked(ROOT / "python/free_dit", *kinds)}
    assert {"free_kernels/py.typed", "free_dit/py.typed", "free_dit/models/digits/MODEL_CARD.md"} <= wanted
    assert wanted <= names
    extra = {name for name in names - wanted if ".dist-info/" not in name}
    modules = {Path(name).name.partition(".")[0] for name in extra}
    # A CUDA build of torch with a toolkit adds the CUDA ops.
    assert modules - ({"_C_cuda"} if torch.version.cuda else set()) == ({"_C"} if kind == "extension" else set())
    assert [name for name in names if name.endswith("licenses/LICENSE")]
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site)
    run(sys.executable, *pip, wheel, cwd=elsewhere)
    assert run(sys.executable, "-c", USE, site, ROOT, cwd=elsewhere).split()[0] == kind


def test_a_pure_wheel_of_the_sdist(unpacked, tmp_path):
    wheel = backend("build_wheel", unpacked, tmp_path / "built", FREE_KERNELS_NO_EXT="1")
    assert wheel.name.endswith("-py3-none-any.whl")
    check_wheel(wheel, tmp_path, "pure")


@pytest.fixture(scope="module")
def compiled(unpacked, tmp_path_factory) -> Path:
    """The wheel of this environment's torch."""
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("needs a C++ compiler")
    folder = tmp_path_factory.mktemp("compiled")
    shutil.copytree(unpacked, folder / "source", ignore=shutil.ignore_patterns("build", "*.egg-info"))
    return backend("build_wheel", folder / "source", folder / "built")


def test_a_compiled_wheel_of_the_sdist(compiled, tmp_path):
    check_wheel(compiled, tmp_path, "extension")


@pytest.fixture(scope="module")
def site(compiled, tmp_path_factory) -> Path:
    """The compiled wheel, unpacked."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(compiled) as archive:
        archive.extractall(folder)
    return folder


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
def test_one_wheel_under_another_release(python, site, cases, tmp_path):
    version, torch_version, _ = about(python, tmp_path)
    if version != sys.version_info[:2]:
        pytest.skip(f"the wheel is for Python {sys.version_info[0]}.{sys.version_info[1]}, {python} is {version}")
    if torch_version == torch.__version__:
        pytest.skip(f"the wheel was built under the same torch {torch_version}")
    result = compare(python, site, cases, tmp_path)
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
