#!/usr/bin/env bash
# triton 3.6.0, interpreter (TRITON_INTERPRET=1), with numpy 2.4.6: a loop whose bound is an argument of the kernel raises
# InterpreterError, of a TypeError ("only 0-dimensional arrays can be converted to Python scalars"). With numpy 2.3.5 the same kernel runs, and
# with triton 3.7.1 it runs beside numpy 2.4.6.
# Expected: the sum of the vector in all three. triton 3.6.0 sets no bound on numpy, so a fresh installation has the pair
# that fails.
# Why it matters here: torch 2.10 and 2.11 come with triton 3.6, so tests of kernels that run in the interpreter fail there
# on every kernel that walks over a row in blocks, for a reason that is in no kernel.
# Source: triton/runtime/interpreter.py 3.6.0 holds scalars as arrays of one element; numpy 2.4 no longer converts those
# (its release notes, expired deprecations).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0
cd "$work"
# The interpreter reads a kernel's source from its file.
cat > kernels.py <<'PYTHON'
import sys

import numpy
import torch
import triton
import triton.language as tl


@triton.jit
def total(p_values, p_total, count, SIZE: tl.constexpr):
    sums = tl.zeros((SIZE,), tl.float32)
    for first in range(0, count, SIZE):
        offsets = first + tl.arange(0, SIZE)
        sums += tl.load(p_values + offsets, offsets < count, 0.0)
    tl.store(p_total, tl.sum(sums, 0))


values, found = torch.arange(20.0), torch.zeros(1)
try:
    total[(1,)](values, found, len(values), 8)
    outcome = str(float(found))
except Exception as error:
    outcome = f"{type(error).__name__}: {error}"
print(f"triton {triton.__version__}, numpy {numpy.__version__}: {outcome}")
sys.exit(sys.argv[1] not in outcome)
PYTHON
run() {
    "$work/venv/bin/python" -m pip install --quiet "triton==$1" "numpy==$2"
    TRITON_INTERPRET=1 "$work/venv/bin/python" kernels.py "$3"
}
run 3.6.0 2.3.5 190.0
run 3.7.1 2.4.6 190.0
run 3.6.0 2.4.6 "only 0-dimensional arrays can be converted"
