"""Renders the README's tables from the committed results; ``--check`` only says whether they are up to date."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


def load(name: str) -> dict[str, Any]:
    """A committed JSON file."""
    return json.loads((ROOT / name).read_text())


def call_reduction(figures: dict[str, Any]) -> list[str]:
    """Steps committed per round, by drafter, guidance and draft length."""
    lengths = sorted({run["draft_length"] for run in figures["call_reduction"]})
    lines = [
        f"Steps committed per packed target call on the bundled digits DiT, lossless, {figures['num_steps']} steps, "
        f"{figures['images']} images, learned variance (`python -m free_dit card`):",
        "",
        "| drafter | guidance | " + " | ".join(f"L = {length}" for length in lengths) + " |",
        "|---|---|" + "---|" * len(lengths),
    ]
    rows: dict[tuple[str, float], dict[int, float]] = {}
    for run in figures["call_reduction"]:
        rows.setdefault((run["drafter"], run["guidance"]), {})[run["draft_length"]] = run["call_reduction"]
    for (drafter, guidance), values in rows.items():
        lines.append(f"| {drafter} | {guidance:g} | " + " | ".join(f"{values[x]:.2f}" for x in lengths) + " |")
    return lines


def wall_clock(report: dict[str, Any]) -> list[str]:
    """Ratios with their spread, and where the time goes."""
    facts = report["machine"]
    lines = [
        f"Wall-clock of `ancestral_sample` over `sample`, learned drafter, interleaved pairs, on {facts['cpu']} with "
        f"{facts['threads']} threads, torch {facts['torch']}, float32, no compilation on either side "
        f"(`{report['command']}`):",
        "",
        "| batch | draft length | ratio | range | pairs |",
        "|---|---|---|---|---|",
    ]
    for row in report["ratios"]:
        span = f"{row['low']:.2f} to {row['high']:.2f}"
        lines.append(f"| {row['batch']} | {row['draft_length']} | {row['median']:.2f}x | {span} | {row['pairs']} |")
    first = report["profiles"][0]
    parts = ", ".join(f"{name} {part['share']:.0%}" for name, part in first["parts"].items() if part["share"] >= 0.01)
    lines += [
        "",
        f"Where a round's time goes at batch {first['batch']}, L = {first['draft_length']}: {parts}. A round takes "
        f"{first['ms_per_round']:.2f} ms, a step of the ordinary sampler {first['ms_per_ordinary_step']:.2f} ms.",
    ]
    return lines


def render() -> str:
    """Everything between the README's markers."""
    figures = load("python/free_dit/models/digits/evaluation.json")
    report = load("benchmarks/results/cpu/sampler.json")
    return "\n".join(["## Measured", "", *call_reduction(figures), "", *wall_clock(report)])


def main() -> None:
    """Rewrite the README, or check it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit with status 1 if the README is out of date")
    text = README.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    renewed = f"{before}{BEGIN}\n{render()}\n{END}{after}"
    if parser.parse_args().check:
        if renewed != text:
            sys.exit("report: README.md is out of date; run python benchmarks/report.py")
        return
    README.write_text(renewed)
    print(f"wrote {README}")


if __name__ == "__main__":
    main()
