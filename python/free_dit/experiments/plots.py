"""Pictures: grids of samples and curves over the chain."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from torch import Tensor


def sample_grids(path: Path, grids: dict[str, Tensor], labels: Tensor) -> None:
    """Side-by-side grids of images ``[N, C, H, W]`` in ``[-1, 1]``, each tile under its label."""
    count = len(labels)
    side = int(np.ceil(np.sqrt(count)))
    # A grid of few images is as wide as its title.
    width = max(0.62 * side, 0.1 * max(map(len, grids)) + 0.2)
    figure = plt.figure(figsize=(width * len(grids), 0.72 * side + 0.5), layout="constrained")
    for part, (title, images) in zip(np.atleast_1d(figure.subfigures(1, len(grids))), grids.items(), strict=True):
        part.suptitle(title)
        tiles = part.subplots(side, side, squeeze=False).flatten()
        for tile in tiles:
            tile.set_axis_off()
        for tile, image, label in zip(tiles, images, labels.tolist(), strict=False):
            pixels = ((image.clamp(-1, 1) + 1) / 2).permute(1, 2, 0).cpu().numpy()
            tile.imshow(pixels.squeeze(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            tile.set_title(str(label), fontsize=7, pad=1.5)
    _write(figure, path)


def acceptance_plot(path: Path, curves: dict[str, np.ndarray], title: str) -> None:
    """Acceptance of tested drafts against sampling step, one curve per run, smoothed over five steps."""
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    for name, curve in curves.items():
        known = np.isfinite(curve)
        if not known.any():
            continue
        steps = np.arange(len(curve))[known]
        smooth = np.convolve(np.pad(curve[known], 2, mode="edge"), np.ones(5) / 5, mode="valid")
        axes.plot(steps, smooth, label=f"{name} (mean {np.nanmean(curve):.3f})")
    axes.set(xlabel="sampling step k (0 = noise)", ylabel="acceptance rate", ylim=(0, 1.02), title=title)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(loc="lower left")
    _write(figure, path)


def _write(figure: plt.Figure, path: Path) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
