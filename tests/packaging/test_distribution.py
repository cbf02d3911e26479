"""What users install: the sdist, and wheels built from it, in processes that cannot see the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source checkout"),
    pytest.mark.slow,
]
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


def run(*command: object, cwd: Path, **environment: str) -> str:
    inherited = {name: value for name, value in os.environ.items() if name not in ("FREE_KERNELS_NO_EXT", "PYTHONPATH")}
    result = subprocess.run(
        list(map(str, command)), cwd=cwd, env=inherited | environment, capture_output=True, text=True, timeout=900
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


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


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="needs a C++ compiler")
def test_a_compiled_wheel_of_the_sdist(unpacked, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(unpacked, source, ignore=shutil.ignore_patterns("build", "*.egg-info"))
    check_wheel(backend("build_wheel", source, tmp_path / "built"), tmp_path, "extension")
