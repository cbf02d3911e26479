"""The command ``sweep``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from free_dit.commands.shared import console
from free_dit.devices import resolve_device
from free_dit.experiments.sweep import preset as sweep_preset
from free_dit.experiments.sweep import read_sweep, run_sweep


def sweep(
    out: Path,
    preset: Literal["quick", "full"] = "full",
    num: int | None = None,
    seed: int = 0,
    render_only: bool = False,
    device: str = "auto",
) -> None:
    """Calls, wall-clock, bias and quality of the bundled digits pair over draft lengths, relaxation, steps, guidance.

    Interrupt it at will: every finished configuration is kept, and the same command goes on with the next.

    Args:
        out: folder of sweep.json, sweep.md, sweep.png and the finished configurations.
        preset: "quick" (7 configurations, 50 steps) or "full".
        num: images of a configuration whose quality is measured; the preset's own number if None.
        seed: seed of all noise and of the bootstrap.
        render_only: renew sweep.md and sweep.png from sweep.json, and measure nothing.
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1" ...
    """
    from free_dit.experiments.sweep_page import write_report

    place = resolve_device("sweep", device)
    report = read_sweep(out) if render_only else run_sweep(out, *sweep_preset(preset, num, seed), place)
    table, picture = write_report(report, out)
    console.print(f"wrote {table} and {picture}" + ("" if render_only else f" from {out / 'sweep.json'}"))
