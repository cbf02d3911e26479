"""Roofline plot of a device: arithmetic intensity against achieved FLOP/s, under the roofs measured on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

MARKERS = "osD^vP"


def roofline(path: Path, name: str, entries: list[dict[str, Any]], roofs: dict[str, Any]) -> None:
    """Write the plot of all entries that compute something.

    Args:
        path: the PNG.
        name: of the device, for the title.
        entries: figures with op, backend, bytes, flops and gflop_per_s.
        roofs: copy_gb_per_s and matrix_gflop_per_s by dtype.
    """
    entries = [entry for entry in entries if entry["flops"]]
    intensity = np.array([entry["flops"] / entry["bytes"] for entry in entries])
    figure, axes = plt.subplots(figsize=(8, 6), layout="constrained")
    rates = roofs["matrix_gflop_per_s"]
    # From below the lowest point to well past every ridge.
    ridge = max(rates.values()) / roofs["copy_gb_per_s"]
    span = np.geomspace(min(intensity.min(), ridge, 1.0) / 8, 4 * max(intensity.max(), ridge), 200)
    for dtype, rate in rates.items():
        (line,) = axes.plot(span, np.minimum(roofs["copy_gb_per_s"] * span, rate), linewidth=1, color="0.3")
        label = f"{dtype} matrix product, {rate:,.0f} GFLOP/s"
        axes.annotate(label, (span[-1], rate), ha="right", va="bottom", fontsize=8, color=line.get_color())
    label = f"copy, {roofs['copy_gb_per_s']:,.0f} GB/s"
    axes.annotate(label, (span[8], roofs["copy_gb_per_s"] * span[8]), ha="left", va="top", fontsize=8, color="0.3")
    groups = sorted({(entry["op"], entry["backend"]) for entry in entries})
    ops = sorted({op for op, _ in groups})
    for op, backend in groups:
        chosen = [i for i, entry in enumerate(entries) if (entry["op"], entry["backend"]) == (op, backend)]
        axes.scatter(
            intensity[chosen],
            [entries[i]["gflop_per_s"] for i in chosen],
            marker=MARKERS[ops.index(op) % len(MARKERS)],
            label=f"{op}: {backend}",
            s=28,
            alpha=0.8,
        )
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte that has to move", ylabel="GFLOP/s", title=name)
    axes.grid(which="major", linewidth=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
