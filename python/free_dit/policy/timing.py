"""Milliseconds of a decision, methods in turn within one run."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from free_dit.policy.methods import Decide, chunks
from free_kernels.validation import check_int


def decision_times(
    deciders: Sequence[Decide], observations: Tensor, repeats: int, threads: int, progress: bool = False
) -> np.ndarray:
    """Seconds of single decisions, float64 ``[repeats, methods]``; row r decides on one observation by every method.

    All methods run once before the clock starts, and take turns in an order that moves on by one from row to row, so
    that what else the machine does falls on all of them. The threads of torch are restored at the end.

    Args:
        deciders: the methods.
        observations: ``[M, history, O]``, taken in turn.
        repeats: decisions of each method.
        threads: of torch.
        progress: show a bar.
    """
    check_int("decision_times", "repeats", repeats, 1)
    check_int("decision_times", "threads", threads, 1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    times = np.empty((repeats, len(deciders)))
    try:
        for decide in deciders:
            chunks(decide, observations[:1], 0, torch.zeros(1, dtype=torch.int64))
        rows = tqdm(range(repeats), desc=f"timing, {threads} threads", unit="decision", disable=not progress)
        for repeat in rows:
            place = repeat % len(observations)
            given, key = observations[place : place + 1], torch.tensor([repeat])
            for turn in range(len(deciders)):
                which = (turn + repeat) % len(deciders)
                started = time.perf_counter()
                chunks(deciders[which], given, 1, key)
                times[repeat, which] = time.perf_counter() - started
    finally:
        torch.set_num_threads(before)
    return times


def ratio_interval(ratios: np.ndarray, level: float) -> tuple[float, float, float]:
    """Median of ratios ``[n]`` and a distribution-free interval for it, from order statistics.

    Source: David and Nagaraja, "Order Statistics" (2003), section 7.1.
    """
    from scipy.stats import binom

    ordered, count = np.sort(ratios), len(ratios)
    below = int(binom.ppf((1 - level) / 2, count, 0.5))
    # With few ratios the interval is their whole range.
    low, high = max(below - 1, 0), min(count - below, count - 1)
    return float(np.median(ratios)), float(ordered[low]), float(ordered[high])
