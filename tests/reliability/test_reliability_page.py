"""docs/reliability.md is what the written-down faults make of it, and hides no test that failed."""

from __future__ import annotations

import json

import pytest
import render_reliability

FAULTS = render_reliability.DOCS / "reliability" / "faults.json"


@pytest.mark.skipif(not FAULTS.exists(), reason="needs the source checkout")
def test_the_page_is_made_of_the_log(tmp_path, monkeypatch):
    (tmp_path / "reliability").symlink_to(FAULTS.parent)
    monkeypatch.setattr("sys.argv", ["render", "--docs", str(tmp_path)])
    render_reliability.main()
    assert (tmp_path / "reliability.md").read_text() == (render_reliability.DOCS / "reliability.md").read_text()


def test_a_test_that_failed_is_shown(tmp_path):
    path = tmp_path / "log.json"
    entry = {"faults": {"a fault": {"survived": 3}}, "figures": {"seconds": 1.5}}
    render_reliability.write_log(path, {"tests/test_soak.py::test_a[1]": {**entry, "passed": True}})
    render_reliability.write_log(path, {"tests/test_new.py::test_b": {**entry, "passed": False}})
    page = render_reliability.render(json.loads(path.read_text()), None)
    assert "**6 faults in 2 tests**" in page
    assert "| a fault | 3 | survived |" in page
    assert "| a fault | 3 | TEST FAILED |" in page
    assert "1 tests FAILED: tests/test_new.py::test_b." in page
    assert "- seconds (1): 1.5" in page
    render_reliability.write_log(path, {"tests/test_soak.py::test_a[2]": {**entry, "passed": True}})
    assert list(json.loads(path.read_text())["tests"]) == ["tests/test_new.py::test_b", "tests/test_soak.py::test_a[2]"]


def test_kills_are_shown_where_they_were_measured():
    kill = {
        "command": "python -m free_dit generate",
        "signal": "SIGKILL",
        "kills": 20,
        "images": 500,
        "files_equal": True,
        "images_equal": False,
        "committed_files_written_again": 0,
        "machine": "x",
    }
    page = render_reliability.render({"tests": {}, "machine": "x", "python": "3", "torch": "2"}, kill)
    assert "| 500 | 20 | NOT EQUAL | equal | 0 |" in page
