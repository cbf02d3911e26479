"""The README's and the page's figures are those of the committed results, and results are kept as they should be."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
pytestmark = pytest.mark.skipif(not BENCHMARKS.exists(), reason="needs the source checkout")
MACHINE = {"cpu": "some CPU", "cores": 2, "torch": "2.0", "os": "Linux", "triton": None}
ROOFS = {"copy_gb_per_s": 20.0, "matrix_gflop_per_s": {"float32": 50.0}, "threads": 1}


def report(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.report.report", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def op_entry(op: str, backend: str, median: float, flops: int) -> dict[str, Any]:
    entry = {"op": op, "case": "6 rows", "backend": backend, "ours": backend == "ours", "dtype": "float32"}
    entry |= {"median_s": median, "iqr_s": median / 10, "bytes": 10**6, "flops": flops, "gb_per_s": 1e-3 / median}
    entry |= {"percent_of_copy": 5e-3 / median}
    if flops:
        entry |= {"gflop_per_s": flops / median / 1e9, "percent_of_matrix": flops / median / 5e8}
    return entry


def target_entry() -> dict[str, Any]:
    part = {"call_s": 0.01, "rho": [1 + 0.25 * x for x in range(8)], "d": 0.1}
    part |= {"rho_quartiles": [[1.0, 1.0]] * 8, "d_quartiles": [0.1, 0.1]}
    entry = {"model": "DiT-XL/2", "pixels": 256, "weights": "random", "dtype": "bfloat16", "mode": "CUDA graph"}
    return entry | {"plain": part, "guided": part}


def sampler_entry() -> dict[str, Any]:
    entry = {"op": "sample", "batch": 1, "draft_length": 6, "guidance": 1.0, "cuda_graphs": False, "threads": 2}
    entry |= {"dtype": "float32", "pairs": 5, "ratio": 1.8, "ratio_low": 1.7, "ratio_high": 1.9}
    return entry | {"ordinary_s": 0.5, "speculative_s": 0.3, "call_reduction": 5.2}


@pytest.fixture(scope="module")
def store() -> Any:
    from benchmarks.report import store

    return store


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, store: Any) -> Path:
    """What report.py reads, with made-up figures of the benchmarks, and what it has written from them."""
    root = tmp_path_factory.mktemp("checkout")
    for name in ("README.md", "python/free_dit/models/digits/evaluation.json", "benchmarks/results/cpu/profile.json"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    cpu = root / "benchmarks/results/cpu"
    couples = {name: op_entry("couple", name, median, 10**6) for name, median in (("ours", 1e-4), ("eager", 4e-4))}
    store.merge(cpu / "coupling.json", MACHINE, couples, ROOFS)
    store.merge(cpu / "packing.json", MACHINE, {"pack": op_entry("pack_drafts", "ours", 2e-5, 0)}, ROOFS)
    store.merge(cpu / "target.json", MACHINE, {"XL": target_entry()})
    store.merge(cpu / "sampler.json", MACHINE, {"batch1": sampler_entry()})
    result = report("--root", root)
    assert result.returncode == 0, result.stderr
    assert report("--root", root, "--check").returncode == 0
    return root


@pytest.fixture
def checkout(written: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change."""
    return shutil.copytree(written, tmp_path / "checkout")


def test_generated_pages_are_up_to_date() -> None:
    result = report("--check")
    assert result.returncode == 0, result.stderr


def test_page_shows_ratio_roofline_and_break_even(checkout: Path) -> None:
    page = (checkout / "docs/benchmarks.md").read_text()
    assert "| eager | 400 us | 40.0 us | 2.50 | 12.5% | 2.50 | 5.00% | 4.00x |" in page
    # rho(6) = 2.25 and five drafting steps of 0.1.
    assert "| 2.25 | 2.75 | 0.100 | 1.35 | 2.05 | 2.75 | 3.45 |" in page
    assert "| 1 | 1 | 6 | no | 1.80x | 1.70 to 1.90 | 5.20 | 500 ms |" in page
    assert "(roofline_cpu.png)" in page
    assert (checkout / "docs/roofline_cpu.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("file", "figure", "page"),
    [
        ("cpu/coupling.json", ("ours", "median_s"), "docs/benchmarks.md"),
        ("cpu/packing.json", ("pack", "gb_per_s"), "docs/benchmarks.md"),
        ("cpu/target.json", ("XL", "guided", "d"), "docs/benchmarks.md"),
        ("cpu/sampler.json", ("batch1", "ratio_low"), "docs/benchmarks.md"),
        ("cpu/profile.json", (0, "median"), "README.md"),
    ],
)
def test_check_finds_a_perturbed_figure(checkout: Path, file: str, figure: tuple[Any, ...], page: str) -> None:
    path = checkout / "benchmarks/results" / file
    contents = json.loads(path.read_text())
    *steps, last = figure
    held = contents["ratios" if page == "README.md" else "benchmarks"]
    for step in steps:
        held = held[step]
    held[last] *= 1.1
    path.write_text(json.dumps(contents))
    result = report("--root", checkout, "--check")
    assert result.returncode == 1
    assert page in result.stderr


def test_check_finds_an_edited_page_and_a_missing_picture(checkout: Path) -> None:
    page, picture = checkout / "docs/benchmarks.md", checkout / "docs/roofline_cpu.png"
    page.write_text(page.read_text().replace("4.00x", "5.00x"))
    picture.unlink()
    result = report("--root", checkout, "--check")
    assert result.returncode == 1
    assert "docs/benchmarks.md, docs/roofline_cpu.png" in result.stderr


