"""Merges the figures of ``run_gpu.py``'s calls into ``benchmarks/results``, where ``report.py`` reads them."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.report import store


def collect(folders: list[Path], results: Path = store.RESULTS) -> int:
    """Merge every results file below some output folders; returns the exit status.

    Figures of another machine than a file holds are refused, a dry run's are left out.
    """
    merged = 0
    for path in sorted(path for folder in folders for path in folder.glob("*/*.json")):
        held = json.loads(path.read_text())
        if held.keys() != {"machine", "roofs", "benchmarks"} or "gpu" not in held["machine"]:
            print(f"left out: {path}: not a GPU's figures")
            continue
        into = results / path.parent.name / path.name
        store.merge(into, held["machine"], held["benchmarks"], held["roofs"])
        print(f"{path}: {len(held['benchmarks'])} figures into {into}")
        merged += 1
    print(f"{merged} files merged")
    return int(merged == 0)
