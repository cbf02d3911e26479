"""Kernels in Triton's interpreter: the tests of drafting, norms, tables and tokens in a process that has it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FILES = "test_clean_rows.py", "test_drafting.py", "test_norms.py", "test_tables.py", "test_tokens.py"
TESTS = [str(Path(__file__).with_name(name)) for name in FILES]


def test_interpreted_kernels_pass_the_tests_of_the_ops():
    pytest.importorskip("triton")
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-k", "triton", *TESTS]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-4000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= 80
    assert "skipped" not in done.stdout
