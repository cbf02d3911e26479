"""Every Triton kernel compiles to machine code without a GPU: no spills, shared memory within each device's limit."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import free_kernels

FOLDER = Path(free_kernels.__file__).parent / "ops"
# Read from the source: importing a kernel module here would fix the interpreter's setting for this process.
MODULES = [
    file.parent.name
    for file in sorted(FOLDER.glob("*/triton_launch.py"))
    if "\ndef aot_configurations(" in file.read_text()
]
DEVICES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
# Of each backend the device with the least shared memory; on sm_86 the compiler also takes the most registers.
TIGHTEST = ("sm_86", "gfx942")
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton's compiler")


def run(*command: str) -> str:
    result = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=ENVIRONMENT)
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


def compile_all(devices: Sequence[str], largest: str) -> list[dict[str, Any]]:
    """Of every module, in one process: most of a small module's time is the start of the compiler."""
    options = [word for device in devices for word in ("--device", device)]
    return json.loads(run("-m", "free_kernels.ops.aot_table", "--json", "--largest", largest, *options))


def most_barriers() -> int:
    """A row's figures are reduced together; fifteen reductions took 44. From Triton 3.8 on the store takes one more."""
    version = tuple(int(part) for part in importlib.metadata.version("triton").split(".")[:2])
    return 4 if version < (3, 8) else 5


def assert_fits(reports: list[dict[str, Any]], devices: Sequence[str]) -> None:
    assert {report["device"] for report in reports} == set(devices)
    # Every module has kernels of its own on each of them.
    for device in devices:
        assert len({report["group"] for report in reports if report["device"] == device}) >= len(MODULES), device
    # Figures that nothing was read into would fit everywhere.
    assert all(report["registers"] > 0 for report in reports)
    assert not [report for report in reports if report["unfit"]]
    for report in reports:
        # Odd sizes rearrange their noise through shared memory.
        if report["group"].startswith("coupling_rows") and "x315 " not in report["label"]:
            assert report["barriers"] <= most_barriers(), report


def test_every_op_is_found():
    assert {"attention", "coupling", "random"} <= set(MODULES)


def test_the_largest_of_each_kernel_fits_every_device():
    devices = [device for device in DEVICES if device not in TIGHTEST]
    assert_fits(compile_all(devices, "kernel"), devices)


@pytest.mark.slow
def test_the_largest_of_each_kind_fits_the_tightest_devices():
    """A kind is a row of the table in docs/benchmarks.md; ``make aot-matrix`` compiles all there is of it."""
    assert_fits(compile_all(TIGHTEST, "group"), TIGHTEST)


CONTROL = """
from dataclasses import replace
from free_kernels.ops.aot import DEVICES, compile_configuration, why_unfit
from free_kernels.ops.attention.triton_launch import aot_configurations

for name, label in (("sm_80", "T 256 64 x 64"), ("gfx942", "T 256 128 x 64 uncached")):
    every = aot_configurations(DEVICES[name])
    spilling = next(c for c in every if c.label.endswith(f"bf16 dim 64 {label}"))
    report = compile_configuration(replace(spilling, num_warps=1), DEVICES[name])
    print(name, why_unfit(report))
    fits = report._replace(spilled=0, stack=0, shared=DEVICES[name].shared, registers=DEVICES[name].registers)
    print(name, why_unfit(fits))
    print(name, why_unfit(fits._replace(shared=fits.shared + 1)))
    print(name, why_unfit(fits._replace(registers=0)))
"""


def test_spills_and_shared_memory_are_seen(tmp_path):
    """Attention with a quarter of its threads spills on each backend; limits are limits."""
    script = tmp_path / "control.py"
    script.write_text(CONTROL)
    said = run(str(script)).splitlines()
    print("\n".join(said))
    for spilling, fits, beyond, unread in (said[:4], said[4:]):
        assert "bytes spilled" in spilling
        assert fits.endswith("None")
        assert "bytes of shared memory" in beyond
        assert "registers" in unread
