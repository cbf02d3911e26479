"""The report of an evaluation as Markdown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from free_dit.markdown import table


def _cell(estimate: dict[str, Any] | None, digits: int) -> str:
    if estimate is None:
        return "-"
    return f"{estimate['value']:.{digits}g} [{estimate['low']:.{digits}g}, {estimate['high']:.{digits}g}]"


def render(report: dict[str, Any]) -> str:
    """The report as Markdown tables."""
    title, sets = report["extractor"]["name"], report["sets"]
    names = ("frechet", "kernel_distance", "score", "precision", "recall", "accuracy")
    keys = [f"{name}_{title}" for name in names if any(f"{name}_{title}" in one["metrics"] for one in sets.values())]
    level, size = f"{report['settings']['level']:.0%}", report["reference"]["images"]
    columns = [f"`{key}`" for key in keys]

    def cells(metrics: dict[str, Any], test: dict[str, Any] | None, digits: int) -> list[str]:
        p_value = "-" if test is None else f"{test['p_value']:.3f}"
        return [*(_cell(metrics.get(key), digits) for key in keys), p_value]

    rows = []
    for name, one in sets.items():
        test = (one["metrics"].get(f"kernel_distance_{title}") or {}).get("two_sample_test")
        rows.append([name, str(one["images"]), *cells(one["metrics"], test, 4)])
    lines = [
        f"Against `{Path(report['reference']['source']).name}` ({'statistics' if size is None else f'{size} images'}), "
        f"with {level} intervals:",
        "",
        *table(["set", "images", *columns, "p-value"], rows),
    ]
    if report["differences"]:
        lines += [f"Minus `{report['compared_with']}`:", ""]
        rows = [[name, *cells(one, one["two_sample_test"], 3)] for name, one in report["differences"].items()]
        lines += table(["set", *columns, "p-value of equal laws"], rows)
    return "\n".join([*lines, *_notes(report)])


def _notes(report: dict[str, Any]) -> list[str]:
    """What the tables leave out: the published forms of figures, and what a p-value is of."""
    title, notes = report["extractor"]["name"], []
    for name, one in report["sets"].items():
        metrics = one["metrics"]
        found = metrics[f"score_{title}"]
        low, high = found["split_mean_range"]
        notes.append(
            f"- `{name}`: score over {found['splits']} parts, as it is usually published, {found['split_mean']:.4g} +- "
            f"{found['split_std']:.2g}; over {found['split_permutations']} permutations of the images (seed "
            f"{found['split_seed']}) the mean is {low:.4g} to {high:.4g}."
        )
        distance = metrics.get(f"fid_{title}")
        if distance is not None:
            notes.append(f"- `{name}`: FID {distance['value']:.4f}, of all {distance['images']} images, with its bias.")
        test = (metrics.get(f"kernel_distance_{title}") or {}).get("two_sample_test")
        notes += _test_note(name, test)
    for name, one in report["differences"].items():
        notes += _test_note(f"{name} minus {report['compared_with']}", one["two_sample_test"])
    return [*notes, ""]


def _test_note(name: str, test: dict[str, Any] | None) -> list[str]:
    if test is None or test["within_classes"]:
        return []
    return [f"- `{name}`: the p-value is over all images, not within classes: {test['over_all_because']}."]
