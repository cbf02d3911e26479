"""The build and the loading of the compiled extension, in fresh processes."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from free_kernels import extension

ROOT = Path(__file__).resolve().parents[2]
in_checkout = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source checkout")
needs_extension = pytest.mark.skipif(
    not extension.has_extension(), reason=f"no compiled extension: {extension.why_no_extension()}"
)


def run(*command: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    # The switch that these tests are about must not leak in from the caller.
    inherited = {name: value for name, value in os.environ.items() if name != "FREE_KERNELS_NO_EXT"}
    return subprocess.run(
        command, cwd=cwd, env={**inherited, **environment}, capture_output=True, text=True, timeout=900
    )


@needs_extension
def test_build_config() -> None:
    config = extension.build_config()
    assert set(config) == {"version", "cuda", "cuda_arch_list", "compiler", "torch"}
    assert isinstance(config["cuda"], bool)
    assert bool(config["cuda_arch_list"]) == config["cuda"]
    assert config["compiler"].split()[0] in ("gcc", "clang")
    assert config["torch"][0].isdigit()
    assert extension.why_no_extension() is None


@in_checkout
@needs_extension
def test_the_check_of_a_cuda_build_reads_every_schema() -> None:
    # It runs only where nvcc is; what it reads from the source must hold here too.
    spec = importlib.util.spec_from_file_location("cuda_build_check", ROOT / "csrc" / "cuda_build_check.py")
    check = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(check)
    declared = check.declared_schemas()
    assert set(declared) == set(extension.OPS)
    for name, schema in declared.items():
        found = getattr(getattr(torch.ops, extension.NAMESPACE), name).default._schema
        assert found == torch._C.parse_schema(schema), name


def test_importing_the_library_does_not_load_the_extension() -> None:
    code = "import sys, free_kernels.ops.packing, free_kernels.ops.random; print('free_kernels._C' in sys.modules)"
    assert run(sys.executable, "-c", code).stdout.split() == ["False"]


@pytest.mark.parametrize("value", ["1", "true"])
def test_the_run_time_switch_hides_the_extension(value: str) -> None:
    code = """
import sys, torch
from free_kernels import extension
from free_kernels.ops.random import philox_uniform
assert not extension.has_extension()
print(extension.why_no_extension())
zero = torch.zeros(1, dtype=torch.int64)
print(philox_uniform(0, zero, zero, 0, 4).shape == (1, 4), "free_kernels._C" in sys.modules)
for call in (extension.build_config, lambda: philox_uniform(0, zero, zero, 0, 4, backend="extension")):
    try:
        call()
    except RuntimeError as error:
        print(error)
"""
    result = run(sys.executable, "-c", code, FREE_KERNELS_NO_EXT=value)
    reason = "the environment variable FREE_KERNELS_NO_EXT is set"
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        reason,
        "True False",
        f"build_config: no compiled extension: {reason}",
        f"philox_uniform: backend 'extension' cannot be used: {reason}",
    ]


def test_a_broken_extension_is_a_reason_not_a_crash(tmp_path: Path) -> None:
    code = """
import importlib, sys
from free_kernels import extension
real = importlib.import_module
def broken(name):
    if name == "free_kernels._C":
        raise ImportError("libsomething.so: cannot open shared object file")
    return real(name)
importlib.import_module = broken
print(extension.why_no_extension())
"""
    result = run(sys.executable, "-c", code)
    assert result.stdout.strip() == (
        "importing free_kernels._C failed: libsomething.so: cannot open shared object file"
    ), result.stderr


LOAD_CUDA = """
import importlib, sys, torch
from free_kernels import extension
torch.version.cuda = {cuda!r}
real = importlib.import_module
def patched(name):
    if name != "free_kernels._C_cuda":
        return real(name)
    print("asked for _C_cuda")
    {action}
