"""What ``setup.py`` builds for which CUDA toolkit, with compilers that only write empty files."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source checkout")
sys.path.insert(0, str(ROOT / "csrc"))
toolkit = pytest.importorskip("toolkit", reason="needs the source checkout")
nvcc_check = pytest.importorskip("nvcc_check", reason="needs the source checkout")

# Writes what -o names; told to compile in any other way, it does nothing.
COMPILER = """#!/bin/sh
while [ $# -gt 1 ]; do
  if [ "$1" = -o ]; then : > "$2"; fi
  shift
done
"""
NVCC = """#!/bin/sh
echo "$@" >> {home}/calls
case "$1" in
  --version) echo "Cuda compilation tools, release {version}, V{version}.88" ;;
  --list-gpu-code) printf 'sm_75\\nsm_80\\nsm_90\\n' ;;
  --dryrun) echo '#$ TOP={home}/bin/..' >&2 ;;
  *) {action} ;;
esac
"""


def write_script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def make_toolkit(home: Path, version: str = "13.0", headers: bool = True, compiles: bool = True) -> Path:
    compiler = write_script(home / "bin" / "empty_object", COMPILER)
    action = f'{compiler} "$@"' if compiles else "echo 'probe.cu(1): error: no such GPU' >&2; exit 1"
    write_script(home / "bin" / "nvcc", NVCC.format(home=home, version=version, action=action))
    if headers:
        (home / "include").mkdir()
        (home / "include" / "cuda_runtime_api.h").touch()
    return home


@pytest.fixture
def bare(monkeypatch, tmp_path) -> Path:
    """No toolkit anywhere; returns the one folder of the path on which an nvcc may be put."""
    for name in ("CUDA_HOME", "CUDA_PATH", "CC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path / 'path' / 'bin'}{os.pathsep}/usr/bin{os.pathsep}/bin")
    monkeypatch.setattr(toolkit, "USUAL_FOLDERS", ())
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "site"))
    return tmp_path / "path" / "bin"


def test_cuda_home_is_honoured(bare, monkeypatch, tmp_path):
    make_toolkit(bare.parent)
    monkeypatch.setenv("CUDA_HOME", str(make_toolkit(tmp_path / "chosen", "13.2")))
    assert toolkit.find_toolkit("13.0") == toolkit.Toolkit(tmp_path / "chosen", "13.2")
    # It is the user's choice: nothing else is taken in its stead.
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nothing"))
    assert "nothing holds neither bin/nvcc" in toolkit.find_toolkit("13.0")


def test_nvcc_on_the_path(bare):
    make_toolkit(bare.parent)
    assert toolkit.find_toolkit("13.0") == toolkit.Toolkit(bare.parent, "13.0")


def test_a_link_to_nvcc_on_the_path(bare, tmp_path):
    home = make_toolkit(tmp_path / "cuda")
    bare.mkdir(parents=True)
    (bare / "nvcc").symlink_to(home / "bin" / "nvcc")
    assert toolkit.find_toolkit("13.0").home == home


def test_a_wrapper_on_the_path_is_followed(bare, tmp_path):
    home = make_toolkit(tmp_path / "cuda")
    write_script(bare / "nvcc", f'#!/bin/sh\nexec {home}/bin/nvcc "$@"\n')
    assert toolkit.find_toolkit("13.0").home == home


def test_the_usual_folder_that_suits_torch(bare, monkeypatch, tmp_path):
    make_toolkit(tmp_path / "cuda-12.9", "12.9")
    make_toolkit(tmp_path / "cuda-13.0", "13.0")
    monkeypatch.setattr(toolkit, "USUAL_FOLDERS", (f"{tmp_path}/cuda-*",))
    assert toolkit.find_toolkit("12.8").home == tmp_path / "cuda-12.9"
    assert toolkit.find_toolkit("13.0").home == tmp_path / "cuda-13.0"
    assert toolkit.find_toolkit(None).home == tmp_path / "cuda-13.0"


def test_pip_packages_that_hold_both(bare, tmp_path):
    make_toolkit(tmp_path / "site" / "nvidia" / "cu13")
    assert toolkit.find_toolkit("13.0").home == tmp_path / "site" / "nvidia" / "cu13"


REMEDY = "install the CUDA 13 toolkit (nvcc and the runtime's headers), or set CUDA_HOME to it"
UNUSABLE = {
    "absent": (None, "no CUDA toolkit was found"),
    "no headers": ({"headers": False}, "{home} holds bin/nvcc but no include/cuda_runtime_api.h"),
    "other major": ({"version": "12.8"}, "{home} is CUDA 12.8, and torch was built for 13.0"),
    "broken": ({"compiles": False}, "the nvcc of {home} cannot build a kernel (probe.cu(1): error: no such GPU)"),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_what_is_missing_is_said(bare, kind):
    made, problem = UNUSABLE[kind]
    if made is not None:
        make_toolkit(bare.parent, **made)
    assert toolkit.find_toolkit("13.0") == f"{problem.format(home=bare.parent)}; {REMEDY}"


def test_the_nearest_to_a_usable_one_is_reported(bare, monkeypatch, tmp_path):
    make_toolkit(bare.parent, headers=False)
    make_toolkit(tmp_path / "cuda-12.8", "12.8")
    monkeypatch.setattr(toolkit, "USUAL_FOLDERS", (f"{tmp_path}/cuda-*",))
    assert "cuda-12.8 is CUDA 12.8" in toolkit.find_toolkit("13.0")


def test_architectures_are_those_that_nvcc_knows(tmp_path):
    # 8.6, 8.9, 10.0 and 12.0 are not in this nvcc's list; the PTX of the last one serves later GPUs.
    assert toolkit.Toolkit(make_toolkit(tmp_path / "cuda"), "13.0").architectures() == "8.0;9.0+PTX"


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy, in a folder whose name contains what torch takes for a choice of architecture."""
    copy = tmp_path / "research"
    shutil.copytree(ROOT / "csrc", copy / "csrc", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "free_kernels/version.py"):
        (copy / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    return copy


def build(checkout: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """``setup.py build_ext`` as under a torch for CUDA 13.0."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("FREE_KERNELS_NO", "CUDA", "TORCH_CUDA", "CC", "CXX", "LDSHARED"))
    }
    compiler = write_script(checkout.parent / "compiler", COMPILER)
    environment = {"CXX": str(compiler), "TORCH_DONT_CHECK_COMPILER_ABI": "1"} | environment
    folders = ("--build-temp", str(checkout.parent / "temp"), "--build-lib", str(checkout.parent / "lib"))
    command = (sys.executable, "-c", nvcc_check.BUILD, "13.0", "build_ext", *folders, *options)
    return subprocess.run(
        command, cwd=checkout, env=inherited | environment, capture_output=True, text=True, timeout=300
    )


def built(checkout: Path) -> set[str]:
    return {path.name.partition(".")[0] for path in (checkout.parent / "lib").rglob("*.so")}


def test_both_modules_and_no_object_twice(checkout, tmp_path):
    result = build(checkout, "--parallel", "2", CUDA_HOME=str(make_toolkit(tmp_path / "cuda")))
    assert result.returncode == 0, result.stderr[-3000:]
    assert built(checkout) == {"_C", "_C_cuda"}
    assert "free_kernels: " not in result.stderr
    ninja = {path.parent.name: path.read_text() for path in (tmp_path / "temp").rglob("build.ninja")}
    assert set(ninja) == {"_C", "_C_cuda"}
    rules = [re.findall(r"^build (\S+): \w+ (\S+)$", text, re.MULTILINE) for text in ninja.values()]
    objects = [name for rule in rules for name, _ in rule]
    assert len(objects) == len(set(objects))
    assert all(Path(name).exists() for name in objects)
    compiled = {Path(source).relative_to(checkout / "csrc").as_posix() for rule in rules for _, source in rule}
    assert compiled == {path.relative_to(ROOT / "csrc").as_posix() for path in sources(ROOT / "csrc")}
    # All that shows in the CUDA module's own sources: it never holds a CPU op or a schema.
    assert "cpu/" not in ninja["_C_cuda"].partition("build ")[2]
    assert "schemas" not in ninja["_C_cuda"]
    for name in ("arch=compute_80,code=sm_80", "arch=compute_90,code=sm_90", "arch=compute_90,code=compute_90"):
        assert name in ninja["_C_cuda"]


def sources(folder: Path) -> list[Path]:
    return [path for pattern in ("*.cpp", "*.cu") for path in folder.rglob(pattern)]


def test_no_two_sources_share_a_stem():
    for files in (sources(ROOT / "csrc"), list((ROOT / "csrc").rglob("*.h"))):
        stems = [path.stem for path in files]
        assert len(files) > 1
        assert sorted(stems) == sorted(set(stems))


def test_two_sources_with_one_object_end_the_build(checkout, tmp_path):
    shutil.copy(checkout / "csrc/cuda/packing_cuda.cpp", checkout / "csrc/cuda/packing_kernels.cpp")
    result = build(checkout, CUDA_HOME=str(make_toolkit(tmp_path / "cuda")))
    assert result.returncode != 0
    assert "_C_cuda" not in built(checkout)


@pytest.mark.parametrize("kind", UNUSABLE)
def test_an_unusable_toolkit_leaves_the_cpu_ops(checkout, tmp_path, kind):
    made, problem = UNUSABLE[kind]
    home = tmp_path / "cuda"
    if made is None:
        problem = "{home} holds neither bin/nvcc nor include/cuda_runtime_api.h"
    else:
        make_toolkit(home, **made)
    result = build(checkout, CUDA_HOME=str(home))
    assert result.returncode == 0, result.stderr[-3000:]
    assert built(checkout) == {"_C"}
    lines = [line for line in result.stderr.splitlines() if line.startswith("free_kernels: ")]
    reason = f"{problem.format(home=home)}; {REMEDY}"
    assert lines == [f"free_kernels: the CUDA ops are left out, only the CPU ops are built: {reason}."]
    assert "Traceback" not in result.stderr


def test_the_switch_leaves_the_cuda_ops_out(checkout, tmp_path):
    home = make_toolkit(tmp_path / "cuda")
    result = build(checkout, CUDA_HOME=str(home), FREE_KERNELS_NO_CUDA="1")
    assert result.returncode == 0, result.stderr[-3000:]
    assert built(checkout) == {"_C"}
    assert "free_kernels: " not in result.stderr
    assert not (home / "calls").exists()


def test_a_later_build_without_cuda_leaves_no_stale_module(checkout, tmp_path):
    home = make_toolkit(tmp_path / "cuda")
    assert build(checkout, CUDA_HOME=str(home)).returncode == 0
    assert built(checkout) == {"_C", "_C_cuda"}
    assert build(checkout, FREE_KERNELS_NO_CUDA="1").returncode == 0
    assert built(checkout) == {"_C"}
