"""The README's figures are those of the committed results."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.skipif(not (ROOT / "benchmarks").exists(), reason="needs the source checkout")
def test_readme_tables_are_up_to_date():
    result = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "report.py", "--check"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
