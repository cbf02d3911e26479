"""Ahead-of-time compilation of Triton kernels to machine code, which needs no GPU: registers, shared memory, spills.

A module with kernels has a function ``aot_configurations(device: Device) -> list[AotConfiguration]``, and
:mod:`free_kernels.ops.aot_table` compiles all that these return. ``TRITON_INTERPRET`` must not be set in the process.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64"}

_PTXAS_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_PTXAS_REGISTERS = re.compile(r"Used (\d+) registers")
_PTX_BARRIER = re.compile(r"\bbar(?:rier)?(?:\.cta)?\.sync\b")
_AMD_FIGURE = re.compile(r"^\s+\.(vgpr_count|vgpr_spill_count|private_segment_fixed_size):\s+(\d+)", re.MULTILINE)
_AMD_BARRIER = re.compile(r"^\s*s_barrier\b", re.MULTILINE)


class Device(NamedTuple):
    """A kind of GPU, and what a program may use there."""

    name: str  # the assembler's
    backend: str  # Triton's: "cuda" or "hip"
    arch: int | str  # Triton's name of the architecture; 80 is compute capability 8.0
    warp_size: int  # threads of a warp
    shared: int  # bytes of shared memory that a program may ask for
    registers: int  # 32-bit registers that a thread may have, accumulation registers included


# NVIDIA: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability": maximum amount of shared memory
# per thread block, registers per thread. AMD: CDNA3 instruction set architecture, local data share of a workgroup,
# vector registers of a lane.
DEVICES = {
    device.name: device
    for device in (
        Device("sm_80", "cuda", 80, 32, 163 << 10, 255),
        Device("sm_86", "cuda", 86, 32, 99 << 10, 255),
        Device("sm_89", "cuda", 89, 32, 99 << 10, 255),
        Device("sm_90", "cuda", 90, 32, 227 << 10, 255),
        Device("sm_100", "cuda", 100, 32, 227 << 10, 255),
        Device("sm_120", "cuda", 120, 32, 99 << 10, 255),
        Device("gfx942", "hip", "gfx942", 64, 64 << 10, 512),
    )
}


@dataclass(frozen=True)
class AotConfiguration:
    """One kernel with fixed types, constants and launch options."""

    label: str  # name in the report
    group: str  # name of the table's row, which holds the largest figures of all configurations of the group
    kernel: Any  # a triton.jit function
    signature: Mapping[str, str]  # types of the arguments that are not constants: "*fp32", "i32", "fp32" ...
    size: int  # what a program needs, to compare configurations of one kernel
    constants: Mapping[str, object] = field(default_factory=dict)  # tl.constexpr arguments, pointers that are None
    num_warps: int = 4
    num_stages: int = 3  # depth of software pipelining
    divisible: Sequence[str] = ()  # arguments that are multiples of 16 (pointers: 16-byte aligned), for wide accesses


def configuration(
    kernel: Any, types: Mapping[str, str], values: Mapping[str, object], aligned: Sequence[str] = (), **rest: Any
) -> AotConfiguration:
    """A configuration from what the launch of a kernel knows.

    Args:
        kernel: a ``triton.jit`` function.
        types: of arguments that are neither constants nor ``"i32"``.
        values: of constants; those that the kernel does not have are left out.
        aligned: multiples of 16 besides the pointers, whose names begin with ``p_``.
        rest: the other fields of an :class:`AotConfiguration`.
    """
    constants = {name: value for name, value in values.items() if name in kernel.arg_names}
    signature = {name: types.get(name, "i32") for name in kernel.arg_names if name not in constants}
    divisible = [name for name in signature if name.startswith("p_") or name in aligned]
    return AotConfiguration(kernel=kernel, signature=signature, constants=constants, divisible=divisible, **rest)


class AotReport(NamedTuple):
    """What the assembler says about one configuration on one device; sizes in bytes."""

    label: str
    group: str
    device: str
    registers: int  # of a thread
    shared: int  # shared memory of a program
    stack: int  # memory of a thread, for spilled registers or for arrays
    spilled: int  # stores and loads of a thread's registers to and from memory
    barriers: int  # places where all threads of a program wait for one another


def compile_configuration(configuration: AotConfiguration, device: Device) -> AotReport:
    """Compile to machine code, as Triton does before a launch.

    On AMD, code for tensors of less than 2 GiB differs from code for larger ones; the report has the larger figures.

    Raises:
        RuntimeError: the compiler refuses the kernel, or its report is not understood.
    """
    names = configuration.kernel.arg_names
    missing = [name for name in names if name not in configuration.signature and name not in configuration.constants]
    if missing:
        raise RuntimeError(f"aot: {configuration.label} has no type or value for {', '.join(missing)}")
    pointers = [name for name, kind in configuration.signature.items() if kind.startswith("*")]
    figures = [
        _compile(configuration, device, small) for small in ([], pointers)[: 2 if device.backend == "hip" else 1]
    ]
    worst = (max(values) for values in zip(*figures, strict=True))
    return AotReport(configuration.label, configuration.group, device.name, *worst)


def compiled(configuration: AotConfiguration, device: Device, small: Sequence[str] = ()) -> tuple[Any, str]:
    """Triton's compiled kernel, and what the assembler said; tensors of the pointers ``small`` have less than 2 GiB.

    Raises:
        RuntimeError: the compiler refuses the kernel.
    """
    names = configuration.kernel.arg_names
    attributes: dict[tuple[int], list[list[object]]] = {
        (names.index(n),): [] for n in (*configuration.divisible, *small)
    }
    for name in configuration.divisible:
        attributes[(names.index(name),)].append(["tt.divisibility", 16])
    for name in small:
        attributes[(names.index(name),)].append(["tt.pointer_range", 32])
    source = ASTSource(
        configuration.kernel,
        {name: configuration.signature.get(name, "constexpr") for name in names},
        dict(configuration.constants),
        attributes,
    )
    options = {"num_warps": configuration.num_warps, "num_stages": configuration.num_stages}
    log = io.StringIO()
    # The assembler prints its log while it works, so nothing may come from the cache.
    with knobs.compilation.scope(), knobs.nvidia.scope(), contextlib.redirect_stdout(log):
        knobs.compilation.always_compile = True
        knobs.nvidia.dump_ptxas_log = True
        target = GPUTarget(device.backend, device.arch, device.warp_size)
        try:
            return triton.compile(source, target=target, options=options), log.getvalue()
        except Exception as error:
            said = f"{type(error).__name__}: {error}\n{log.getvalue()[:2000]}"
            raise RuntimeError(f"aot: {configuration.label} does not compile for {device.name}: {said}") from error


def _compile(configuration: AotConfiguration, device: Device, small: Sequence[str]) -> tuple[int, int, int, int, int]:
    """Registers, shared memory, stack, spills and barriers; ``small`` as in :func:`compiled`."""
    kernel, log = compiled(configuration, device, small)
    if device.backend == "hip":
        code = kernel.asm["amdgcn"]
        found = {name: int(value) for name, value in _AMD_FIGURE.findall(code)}
        if len(found) != 3:
            raise RuntimeError(f"aot: {configuration.label} for {device.name}: no figures in the assembly")
        # Scalar registers spill to lanes of vector registers, which are counted, or to the stack.
        stack, spilled = found["private_segment_fixed_size"], 4 * found["vgpr_spill_count"]
        barriers = len(_AMD_BARRIER.findall(code))
        return found["vgpr_count"], kernel.metadata.shared, stack, spilled, barriers
    spills, registers = _PTXAS_SPILLS.search(log), _PTXAS_REGISTERS.search(log)
    if spills is None or registers is None:
        raise RuntimeError(f"aot: ptxas for {device.name} gave {log[:2000]}")
    stack, stores, loads = (int(number) for number in spills.groups())
    barriers = len(_PTX_BARRIER.findall(kernel.asm["ptx"]))
    return int(registers[1]), kernel.metadata.shared, stack, stores + loads, barriers


def why_unfit(report: AotReport) -> str | None:
    """Why a kernel does not run on its device, or runs slowly: spills, too much shared memory; None if it is fit."""
    device = DEVICES[report.device]
    if report.spilled or report.stack:
        return f"{report.spilled} bytes spilled, {report.stack} bytes of stack"
    if report.shared > device.shared:
        return f"{report.shared} bytes of shared memory, {device.shared} allowed"
    if not 0 < report.registers <= device.registers:
        return f"{report.registers} registers, {device.registers} allowed"
    return None
