"""Renders the README's tables, ``docs/benchmarks.md`` and the rooflines from the committed results.

``--check`` writes nothing and says whether README and page are up to date.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.report.report_tables import benchmark_page, load_results, measured_roofs, ops_of, picture_name
from free_dit.markdown import decimals, filled, table

ROOT = Path(__file__).resolve().parents[2]


def load(path: Path) -> dict[str, Any]:
    """A committed JSON file."""
    return json.loads(path.read_text())


def call_reduction(figures: dict[str, Any]) -> list[str]:
    """Steps committed per round, by drafter, guidance and draft length."""
    lengths = sorted({run["draft_length"] for run in figures["call_reduction"]})
    lines = [
        f"Steps committed per packed target call on the bundled digits DiT, lossless, {figures['num_steps']} steps, "
        f"{figures['images']} images, learned variance (`python -m free_dit card`):",
        "",
    ]
    rows: dict[tuple[str, float], dict[int, float]] = {}
    for run in figures["call_reduction"]:
        rows.setdefault((run["drafter"], run["guidance"]), {})[run["draft_length"]] = run["call_reduction"]
    cells = ([name, f"{scale:g}", *decimals((row[x] for x in lengths), 2)] for (name, scale), row in rows.items())
    return [*lines, *table(["drafter", "guidance", *(f"L = {length}" for length in lengths)], cells)]


def wall_clock(report: dict[str, Any]) -> list[str]:
    """Ratios with their spread, and where the time goes."""
    facts = report["machine"]
    lines = [
        f"Wall-clock of `ancestral_sample` over `sample`, interleaved pairs, on {facts['cpu']} with "
        f"{facts['threads']} threads, torch {facts['torch']}, float32; compiled: "
        f"`torch.compile` of target and drafter on both sides (`{report['command']}`):",
        "",
        *table(
            ["drafter", "batch", "draft length", "compiled", "ratio", "range", "pairs"],
            (
                [
                    row["drafter"],
                    str(row["batch"]),
                    str(row["draft_length"]),
                    "yes" if row.get("compiled") else "no",
                    f"{row['median']:.2f}x",
                    f"{row['low']:.2f} to {row['high']:.2f}",
                    str(row["pairs"]),
                ]
                for row in report["ratios"]
            ),
        ),
    ]
    first = report["profiles"][0]
    parts = ", ".join(f"{name} {part['share']:.0%}" for name, part in first["parts"].items() if part["share"] >= 0.01)
    lines += [
        f"Where a round's time goes with the learned drafter at batch {first['batch']}, L = {first['draft_length']}: "
        f"{parts}. A round takes {first['ms_per_round']:.2f} ms, a step of the ordinary sampler "
        f"{first['ms_per_ordinary_step']:.2f} ms. Outside of the two networks and their tables, the target's head with "
        f"it, are {shares(first['outside_of_networks'])} of the rounds' time, and of the whole call's, its checks and "
        f"stats among it, {shares(first['outside_of_networks_with_start'])}.",
    ]
    return lines


def shares(found: dict[str, float]) -> str:
    """Median of a share, and its range."""
    return f"{found['median']:.1%} ({found['low']:.1%} to {found['high']:.1%} in single runs)"


def readme_section(root: Path) -> str:
    """Everything between the README's markers."""
    figures = load(root / "python/free_dit/models/digits/evaluation.json")
    report = load(root / "benchmarks/results/cpu/profile.json")
    more = "Single ops against their rivals, with rooflines: [docs/benchmarks.md](docs/benchmarks.md)."
    return "\n".join(["## Measured", "", *call_reduction(figures), *wall_clock(report), "", more])


def renewed_pages(root: Path) -> dict[Path, str]:
    """Text of every generated page."""
    readme = root / "README.md"
    compiled = [root / "benchmarks/results" / name for name in ("predicted_coupling.md", "ahead_of_time.md")]
    return {
        readme: filled(readme.read_text(), "results", readme_section(root)),
        root / "docs/benchmarks.md": benchmark_page(load_results(root / "benchmarks/results"))
        + "".join(f"\n{part.read_text()}" for part in compiled if part.exists()),
    }


def pictures(root: Path) -> dict[Path, tuple[str, list[dict[str, Any]], dict[str, Any]]]:
    """Rooflines by path: name of the device, its figures, its roofs."""
    found = {}
    for slug, files in load_results(root / "benchmarks/results").items():
        facts, entries = next(iter(files.values()))["machine"], ops_of(files)
        if any(entry["flops"] for entry in entries):
            name = facts.get("gpu") or facts["cpu"]
            found[root / "docs" / picture_name(slug)] = (name, entries, measured_roofs(files))
    return found


def check(root: Path) -> list[str]:
    """What is out of date, as paths below ``root``."""
    pages = renewed_pages(root)
    stale = [path for path, text in pages.items() if not path.exists() or path.read_text() != text]
    # A picture is not compared, since its bytes depend on the plotting library.
    stale += [path for path in pictures(root) if not path.exists()]
    return [str(path.relative_to(root)) for path in stale]


def main() -> None:
    """Rewrite what is generated, or check it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with status 1 if something is out of date")
    parser.add_argument("--root", type=Path, default=ROOT, help="of the checkout; this one")
    arguments = parser.parse_args()
    if arguments.check:
        stale = check(arguments.root)
        if stale:
            sys.exit(f"report: {', '.join(stale)} out of date; run python -m benchmarks.report.report")
        return
    for path, text in renewed_pages(arguments.root).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        print(f"wrote {path}")
    for path, contents in pictures(arguments.root).items():
        from benchmarks.report.roofline import roofline

        roofline(path, *contents)
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
