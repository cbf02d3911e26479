"""Expressions evaluated in a process of their own, for figures that memory freed by earlier tests would blur."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

STATM = Path("/proc/self/statm")


def resident() -> int:
    """Bytes of this process in memory; Linux only."""
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def evaluate_alone(module: str, expression: str) -> float:
    """The number that ``module.expression`` is, a module of the tests, in a new process with one thread."""
    code = f"import {module}; print({module}.{expression})"
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


def in_fresh_process(code: str, **environment: str) -> str:
    """What code prints in a new process with hardly any environment."""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PATH": "/usr/bin:/bin", **environment}
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()
