#!/usr/bin/env bash
# torch 2.13.0, torch.compile(dynamic=True): a truth that is compared with the truth of a symbolic size, as in
# `given == (x.shape[0] == 3)`, cannot be traced. "==" ends in InternalTorchDynamoError, "!=", "^" and two comparisons of
# sizes in TorchRuntimeError; bool() around the comparison changes nothing, and without fullgraph there is no graph break.
# The same condition with and, or, not compiles, and so do all of them where the size is a constant.
# Expected: the symbolic truth becomes a guard, as in an if, or the graph breaks there.
# Why it matters here: checks of an op's arguments compare truths ("given exactly where variances are learned"); a function
# that compiles for one batch size fails at the second, when sizes become symbols by themselves.
# Source: seen with the script below; SymBool of torch/__init__.py has __and__, __or__, __sym_not__, no __xor__, and its
# __eq__ and __ne__ reach sympy's relations, which do not take True for an operand.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" - 2> /dev/null <<'PYTHON' | tee said
import torch

conditions = {
    "given == size": lambda given, n: given == (n == 3),
    "given != size": lambda given, n: given != (n == 3),
    "given != bool(size)": lambda given, n: given != bool(n == 3),
    "given ^ size": lambda given, n: given ^ (n == 3),
    "size != size": lambda given, n: (n == 3) != (n > 5),
    "and, or, not": lambda given, n: given and not n == 3 or not given and n == 3,
}
for name, condition in conditions.items():
    def function(x, given):
        return x + 1 if condition(given, x.shape[0]) else x - 1

    for kind, dynamic in (("symbol", True), ("constant", False)):
        torch._dynamo.reset()
        compiled = torch.compile(function, dynamic=dynamic, backend="eager")
        try:
            right = all(torch.equal(compiled(torch.zeros(n), True), function(torch.zeros(n), True)) for n in (3, 4))
            outcome = "as in Python" if right else "wrong"
        except Exception as error:
            outcome = type(error).__name__
        print(f"{kind}, {name}: {outcome}")
PYTHON
diff said - <<'EXPECTED'
symbol, given == size: InternalTorchDynamoError
constant, given == size: as in Python
symbol, given != size: TorchRuntimeError
constant, given != size: as in Python
symbol, given != bool(size): TorchRuntimeError
constant, given != bool(size): as in Python
symbol, given ^ size: TorchRuntimeError
constant, given ^ size: as in Python
symbol, size != size: TorchRuntimeError
constant, size != size: as in Python
symbol, and, or, not: as in Python
constant, and, or, not: as in Python
EXPECTED
