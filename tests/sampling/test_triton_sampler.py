"""``sample(backend="triton")`` end to end, in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def test_whole_runs_agree_with_the_reference():
    worker = Path(__file__).parents[1].joinpath("workers", "triton_worker_sampler.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, str(worker)], capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 1e-4
