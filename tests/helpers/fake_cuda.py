"""Fake CUDA tensors on a machine without a GPU: shapes, dtypes and devices without values.

A tensor that is looked at by the host raises, a copy from the CPU is seen, and what would launch a kernel is counted.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import subprocess
import tempfile
import traceback
import types
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# A CPU build of PyTorch has nothing that makes a CUDA device the current one, which indexing asks for.
GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
using Guard = c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>;
static c10::impl::DeviceGuardImplRegistrar registrar(c10::DeviceType::CUDA, new Guard());
"""
# Kernels of the ops that launch more than one.
TWO = "couple", "couple_philox", "couple_block", "couple_block_philox", "commit_drafts", "keep_clean_rows"
LAUNCHES = dict.fromkeys(TWO, 2)
# Allocations, and what only reads metadata.
FREE = {
    "empty",
    "new_empty",
    "empty_strided",
    "new_empty_strided",
    "empty_like",
    "detach",
    "_unsafe_view",
    "lift_fresh",
}
LEAVES = (str, int, float, bool, bytes, type(None), torch.dtype, type, types.ModuleType)


def allow_cuda_devices() -> None:
    """Let this process handle fake CUDA tensors; needs a C++ compiler where PyTorch is a CPU build.

    Raises:
        RuntimeError: the compiler is missing or fails.
    """
    if torch.version.cuda is not None:
        return
    root = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "guard.cpp"), Path(folder, "guard.so")
        source.write_text(GUARD)
        options = ["-std=c++20", "-shared", "-fPIC", f"-I{root / 'include'}", f"-L{root / 'lib'}"]
        compiler = shlex.split(os.environ.get("CXX") or "c++")
        try:
            command = [*compiler, *options, str(source), "-o", str(library), "-lc10"]
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            raise RuntimeError(f"needs a C++ compiler: {error}") from None
        if done.returncode:
            raise RuntimeError(f"the C++ compiler fails: {done.stderr}")
        ctypes.CDLL(str(library))


class Mover:
    """Gives everything that an object holds its tensors on a fake CUDA device, in place."""

    def __init__(self, mode: FakeTensorMode) -> None:
        self._mode = mode
        # Originals are kept, so that no other object takes the place of one.
        self._seen: dict[int, tuple[object, object]] = {}

    def __call__(self, thing: Any) -> Any:
        """The thing itself, but for tensors and what cannot be changed."""
        if isinstance(thing, (FakeTensor, *LEAVES, types.FunctionType, types.BuiltinFunctionType)):
            return thing
        if isinstance(thing, torch.device):
            return torch.device("cuda", 0)
        if id(thing) not in self._seen:
            self._seen[id(thing)] = thing, thing
            self._seen[id(thing)] = thing, self._moved(thing)
        return self._seen[id(thing)][1]

    def _moved(self, thing: Any) -> Any:
        if isinstance(thing, Tensor):
            with self._mode, torch.no_grad():
                return torch.empty_strided(thing.shape, thing.stride(), dtype=thing.dtype, device="cuda")
        if isinstance(thing, types.MethodType):
            return types.MethodType(thing.__func__, self(thing.__self__))
        if isinstance(thing, tuple):
            values = [self(value) for value in thing]
            return type(thing)(*values) if hasattr(thing, "_fields") else tuple(values)
        if isinstance(thing, list):
            thing[:] = [self(value) for value in thing]
        holder = thing if isinstance(thing, dict) else getattr(thing, "__dict__", {})
        for name, value in list(holder.items()):
            holder[name] = self(value)
        return thing


class Launches(TorchDispatchMode):
    """Counts what reaches a CUDA device.

    A launch is an operation on CUDA tensors that is neither a view nor an allocation; ops of ours count with their
    kernels. What the CPU build's decompositions do in several steps may be one kernel on a GPU, so that counts are
    upper bounds.

    Attributes:
        by_part: launches of each part of a round.
        by_op: of each part, launches of each operation.
        copies: what copied from the CPU, or mixed its tensors with CUDA tensors, and where.
        reads: what copied to the CPU, and where; what asks for a value at once raises instead.
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_part: Counter[str] = Counter()
        self.by_op: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.copies: list[str] = []
        self.reads: list[str] = []
        self._parts = ["rest"]

    def wrap(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """``call``, whose launches count for a part."""

        def counted(*arguments: Any, **settings: Any) -> Any:
            self._parts.append(part)
            try:
                return call(*arguments, **settings)
            finally:
                self._parts.pop()

        return counted

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run an operation and count it."""
        if func is torch.ops.prim.device.default:
            return args[0].fake_device if isinstance(args[0], FakeTensor) else args[0].device
        out = func(*args, **(kwargs or {}))
        name = func.name().split("::")[1].split(".")[0]
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        result = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if any(x.is_cuda for x in given + result):
            # A tensor of no dimensions is a Python number, which goes along as an argument of the kernel.
            copying = name in ("_to_copy", "copy_")
            if any(x.is_cpu and (x.ndim > 0 or copying) for x in given):
                self.copies.append(f"{name}: {_caller()}")
            if any(x.is_cpu for x in result):
                self.reads.append(f"{name}: {_caller()}")
            view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
            if not view and func.namespace != "prim" and name not in FREE:
                count = LAUNCHES.get(name, 1)
                self.by_part[self._parts[-1]] += count
                self.by_op[self._parts[-1]][name] += count
        return out


def _caller() -> str:
    """Source line, outside of PyTorch, that an operation comes from."""
    mine = (str(Path(torch.__file__).parent), __file__)
    frames = [f for f in traceback.extract_stack() if not f.filename.startswith(mine)]
    return f"{frames[-1].filename}:{frames[-1].lineno} {frames[-1].line}"


@contextmanager
def on_fake_gpu(mode: FakeTensorMode, launches: Launches) -> Iterator[None]:
    """Operations on fake CUDA tensors, as on a GPU of compute capability 9.0 with 132 multiprocessors."""
    properties = types.SimpleNamespace(multi_processor_count=132)
    with (
        mock.patch("torch.cuda.get_device_capability", return_value=(9, 0)),
        mock.patch("torch.cuda.get_device_properties", return_value=properties),
        torch.no_grad(),
        mode,
        launches,
    ):
        yield


def new_mode() -> FakeTensorMode:
    """The mode of one run's tensors."""
    return FakeTensorMode(allow_non_fake_inputs=True)
