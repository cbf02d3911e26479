"""Builds ``free_kernels._C`` and, where torch is a CUDA build, ``free_kernels._C_cuda``.

Metadata is in ``pyproject.toml``. Environment: ``FREE_KERNELS_NO_EXT=1`` installs pure Python,
``FREE_KERNELS_NO_CUDA=1`` leaves the CUDA ops out; ``CXX``, ``CUDA_HOME`` and ``TORCH_CUDA_ARCH_LIST`` are honoured.
"""

from __future__ import annotations

import functools
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
# pip asks for the metadata twice before it builds; they need no toolkit.
METADATA_COMMANDS = {"egg_info", "dist_info", "sdist"}

sys.path.insert(0, str(ROOT / "csrc"))
from toolkit import Toolkit, find_toolkit  # noqa: E402


def switched_on(name: str) -> bool:
    """Whether an environment variable is set to anything but a no."""
    return os.environ.get(name, "").strip().lower() not in ("", "0", "false", "no", "off")


def stop(problem: str) -> None:
    """End the build with one line on stderr."""
    print(f"free_kernels: {problem} {PURE_PYTHON}", file=sys.stderr)
    raise SystemExit(1)


@functools.cache
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


def usable_toolkit() -> Toolkit | None:
    """The CUDA toolkit to build with; without one, the reason is one line on stderr and the CPU ops are built."""
    import torch

    if torch.version.cuda is None or switched_on("FREE_KERNELS_NO_CUDA") or METADATA_COMMANDS.intersection(sys.argv):
        return None
    check_compiler()
    found = find_toolkit(torch.version.cuda)
    if isinstance(found, Toolkit):
        return found
    print(f"free_kernels: the CUDA ops are left out, only the CPU ops are built: {found}.", file=sys.stderr)
    return None


def extension_arguments() -> dict[str, Any]:
    """``ext_modules`` and ``cmdclass``, or nothing for a pure Python install."""
    if switched_on("FREE_KERNELS_NO_EXT"):
        return {}
    try:
        from torch.utils import cpp_extension
    except ImportError as error:
        stop(f"torch is needed to build the compiled ops ({error}); install it and use --no-build-isolation.")

    # pybind11's own headers come before the older copy that torch brings, which does where there is no other.
    try:
        import pybind11

        include_dirs = [pybind11.get_include()]
    except ImportError:
        include_dirs = []
    # Error messages carry the source's name, which should not be a path of the machine that built it. PyTorch's
    # stable-ABI types are hidden, so whatever holds them must be hidden too.
    cxx = ["-O3", "-fvisibility=hidden", f"-fmacro-prefix-map={ROOT}/="]
    # Python's own flags ask for debugging information, which makes the module ten times as large.
    if "-g" not in shlex.split(os.environ.get("CFLAGS", "")):
        cxx.append("-g0")
    # Roots and selections become vector instructions; NaN and infinities keep their meaning, unlike with -ffast-math.
    vectors = ["-fno-math-errno", "-fno-trapping-math"]
    cpu_module = cpp_extension.CppExtension(
        "free_kernels._C",
        sources_in("*.cpp", "cpu/*.cpp", "steering/*.cpp"),
        include_dirs=[*include_dirs],
        extra_compile_args={"cxx": [*cxx, *vectors]},
        depends=sources_in("**/*.h"),
    )

    def cuda_module(toolkit: Toolkit) -> Any:
        # In place of torch's own guess, which is the parent of the folder that nvcc, or a wrapper of it, is found in.
        cpp_extension.CUDA_HOME = str(toolkit.home)
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", toolkit.architectures())
        module = cpp_extension.CUDAExtension(
            "free_kernels._C_cuda",
            sources_in("checks.cpp", "tensors.cpp", "cuda/*.cpp", "cuda/*.cu"),
            include_dirs=[*include_dirs],
            define_macros=[("USE_CUDA", None)],
            # No path here: torch chooses no architecture where a flag has "arch" in it, as in /home/x/research.
            extra_compile_args={"cxx": [*cxx], "nvcc": ["-O3", "-Xcompiler=-fvisibility=hidden"]},
            library_dirs=[str(toolkit.library_dir)],
            # The runtime is linked statically and kept to the module, whatever runtime torch brings.
            extra_link_args=["-Wl,--exclude-libs,libcudart_static.a"],
            depends=sources_in("**/*.h"),
        )
        module.libraries = ["torch_cuda", "torch_cpu", "torch", "c10", "cudart_static", "rt", "pthread", "dl"]
        return module

    class BuildExt(cpp_extension.BuildExtension):
        """Checks the compiler first, and builds each module in a folder of its own."""

        def run(self) -> None:
            check_compiler()
            # One module after the other; ninja compiles the files of each in parallel.
            self.parallel = None
            version = self.distribution.get_version()
            for extension in self.extensions:
                for flags in extension.extra_compile_args.values():
                    flags.append(f"-DFREE_KERNELS_VERSION={version}")
            # An earlier build's CUDA module would go into the wheel of one without.
            names = {extension.name.rpartition(".")[2] for extension in self.extensions}
            for module in Path(self.build_lib, "free_kernels").glob("_C*"):
                if module.name.partition(".")[0] not in names:
                    module.unlink()
            super().run()

        def build_extension(self, extension: Any) -> None:
            # Both modules hold the shared sources, whose objects and build.ninja would have the same names.
            shared = self.build_temp
            self.build_temp = str(Path(shared, extension.name.rpartition(".")[2]))
            try:
                super().build_extension(extension)
            finally:
                self.build_temp = shared

    toolkit = usable_toolkit()
    modules = [cpu_module] if toolkit is None else [cpu_module, cuda_module(toolkit)]
    return {"ext_modules": modules, "cmdclass": {"build_ext": BuildExt}}


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
