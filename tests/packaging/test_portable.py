"""The settings of ``tests/helpers/portable.py`` do what they say: a variable that nothing reads would test nothing."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys

import portable
import pytest

# What PyTorch and NumPy say that they compute with; NumPy complains on stderr of units that it cannot do without.
ASK = """
import json
import torch
from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__
extra = [name for name in __cpu_dispatch__ if __cpu_features__[name]]
print(json.dumps([torch.backends.cpu.get_cpu_capability(), extra, torch.get_num_threads()]))
"""


def asked(**values: str) -> tuple[list, str]:
    environment = {**os.environ, **values}
    result = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, env=environment, check=True)
    return json.loads(result.stdout), result.stderr


def test_the_plainest_setting_is_plain():
    (capability, extra, threads), complaints = asked(**portable.settings(False)["plainest"])
    assert (capability, extra, threads) == ("DEFAULT", [], 1)
    assert "NPY_DISABLE_CPU_FEATURES" not in complaints


@pytest.mark.skipif(platform.machine() != "x86_64", reason="of x86-64")
def test_the_other_setting_is_avx2():
    (capability, _, threads), _ = asked(**portable.settings(False)["avx2"])
    assert (capability, threads) == ("AVX2", 2)


def test_every_test_file_is_numerical_or_said_not_to_be():
    stems = {path.stem for path in portable.TESTS.glob("**/test_*.py")}
    assert stems >= portable.NOT_NUMERICAL | portable.LONG
    assert not portable.NOT_NUMERICAL & portable.LONG


def test_a_failing_file_fails_the_run(tmp_path):
    """Under every setting: the run does not end with the first that fails."""
    path = tmp_path / "test_wrong.py"
    path.write_text("def test_wrong():\n    assert 0.1 + 0.2 == 0.3\n")
    command = [sys.executable, portable.__file__, "--jobs", "0", str(path)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode != 0
    assert result.stderr.strip().endswith(f"failed with {', '.join(portable.settings(False))}")