def test_merging_keeps_what_was_not_measured_again(tmp_path: Path, store: Any) -> None:
    path = tmp_path / "cpu/coupling.json"
    store.merge(path, MACHINE, {"a": {"median_s": 1.0}, "b": {"median_s": 2.0}}, ROOFS)
    store.merge(path, MACHINE, {"b": {"median_s": 3.00001}, "c": {"median_s": 4.0}})
    held = store.load(path)
    assert held["benchmarks"] == {"a": {"median_s": 1.0}, "b": {"median_s": 3.0}, "c": {"median_s": 4.0}}
    assert held["roofs"] == ROOFS
    assert held["machine"] == MACHINE


def test_machines_are_not_mixed(checkout: Path, store: Any) -> None:
    path = checkout / "benchmarks/results/cpu/coupling.json"
    before = path.read_text()
    with pytest.raises(store.MixedMachinesError, match=r"torch '2.0' there and '2.1' here"):
        store.merge(path, MACHINE | {"torch": "2.1"}, {"a": {"median_s": 1.0}})
    assert path.read_text() == before
    # Files of one folder are of one machine too.
    path.write_text(before.replace('"2.0"', '"2.1"'))
    assert "another machine" in report("--root", checkout, "--check").stderr


def test_a_benchmark_run_writes_short_results_and_merges(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark")

    def bench(test: str) -> dict[str, Any]:
        options = ["--benchmark-only", "--quick", "--results", tmp_path, "-q", "-p", "no:cacheprovider"]
        command = [sys.executable, "-m", "pytest", f"{BENCHMARKS / 'ops' / 'bench_packing.py'}::{test}", *options]
        # Inside a parallel run of the tests pytest-benchmark would measure nothing.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
        result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
        assert result.returncode == 0, result.stdout[-3000:]
        return json.loads((tmp_path / "cpu/packing.json").read_text())["benchmarks"]

    drawing, packing = "test_philox_normal[6x64-reference]", "test_pack_drafts[plain-digits-1-reference]"
    first = bench(drawing)
    both = bench(packing)
    assert list(first) == [drawing]
    assert both.keys() == {drawing, packing}
    assert both[drawing] == first[drawing]
    entry = both[packing]
    assert entry["op"] == "pack_drafts"
    assert entry["flops"] == 0
    assert entry["bytes"] == 2 * 6 * 64 * 4
    assert {"median_s", "iqr_s", "min_s", "max_s", "gb_per_s", "percent_of_copy", "params", "threads"} <= entry.keys()


def test_the_page_says_whether_it_has_figures_of_a_gpu(checkout: Path, store: Any) -> None:
    page = checkout / "docs/benchmarks.md"
    assert report("--root", checkout).returncode == 0
    assert "No GPU could be had for this revision" in page.read_text()
    entry = {"steps": 100, "images": 3, "batch": 1, "dtype": "bfloat16", "pairs": 5, "ratio": 1.5, "ratio_low": 1.4}
    entry |= {"ratio_high": 1.6, "ordinary_s": 0.6, "call_reduction": 3.0, "round_over_step": 2.0}
    there = checkout / "benchmarks/results/some-gpu/xl.json"
    store.merge(there, MACHINE | {"gpu": "some GPU"}, {"256, guided, all accepted": entry})
    assert report("--root", checkout).returncode == 0
    assert "No GPU could be had" not in page.read_text()
    row = "| 256, guided, all accepted | 1.50x | 1.40 to 1.60 (5) | 3.00 | 2.00 | 2.00 ms |"
    assert row in page.read_text()


def test_figures_of_several_gpu_calls_are_collected(tmp_path: Path, store: Any) -> None:
    from benchmarks.gpu import gpu_collect

    gpu, results = MACHINE | {"gpu": "some GPU"}, tmp_path / "results"
    for call, name in (("b", "own"), ("c", "compiled")):
        store.merge(tmp_path / call / "some-gpu/coupling.json", gpu, {name: {"median_s": 1.0}}, ROOFS)
        (tmp_path / call / f"summary_{call}.json").write_text("{}")
    store.merge(tmp_path / "b/cpu/packing.json", MACHINE, {"dry": {"median_s": 1.0}})
    assert gpu_collect.collect([tmp_path / "b", tmp_path / "c"], results) == 0
    assert [path.relative_to(results) for path in results.rglob("*.json")] == [Path("some-gpu/coupling.json")]
    assert store.load(results / "some-gpu/coupling.json")["benchmarks"].keys() == {"own", "compiled"}
    assert gpu_collect.collect([tmp_path / "b/cpu"], results) == 1
    other = gpu | {"torch": "2.1"}
    store.merge(tmp_path / "d/some-gpu/coupling.json", other, {"own": {"median_s": 1.0}})
    with pytest.raises(store.MixedMachinesError):
        gpu_collect.collect([tmp_path / "d"], results)


def test_an_op_whose_operations_are_counted_in_some_cases_only():
    from benchmarks.report.report_tables import op_tables

    text = "\n".join(op_tables([op_entry("couple", "ours", 1e-3, 10**6), op_entry("couple", "eager", 2e-3, 0)]))
    assert "GFLOP/s" in text
    assert "| eager | 2.00 ms | 200 us | 0.500 | 2.50% |  |  | 2.00x |" in text
