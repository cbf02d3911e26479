"""Builds ``free_kernels._C``; metadata is in ``pyproject.toml``.

Environment: ``FREE_KERNELS_NO_EXT=1`` installs pure Python; ``CXX``, ``CUDA_HOME`` and ``TORCH_CUDA_ARCH_LIST`` are
honoured. The CUDA ops are built where the installed torch is a CUDA build and ``CUDA_HOME`` is found.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from setuptools import find_namespace_packages, setup

ROOT = Path(__file__).resolve().parent
PURE_PYTHON = "To install without the compiled ops (pure Python, slower): FREE_KERNELS_NO_EXT=1 pip install ..."
DEFAULT_ARCH_LIST = "8.0;9.0+PTX"


def stop(problem: str) -> None:
    """End the build with one line on stderr."""
    print(f"free_kernels: {problem} {PURE_PYTHON}", file=sys.stderr)
    raise SystemExit(1)


def check_compiler() -> None:
    """Compile a trivial program, so that a missing compiler is reported in one line rather than in a traceback."""
    compiler = os.environ.get("CXX") or "c++"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("#include <string>\nint main() { return std::string().size(); }\n")
        command = [*shlex.split(compiler), "-c", str(source), "-o", str(source.with_suffix(".o"))]
        try:
            probe = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            stop(f"no working C++ compiler: {compiler!r} cannot be run ({error.strerror}); install g++ or set CXX.")
        if probe.returncode:
            reason = (probe.stderr.strip().splitlines() or ["no message"])[0]
            stop(f"no working C++ compiler: {compiler!r} cannot compile a program ({reason}).")


def sources_in(*patterns: str) -> list[str]:
    """Files of ``csrc``, relative to the root as setuptools wants them."""
    return sorted(str(path) for pattern in patterns for path in Path("csrc").glob(pattern))


def extension_arguments() -> dict[str, Any]:
    """``ext_modules`` and ``cmdclass``, or nothing for a pure Python install."""
    if os.environ.get("FREE_KERNELS_NO_EXT", "0").lower() not in ("", "0", "false", "no", "off"):
        return {}
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        stop(f"torch is needed to build the compiled ops ({error}); install it and use --no-build-isolation.")

    class BuildExt(cpp_extension.BuildExtension):
        """Checks the compiler first, and hands the package's version to the compiled module."""

        def run(self) -> None:
            check_compiler()
            version = self.distribution.get_version()
            for extension in self.extensions:
                for flags in extension.extra_compile_args.values():
                    flags.append(f"-DFREE_KERNELS_VERSION={version}")
            super().run()

    with_cuda = torch.version.cuda is not None and cpp_extension.CUDA_HOME is not None
    sources = sources_in("*.cpp", "cpu/*.cpp")
    macros = [("TORCH_TARGET_VERSION", "0x020a000000000000")]
    # Error messages carry the source's name, which should not be a path of the machine that built it.
    prefix = f"-fmacro-prefix-map={ROOT}/="
    # PyTorch's stable-ABI types are hidden, so whatever holds them must be hidden too.
    host = ["-fvisibility=hidden", prefix]
    flags = {"cxx": ["-O3", *host], "nvcc": ["-O3", *(f"-Xcompiler={flag}" for flag in host)]}
    make_extension = cpp_extension.CppExtension
    if with_cuda:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCH_LIST)
        sources += sources_in("cuda/*.cpp", "cuda/*.cu")
        macros += [("FREE_KERNELS_CUDA", None), ("USE_CUDA", None)]
        make_extension = cpp_extension.CUDAExtension
    extension = make_extension(
        "free_kernels._C",
        sources,
        define_macros=macros,
        extra_compile_args=flags,
        depends=sources_in("**/*.h"),
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildExt}}


os.chdir(ROOT)
setup(
    packages=[
        *find_namespace_packages(include=["free_kernels", "free_kernels.*"]),
        *find_namespace_packages("python", include=["free_dit", "free_dit.*"]),
    ],
    package_dir={"free_dit": "python/free_dit"},
    package_data={"": ["*.toml", "*.json", "*.safetensors", "*.npz", "*.md", "py.typed"]},
    **extension_arguments(),
)