importlib.import_module = patched
print(extension.has_extension(), extension.build_config()["cuda"])
print([extension.why_no_kernel(op, "cpu") for op in extension.OPS])
print(extension.why_no_kernel("pack_drafts", "cuda"))
print(extension.why_no_kernel("philox_normal", "cuda"))
"""


@needs_extension
@pytest.mark.skipif(torch.version.cuda is not None, reason="needs a CPU build of torch")
@pytest.mark.parametrize(
    ("cuda", "action", "reason"),
    [
        (None, "raise RuntimeError", f"torch {torch.__version__} is not a CUDA build"),
        (
            "13.0",
            "raise ModuleNotFoundError(name=name)",
            "free_kernels._C_cuda was not built (pip install -v --no-build-isolation . says what it lacks)",
        ),
        (
            "13.0",
            "raise ImportError('libtorch_cuda.so: cannot open shared object file')",
            "importing free_kernels._C_cuda failed: libtorch_cuda.so: cannot open shared object file",
        ),
        (
            "13.0",
            "return object()",
            "free_kernels._C_cuda is out of date, it lacks pack_drafts, commit_drafts: build it again",
        ),
    ],
)
def test_the_cuda_module_never_takes_the_cpu_ops_away(cuda: str | None, action: str, reason: str) -> None:
    result = run(sys.executable, "-c", LOAD_CUDA.format(cuda=cuda, action=action))
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        *(["asked for _C_cuda"] if cuda else []),
        "True False",
        str([None] * len(extension.OPS)),
        f"the compiled extension has no pack_drafts for cuda tensors: {reason}",
        "the compiled extension has no philox_normal for cuda tensors",
    ]


@needs_extension
@pytest.mark.skipif(shutil.which("readelf") is None or shutil.which("nm") is None, reason="needs binutils")
def test_the_modules_need_nothing_that_another_torch_lacks() -> None:
    modules = {path.name.partition(".")[0]: path for path in Path(extension.__file__).parent.glob("_C*.so")}
    assert "_C" in modules
    for name, path in modules.items():
        needed = re.findall(r"\(NEEDED\).*\[(.*)\]", run("readelf", "-d", str(path)).stdout)
        forbidden = ("libcudart", "libtorch_python") + (("libtorch_cuda", "libc10_cuda") if name == "_C" else ())
        assert not [library for library in needed if library.startswith(forbidden)]
        # Of torch, C functions alone: its C++ ones are no part of the stable ABI.
        symbols = run("nm", "-D", "--undefined-only", str(path)).stdout.split()
        assert "aoti_torch_library_init_impl" in symbols
        assert not [symbol for symbol in symbols if re.match(r"_ZNK?(2at|3c10|5torch)", symbol)]


@in_checkout
@pytest.mark.parametrize("compiler", ["/nonexistent/c++", "false"])
def test_a_missing_compiler_is_one_line(compiler: str, tmp_path: Path) -> None:
    build = ("--build-temp", str(tmp_path), "--build-lib", str(tmp_path))
    result = run(sys.executable, "setup.py", "-q", "build_ext", *build, cwd=ROOT, CXX=compiler)
    lines = [line for line in result.stderr.splitlines() if line.startswith("free_kernels: ")]
    assert result.returncode != 0
    assert len(lines) == 1
    assert f"no working C++ compiler: {compiler!r}" in lines[0]
    assert "FREE_KERNELS_NO_EXT=1" in lines[0]
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


@in_checkout
def test_pure_python_build_has_every_module(tmp_path: Path) -> None:
    command = ("setup.py", "-q", "build", "--build-base", str(tmp_path / "base"), "--build-lib", str(tmp_path / "lib"))
    # A compiler that does not exist shows that none is asked for.
    result = run(sys.executable, *command, cwd=ROOT, FREE_KERNELS_NO_EXT="1", CXX="/nonexistent")
    assert result.returncode == 0, result.stderr
    for package, source in (("free_kernels", ROOT / "free_kernels"), ("free_dit", ROOT / "python" / "free_dit")):
        built = tmp_path / "lib" / package
        want = {path.relative_to(source) for path in source.rglob("*.py")}
        assert want == {path.relative_to(built) for path in built.rglob("*.py")}
    assert not list(tmp_path.rglob("_C*"))


@in_checkout
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc was not found")
def test_cuda_sources_compile_and_register() -> None:
    result = run(sys.executable, str(ROOT / "csrc" / "nvcc_check.py"), TORCH_CUDA_ARCH_LIST="8.0;9.0")
    assert result.returncode == 0, result.stdout + result.stderr
    for kernel in ("pack_kernel", "commit_plan_kernel", "commit_copy_kernel"):
        assert result.stdout.count(kernel) == 2
    assert "compiled for 8.0, 9.0" in result.stdout
    assert "register for CUDA" in result.stdout


@in_checkout
def test_a_missing_nvcc_is_said(tmp_path: Path) -> None:
    script = str(ROOT / "csrc" / "nvcc_check.py")
    failed = run(sys.executable, script, CUDA_HOME=str(tmp_path))
    skipped = run(sys.executable, script, "--allow-missing", CUDA_HOME=str(tmp_path))
    assert (failed.returncode, skipped.returncode) == (2, 0)
    (line,) = skipped.stderr.splitlines()
    assert line.startswith(f"nvcc-check: skipped: {tmp_path} holds neither bin/nvcc nor include/cuda_runtime_api.h")
