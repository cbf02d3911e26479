#!/usr/bin/env bash
# safetensors 0.8.0 with torch 2.13.0: a Ctrl-C that arrives while `safe_open(...).get_tensor(...)` cuts the tensor out of its
# storage comes out as `ValueError: could not determine the shape of object type 'torch.storage.UntypedStorage'`, with no
# KeyboardInterrupt as its cause. The signal is delivered here within that very call, so that the script does not depend on
# luck.
# Expected: KeyboardInterrupt, as from any other call.
# Why it matters here: a program that takes ValueError for a broken checkpoint (as anyone who reads a stranger's file does)
# tells a user who pressed Ctrl-C that a sound file is broken, and goes on.
# Source: torch reads a storage as a sequence to infer its shape and replaces whatever exception its first item raises:
# compute_sizes in torch/csrc/utils/tensor_new.cpp; safetensors cuts storages by torch.asarray: bindings/python/src/lib.rs.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6 safetensors==0.8.0
cd "$work"
"$work/venv/bin/python" - <<'PYTHON'
import signal

import safetensors, torch
from safetensors import safe_open
from safetensors.torch import save_file

save_file({"weight": torch.arange(6.0).view(2, 3)}, "model.safetensors")
own, reads = torch.UntypedStorage.__getitem__, 0


def read():
    with safe_open("model.safetensors", framework="pt") as handle:
        return handle.get_tensor("weight")


def interrupted(storage, *arguments):
    # The first read cuts the bytes out of the file's storage, the second one infers a shape.
    global reads
    reads += 1
    if reads == 2:
        signal.raise_signal(signal.SIGINT)
    return own(storage, *arguments)


assert torch.equal(read(), torch.arange(6.0).view(2, 3))
torch.UntypedStorage.__getitem__ = interrupted
try:
    read()
    outcome, cause = "nothing", None
except (KeyboardInterrupt, ValueError) as error:
    outcome, cause = f"{type(error).__name__}: {error}", error.__cause__ or error.__context__
torch.UntypedStorage.__getitem__ = own
print(f"safetensors {safetensors.__version__}, torch {torch.__version__}: {outcome}; cause: {cause}")
assert outcome == "ValueError: could not determine the shape of object type 'torch.storage.UntypedStorage'"
assert cause is None
PYTHON
