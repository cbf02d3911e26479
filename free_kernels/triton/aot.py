"""Ahead-of-time compilation of Triton kernels to machine code, without a GPU: registers, shared memory, stack.

A module with kernels has a function ``aot_configurations() -> list[AotConfiguration]``. Needs a process in which
``TRITON_INTERPRET`` is not set.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ARCHITECTURES = (80, 90)
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64"}

_BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_PTXAS_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_PTXAS_REGISTERS = re.compile(r"Used (\d+) registers")


@dataclass(frozen=True)
class AotConfiguration:
    """One kernel with fixed types, constants and launch options.

    Attributes:
        label: what the report calls it.
        kernel: a ``triton.jit`` function.
        signature: type of each argument that is not a constant, such as ``"*fp32"``, ``"i32"``, ``"fp32"``.
        constants: the other arguments: ``tl.constexpr`` ones, and pointers that are None.
        num_warps: warps per program.
        num_stages: depth of software pipelining.
        divisible: arguments known to be multiples of 16 (pointers: 16-byte aligned), which widens accesses.
    """

    label: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, object] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    divisible: Sequence[str] = ()


class AotReport(NamedTuple):
    """What the assembler says about one configuration on one architecture; sizes in bytes."""

    label: str
    architecture: int
    registers: int
    shared: int
    stack: int
    spill_stores: int
    spill_loads: int


def compile_configuration(configuration: AotConfiguration, architecture: int) -> AotReport:
    """Compile to machine code for compute capability ``architecture`` (80 is 8.0).

    Raises:
        RuntimeError: the assembler refuses the kernel, or its report is not understood.
    """
    names = configuration.kernel.arg_names
    missing = [name for name in names if name not in configuration.signature and name not in configuration.constants]
    if missing:
        raise RuntimeError(f"aot: {configuration.label} has no type or value for {', '.join(missing)}")
    source = ASTSource(
        configuration.kernel,
        {name: configuration.signature.get(name, "constexpr") for name in names},
        dict(configuration.constants),
        {(names.index(name),): [["tt.divisibility", 16]] for name in configuration.divisible},
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": configuration.num_warps, "num_stages": configuration.num_stages},
    )
    registers, stack, stores, loads = _assemble(compiled.asm["ptx"], architecture)
    return AotReport(configuration.label, architecture, registers, compiled.metadata.shared, stack, stores, loads)


def _assemble(ptx: str, architecture: int) -> tuple[int, int, int, int]:
    """Registers, stack, spill stores and loads by the bundled assembler, which reports spills only as it works."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        # The feature set "a" has Hopper's own instructions, as in Triton's own call.
        name = f"sm_{architecture}{'a' if architecture >= 90 else ''}"
        command = [_BINARIES / "ptxas", "-v", f"--gpu-name={name}", path, "-o", path.with_suffix(".cubin")]
        result = subprocess.run(command, capture_output=True, text=True)
    said = result.stdout + result.stderr
    spills, registers = _PTXAS_SPILLS.search(said), _PTXAS_REGISTERS.search(said)
    if result.returncode != 0 or spills is None or registers is None:
        raise RuntimeError(f"aot: ptxas for {name} gave {said}")
    return int(registers[1]), *(int(number) for number in spills.groups())


def table(reports: Sequence[AotReport]) -> str:
    """The reports as aligned text, one line each."""
    width = max(len(report.label) for report in reports)
    lines = [f"{'kernel':<{width}}  arch  registers  shared  stack  spilled"]
    for r in reports:
        spilled = r.spill_stores + r.spill_loads
        lines.append(
            f"{r.label:<{width}}  {r.architecture:4d}  {r.registers:9d}  {r.shared:6d}  {r.stack:5d}  {spilled:7d}"
        )
    return "\n".join(lines)
