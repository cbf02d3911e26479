#!/usr/bin/env bash
# triton 3.7.1, interpreter (TRITON_INTERPRET=1): arithmetic on bfloat16 values is done on their 16-bit patterns or comes
# back as garbage: 1.5 + 1.5 is infinity, the sum of eight 1.5 is a huge number. A float32 -> bfloat16 conversion truncates
# where compiled code rounds to nearest even.
# Expected: 3, 12, and 1.0068 -> 1.0078 as torch converts it.
# Why it matters here: a kernel test that runs in the interpreter says nothing about bfloat16 unless every load is converted
# to float32 at once and stores are compared with a bound of one bfloat16 ulp instead of half of one.
# Source: triton/runtime/interpreter.py keeps bfloat16 blocks as uint16 arrays.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6 triton==3.7.1
cd "$work"
# The interpreter reads a kernel's source from its file.
cat > kernels.py <<'PYTHON'
import torch
import triton
import triton.language as tl


@triton.jit
def double_and_sum(p_values, p_doubled, p_sum, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)
    values = tl.load(p_values + offsets)
    tl.store(p_doubled + offsets, values + values)
    tl.store(p_sum, tl.sum(values, 0))


@triton.jit
def convert(p_values, p_converted, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)
    tl.store(p_converted + offsets, tl.load(p_values + offsets).to(tl.bfloat16))


def run(dtype):
    values = torch.full((8,), 1.5, dtype=dtype)
    doubled, total = torch.zeros_like(values), torch.zeros(1, dtype=dtype)
    double_and_sum[(1,)](values, doubled, total, 8)
    return float(doubled[0]), float(total)


exact, seen = run(torch.float32), run(torch.bfloat16)
values = torch.full((8,), 1.0068)
converted = torch.zeros(8, dtype=torch.bfloat16)
convert[(1,)](values, converted, 8)
print(f"triton {triton.__version__}: float32 1.5 + 1.5, sum of eight 1.5: {exact}")
print(f"triton {triton.__version__}: bfloat16 the same: {seen}")
print(f"1.0068 to bfloat16: interpreter {float(converted[0])}, torch {float(values[0].bfloat16())}")
assert exact == (3.0, 12.0)
assert seen[0] != 3.0 and seen[1] != 12.0
assert float(converted[0]) == 1.0 and float(values[0].bfloat16()) == 1.0078125
PYTHON
TRITON_INTERPRET=1 "$work/venv/bin/python" kernels.py
