#!/usr/bin/env bash
# torch 2.13.0: two things that sound free import the whole of torch._dynamo, in a process that compiles nothing.
# 1. Decorating a function with torch.compiler.assume_constant_result, which sets one attribute of it.
# 2. Making an nn.Embedding on the meta device, or sin(), cat() and a multiplication there; an nn.Linear does not.
# Both about double the CPU time that `import torch` takes (printed below), and bring eight hundred modules.
# Expected: the decorator waits for the first trace, and the meta device, which only says shapes, needs no compiler.
# Why it matters here: a kernel library marks what a trace may not look into when it is imported, and a loader builds a
# network on the meta device to compare its shapes with a file's. Every process of every user paid for both.
# Source: torch/compiler/__init__.py imports torch._dynamo within assume_constant_result; on the meta device normal_ and
# others run Python decompositions (torch/_refs), whose wrapper in torch/_prims_common/wrappers.py goes through
# torch/_compile.py, which imports torch._dynamo at its first call.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6
cd "$work"
cat > probe.py <<'PYTHON'
import json, sys, time

import torch

exec(sys.argv[1])
print(json.dumps([torch.__version__, "torch._dynamo" in sys.modules, len(sys.modules), time.process_time()]))
PYTHON
"$work/venv/bin/python" - <<'PYTHON'
import json, subprocess, sys

CASES = {
    "pass": False,
    "torch.nn.Linear(3, 4, device='meta')": False,
    "torch.nn.Embedding(3, 4)": False,
    "torch.nn.Embedding(3, 4, device='meta')": True,
    "torch.empty(3, device='meta').sin()": True,
    "torch.compiler.assume_constant_result(lambda: 0)": True,
}


def probe(code):
    done = subprocess.run([sys.executable, "probe.py", code], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


probe("pass")
for code, starts in CASES.items():
    version, started, modules, seconds = probe(code)
    print(f"torch {version}: {code:50s} compiler {str(started):5s} {modules:5d} modules, {seconds:.1f} s of CPU")
    assert started == starts, code
PYTHON
