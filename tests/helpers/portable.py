"""The numerical tests as other CPUs compute them: ``python tests/helpers/portable.py [--fast] [--each] [FILE ...]``.

A CPU's vector units decide which kernels of PyTorch, NumPy and the BLAS libraries run, and the number of threads how
sums are split. Both move results by rounding, and bounds that one machine meets by luck are missed on another. By
default two settings hold everything: the plainest kernels on one thread, and AVX2 on two. ``--each`` changes one thing
at a time, to find what a failure comes from.

Numerical is every test file but those of ``NOT_NUMERICAL``, so a new file is until it is named there. ``--fast`` leaves
out tests marked slow, the files of ``LONG`` and the setting that most machines are like, AVX2.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

TESTS = Path(__file__).parents[1]
# They compare no numbers that were computed in floating point: files, processes, messages, builds.
NOT_NUMERICAL = {
    "test_build",
    "test_benchmark_kernels",
    "test_cli",
    "test_cuda_emulator",
    "test_distribution",
    "test_fake_round",
    "test_fuzzed_files",
    "test_hashes",
    "test_imports",
    "test_interrupts",
    "test_layers",
    "test_loading",
    "test_out_of_memory",
    "test_portable",
    "test_reliability_page",
    "test_run_gpu",
    "test_soak",
    "test_toolkit",
    "test_triton_aot",
    "test_triton_launches",
}
# Minutes each, or few numbers for their time: Triton's interpreter, training, whole runs of the command line.
LONG = {
    "test_analysis",
    "test_attention",
    "test_checkpoints",
    "test_diffusers_pipeline",
    "test_distributed",
    "test_facts",
    "test_generate",
    "test_non_finite",
    "test_policy_cli",
    "test_policy_evaluation",
    "test_report",
    "test_study",
    "test_sweep",
    "test_text_memory",
    "test_training",
    "test_training_processes",
    "test_training_shards",
    "test_triton_block",
    "test_triton_coupling",
    "test_triton_drafting",
    "test_triton_random",
    "test_triton_sampler",
    "test_what_people_do",
}


def numpy_features() -> str:
    """Vector units that NumPy has extra kernels for and that this CPU has; it complains of others."""
    try:
        from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__
    except ImportError:
        return ""
    return " ".join(name for name in __cpu_dispatch__ if __cpu_features__.get(name))


def threads(count: int) -> dict[str, str]:
    return {name: str(count) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}


def variables() -> dict[str, dict[str, str]]:
    """What to set, by the thing that it changes; only what this CPU knows."""
    on_x86 = platform.machine().lower() in ("x86_64", "amd64")
    found = {
        "aten-default": {"ATEN_CPU_CAPABILITY": "default"},
        "numpy-baseline": {"NPY_DISABLE_CPU_FEATURES": numpy_features()},
        "one-thread": threads(1),
        "two-threads": threads(2),
    }
    if on_x86:
        found["aten-avx2"] = {"ATEN_CPU_CAPABILITY": "avx2"}
        found["openblas-prescott"] = {"OPENBLAS_CORETYPE": "PRESCOTT"}
        found["openblas-haswell"] = {"OPENBLAS_CORETYPE": "HASWELL"}
        # PyTorch's own matrix products and convolutions, which OPENBLAS_CORETYPE does not reach.
        found["mkl-compatible"] = {"MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "SSE41"}
    return {name: values for name, values in found.items() if all(values.values())}


def settings(each: bool) -> dict[str, dict[str, str]]:
    """Environments by name; unset is what no entry names."""
    known = variables()
    alone = {name: {**threads(1), **values} for name, values in known.items()}
    if each:
        return alone
    groups = {
        "plainest": ("aten-default", "numpy-baseline", "openblas-prescott", "mkl-compatible", "one-thread"),
        "avx2": ("aten-avx2", "openblas-haswell", "two-threads"),
    }
    return {
        group: {name: value for part in parts if part in known for name, value in known[part].items()}
        for group, parts in groups.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, help="test files; default: all numerical ones")
    parser.add_argument("--fast", action="store_true", help="without slow tests and long files")
    parser.add_argument("--each", action="store_true", help="one thing at a time")
    parser.add_argument("--jobs", default="2", help="processes that share the files")
    asked = parser.parse_args()
    left_out = NOT_NUMERICAL | (LONG if asked.fast else set())
    files = asked.files or [path for path in sorted(TESTS.glob("**/test_*.py")) if path.stem not in left_out]
    command = [sys.executable, "-m", "pytest", "-q", "-n", asked.jobs, "--dist", "loadfile", "--no-loadscope-reorder"]
    command += ["-m", "not slow"] if asked.fast else []

    unset = {name for values in variables().values() for name in values}
    inherited = {name: value for name, value in os.environ.items() if name not in unset}
    failed = []
    print(f"NumPy {np.__version__}, {platform.machine()}, {len(files)} files")
    chosen = settings(asked.each)
    if asked.fast and not asked.each:
        del chosen["avx2"]
    for name, values in chosen.items():
        print(f"== {name}:", " ".join(f"{key}='{value}'" for key, value in values.items()), flush=True)
        begin = time.perf_counter()
        if subprocess.run([*command, *map(str, files)], env={**inherited, **values}).returncode:
            failed.append(name)
        print(f"== {name}: {time.perf_counter() - begin:.0f} s", flush=True)
    if failed:
        sys.exit(f"portable: failed with {', '.join(failed)}")


if __name__ == "__main__":
    main()
