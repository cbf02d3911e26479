"""The page of an evaluation of a policy."""

from __future__ import annotations

from typing import Any

from free_dit.markdown import table

TITLES = {
    "ordinary": "ordinary, DDPM 100 steps",
    "lossless": "lossless",
    "relaxed": "relaxed",
    "ddim-10": "DDIM, 10 steps",
    "ddim-16": "DDIM, 16 steps",
}


def _range(estimate: dict[str, float], digits: int, sign: str = "") -> str:
    value, low, high = (f"{estimate[name]:{sign}.{digits}f}" for name in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def render(report: dict[str, Any]) -> str:
    """Markdown tables of a report of :class:`free_dit.policy.evaluate.Evaluation`."""
    settings, rows, expert = report["settings"], report["methods"], report["expert"]
    level, drafter = f"{100 * settings['level']:g} %", report["identity"]["drafter"]
    lines = [
        f"{settings['episodes']} episodes in closed loop, the same scenes and noise for every method; drafter "
        f"{drafter if drafter == 'frozen' else f'of SHA-256 {drafter[:12]}'}, draft length {settings['draft_length']}, "
        f"relaxation {settings['relaxation']:g}; intervals of {level}.",
        f"The planner, whose demonstrations it learned from, reaches the goal in {_range(expert['success'], 3)} and "
        f"passes the obstacle on the left in {expert['left']:.2f}.",
        "",
    ]
    headings = ("method", "success", "minus ordinary", "contacts", "passed left", "network calls per decision")
    lines += table(
        headings,
        (
            (
                TITLES[name],
                _range(row["success"], 3),
                _range(row["success_minus_ordinary"], 3, "+") if name != "ordinary" else "",
                str(row["hit"]),
                f"{row['left']:.2f}",
                f"{row['network_calls_per_decision']:.1f}",
            )
            for name, row in rows.items()
        ),
    )
    lines += [
        f"Laws of actions: energy distance from the ordinary sampler's over {settings['draws']} chunks at each of "
        f"{settings['observations']} observations, in units of the actions; around 0, of either sign, where the laws "
        "are equal. The p-value is that of equal laws. The ordinary sampler is compared with itself under other noise.",
        "",
    ]
    headings = ("method", "energy distance", "p")
    lines += table(
        headings,
        ((TITLES[name], _range(row["energy_distance"], 4, "+"), f"{row['p_value']:.3f}") for name, row in rows.items()),
    )
    for times in report["times"]:
        facts = report["machine"]
        lines += [
            f"Milliseconds of a decision at batch 1, threads: {times['threads']}; {settings['repeats']} decisions of "
            f"each method in turn, on {facts['cpu']}, torch {facts['torch']}; medians, with intervals of the ratios.",
            "",
        ]
        lines += table(
            ("method", "ms", "times faster than ordinary"),
            (
                (
                    TITLES[name],
                    f"{times[name]['milliseconds']:.1f}",
                    _range(times[name]["faster"], 2) if name != "ordinary" else "",
                )
                for name in rows
            ),
        )
    return "\n".join(lines)
