#!/usr/bin/env bash
# torch 2.13.0, torch.compile(dynamic=True): once a symbolic size has been put into an f-string, a size that is read behind
# it and equals it is in no tuple and no list that holds it: `m in (n, 2 * n)` is False, and an if takes the other branch.
# No error and no graph break, with the eager backend; `m == n` stays right. torch 2.14.1 is right.
# Expected: a text changes nothing about a comparison behind it.
# Output seen: m read before the text True True True, behind it False False True, and the other branch's result.
# Why it matters here: an op that words its expectation first ("output must be [3 or 6]") and then tests it refuses right
# arguments in a compiled graph, or takes the branch of another layout without a word.
# Source: seen with the script below. The text makes n a constant of the trace, while m stays a symbol; membership then
# compares the two by something else than their values.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" - 2> /dev/null <<'PYTHON' | tee said
import torch


def before(x, y):
    n = x.shape[0]
    m = y.shape[0]
    text = f"{n} or {2 * n}"
    return x + 1 if m in (n, 2 * n) and text else x - 1, m in (n, 2 * n), m in [n, 2 * n], m == n


def behind(x, y):
    n = x.shape[0]
    text = f"{n} or {2 * n}"
    m = y.shape[0]
    return x + 1 if m in (n, 2 * n) and text else x - 1, m in (n, 2 * n), m in [n, 2 * n], m == n


for function in (before, behind):
    for dynamic in (None, True):
        torch._dynamo.reset()
        call = function if dynamic is None else torch.compile(function, dynamic=True, fullgraph=True, backend="eager")
        added, *found = call(torch.zeros(3), torch.zeros(3))
        print(function.__name__, "eager" if dynamic is None else "compiled", added.tolist(), *found)
PYTHON
diff said - <<'EXPECTED'
before eager [1.0, 1.0, 1.0] True True True
before compiled [1.0, 1.0, 1.0] True True True
behind eager [1.0, 1.0, 1.0] True True True
behind compiled [-1.0, -1.0, -1.0] False False True
EXPECTED
