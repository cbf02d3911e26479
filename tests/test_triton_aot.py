"""Every Triton kernel compiles to machine code for sm_80 and sm_90 without a GPU, and spills no registers."""

from __future__ import annotations

import importlib.util
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import free_kernels

WORKER = Path(__file__).with_name("triton_worker_aot.py")
FOLDER = Path(free_kernels.__file__).parent / "triton"
# Read from the source: importing a kernel module here would fix the interpreter's setting for this process.
MODULES = [
    found.name
    for found in pkgutil.iter_modules([str(FOLDER)])
    if "\ndef aot_configurations(" in (FOLDER / f"{found.name}.py").read_text()
]

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton's compiler")


def compile_module(name: str, *options: str) -> list[dict[str, object]]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(WORKER), *options, name]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-4000:]
    *lines, reports = result.stdout.splitlines()
    print("\n".join(lines))
    fields = ("label", "architecture", "registers", "shared", "stack", "spill_stores", "spill_loads")
    return [dict(zip(fields, report, strict=True)) for report in json.loads(reports)]


def test_every_op_is_found():
    assert {"attention", "coupling", "random"} <= set(MODULES)


def assert_fits(reports: list[dict[str, object]]) -> None:
    spilled = [report for report in reports if report["spill_stores"] or report["spill_loads"]]
    assert not spilled
    for report in reports:
        # A program's shared memory is limited to 163 KB on sm_80 and 227 KB on sm_90, a thread to 255 registers.
        assert report["shared"] <= (166_912 if report["architecture"] == 80 else 232_448), report
        assert 0 < report["registers"] <= 255, report


@pytest.mark.parametrize("name", MODULES)
def test_some_configurations_compile_without_spills(name):
    reports = compile_module(name, "--few")
    assert reports
    assert_fits(reports)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODULES)
def test_every_configuration_compiles_without_spills(name):
    reports = compile_module(name)
    assert {report["architecture"] for report in reports} == {80, 90}
    assert_fits(reports)
