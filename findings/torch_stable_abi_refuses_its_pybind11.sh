#!/usr/bin/env bash
# torch 2.12.1: a source that defines TORCH_TARGET_VERSION, as an extension for the stable ABI does, cannot include the
# pybind11 that stands in torch/include, where CppExtension looks first: "#error This file should not be included when
# either TORCH_STABLE_ONLY or TORCH_TARGET_VERSION is defined". pybind11 3.0.1 itself, and the copy of torch 2.13.0, compile.
# Expected: the macro bars what depends on torch's own ABI. pybind11's headers use Python's and nothing of torch.
# Output seen: torch 2.12.1: refused; torch 2.13.0: compiles; pybind11 3.0.1: compiles.
# Why it matters here: an extension with ops on the stable ABI and a Python module beside them builds under the newest
# torch and fails under those that its wheel is for, unless pybind11's own folder comes before torch's.
# Source: torch/include/pybind11/*.h of the two wheels (each header of the older one is wrapped in the guard), and
# include_paths in torch/utils/cpp_extension.py.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet pybind11==3.0.1
cat > "$work/module.cpp" <<'CPP'
#include <pybind11/pybind11.h>
PYBIND11_MODULE(module, m) { m.def("one", [] { return 1; }); }
CPP
python_h=$("$work/venv/bin/python" -c "import sysconfig; print(sysconfig.get_paths()['include'])")
said() {
    if g++ -std=c++17 -fsyntax-only -DTORCH_TARGET_VERSION=0x020a000000000000 -I "$2" -I "$python_h" "$work/module.cpp" 2> "$work/errors"
    then echo "$1: compiles"
    elif grep -q "should not be included when either TORCH_STABLE_ONLY or TORCH_TARGET_VERSION" "$work/errors"
    then echo "$1: refused"
    else echo "$1: another error"; cat "$work/errors" >&2
    fi
}
{
    for version in 2.12.1 2.13.0; do
        "$work/venv/bin/python" -m pip download --quiet --no-deps --dest "$work/$version" torch==$version
        (cd "$work/$version" && "$work/venv/bin/python" - <<'PYTHON'
import glob, zipfile

with zipfile.ZipFile(glob.glob("*.whl")[0]) as wheel:
    wheel.extractall(members=[name for name in wheel.namelist() if name.startswith("torch/include/pybind11/")])
PYTHON
        )
        said "torch $version" "$work/$version/torch/include"
    done
    said "pybind11 3.0.1" "$("$work/venv/bin/python" -c "import pybind11; print(pybind11.get_include())")"
} | tee "$work/said"
diff "$work/said" - <<'EXPECTED'
torch 2.12.1: refused
torch 2.13.0: compiles
pybind11 3.0.1: compiles
EXPECTED
