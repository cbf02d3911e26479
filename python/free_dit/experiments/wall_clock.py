"""Wall-clock ratios of two samplers on this machine."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from free_kernels import SampleResult


@dataclass(frozen=True)
class Ratio:
    """Wall-clock of the ordinary sampler over the speculative one, pair by pair.

    Attributes:
        batch: images per call.
        median: median ratio; above 1 speculation is faster.
        low: smallest ratio.
        high: largest ratio.
        ordinary_s: median seconds of ``ancestral_sample``.
        speculative_s: median seconds of ``sample``.
        pairs: interleaved pairs measured.
    """

    batch: int
    median: float
    low: float
    high: float
    ordinary_s: float
    speculative_s: float
    pairs: int


def wall_clock_ratio(
    ordinary: Callable[[int], SampleResult],
    speculative: Callable[[int], SampleResult],
    batch: int,
    pairs: int,
    warm_ups: int = 1,
) -> Ratio:
    """Run both alternately on seeds 1 ... pairs, after warm-up pairs on others; the order in a pair alternates too."""
    for seed in (0, *range(pairs + 1, pairs + warm_ups)):
        ordinary(seed), speculative(seed)
    times = np.empty((pairs, 2))
    for pair in tqdm(range(pairs), desc=f"timing batch {batch}", unit="pair", leave=False):
        runs = (ordinary, speculative)
        for which in (0, 1) if pair % 2 == 0 else (1, 0):
            times[pair, which] = runs[which](pair + 1).stats.elapsed_s
    ratios = times[:, 0] / times[:, 1]
    medians = np.median(times, axis=0)
    return Ratio(batch, float(np.median(ratios)), float(ratios.min()), float(ratios.max()), *map(float, medians), pairs)


def machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Processor, threads, torch and system of this machine, and the GPU if it ran on one, beside every timing."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        name = next((x.split(":")[1].strip() for x in cpuinfo.read_text().splitlines() if "model name" in x), name)
    facts = {"cpu": name, "threads": torch.get_num_threads(), "torch": torch.__version__, "os": platform.system()}
    device = torch.device(device)
    return facts | ({"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {})
