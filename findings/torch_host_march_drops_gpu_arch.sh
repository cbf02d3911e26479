#!/usr/bin/env bash
# torch 2.13.0, torch.utils.cpp_extension (CUDAExtension, load, load_inline): a flag for the host compiler that is handed
# through nvcc, such as `-Xcompiler=-march=x86-64-v3`, takes away every GPU architecture of the build: neither
# TORCH_CUDA_ARCH_LIST nor the GPU at hand is asked, and nvcc compiles for its own default.
# Expected: flags that name GPU architectures (-gencode, -arch) replace those of TORCH_CUDA_ARCH_LIST; others do not.
# Output seen: without the flag ['-gencode=arch=compute_90,code=sm_90'], with it [].
# Why it matters here: an extension built so holds code for an old architecture only. It loads and registers its ops, and
# fails at its first launch, or is compiled again by the driver; a build of CUDA ops must not hand such a flag to nvcc.
# Source: _get_cuda_arch_flags in torch/utils/cpp_extension.py, which looks for the letters "arch" in each flag; both the
# setuptools build and `load` add nothing else that names an architecture.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6 setuptools==81.0.0
cd "$work"
TORCH_CUDA_ARCH_LIST=9.0 "$work/venv/bin/python" - <<'PYTHON'
import torch
from torch.utils.cpp_extension import _get_cuda_arch_flags

hopper = ["-gencode=arch=compute_90,code=sm_90"]
for given, expected in (
    (["-O3"], hopper),
    (["-O3", "-Xcompiler=-fPIC"], hopper),
    (["-O3", "-Xcompiler=-march=x86-64-v3"], []),
):
    found = _get_cuda_arch_flags(given)
    print(f"torch {torch.__version__}: TORCH_CUDA_ARCH_LIST=9.0, nvcc flags {given}: {found}")
    assert found == expected, "the behaviour has changed"
PYTHON
