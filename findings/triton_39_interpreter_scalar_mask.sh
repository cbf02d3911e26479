#!/usr/bin/env bash
# Triton 3.9.0, interpreter (TRITON_INTERPRET=1): `mask = (offsets < n) & (scalar > 0)` has the numbers of the scalar's
# integer type, and tl.load and tl.store refuse it: "mask has unsupported dtype". Joined by tl.where it is a mask. Triton
# 3.7.1 loads with either.
# Expected: a comparison is a boolean, whatever it is joined with; its type in the kernel is int1 all the same.
# Why it matters here: a kernel that reads nothing for an idle program is written like that; its tests without a GPU fail
# from one Triton to the next, with an error that names neither the mask nor the line of the conjunction.
# Source: triton/runtime/interpreter.py, InterpreterBuilder.create_splat (fills a block with the type of the scalar's
# storage) and create_masked_load, whose native helper takes boolean masks only since 3.9.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6
cat > "$work/masks.py" <<'PYTHON'
import torch, triton, triton.language as tl


@triton.jit
def conjunction(p_from, p_to, p_open, n, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    mask = (o < n) & (tl.load(p_open) > 0)
    tl.store(p_to + o, tl.load(p_from + o, mask=mask, other=0.0))


@triton.jit
def selection(p_from, p_to, p_open, n, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    mask = tl.where(tl.load(p_open) > 0, o < n, False)
    tl.store(p_to + o, tl.load(p_from + o, mask=mask, other=0.0))


given, expected = torch.arange(1.0, 9.0), torch.tensor([1.0, 2, 3, 4, 5, 6, 0, 0])
for kernel in (conjunction, selection):
    found = torch.full((8,), -1.0)
    try:
        kernel[(1,)](given, found, torch.ones(1, dtype=torch.int64), 6, BLOCK=8)
        said = "as expected" if torch.equal(found, expected) else "wrong values"
    except Exception as error:
        said = "refused" if "unsupported dtype" in str(error) else f"another error: {error}"
    print(triton.__version__, kernel.fn.__name__, said)
PYTHON
for version in 3.7.1 3.9.0; do
    "$work/venv/bin/python" -m pip install --quiet triton==$version
    (cd "$work" && TRITON_INTERPRET=1 "$work/venv/bin/python" masks.py)
done | tee "$work/said"
diff "$work/said" - <<'EXPECTED'
3.7.1 conjunction as expected
3.7.1 selection as expected
3.9.0 conjunction refused
3.9.0 selection as expected
EXPECTED
