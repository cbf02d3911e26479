"""The tables of docs/schedulers.md are what the measured figures make of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.skipif(not (DOCS / "schedulers.md").exists(), reason="needs the source checkout")
def test_the_page_is_made_of_the_figures(tmp_path):
    pytest.importorskip("diffusers")
    from benchmarks.report import store
    from benchmarks.sampler.bench_schedulers import fill

    page = Path(shutil.copy(DOCS / "schedulers.md", tmp_path))
    fill(page, store.RESULTS / "cpu" / "schedulers.json")
    assert page.read_text() == (DOCS / "schedulers.md").read_text()
