"""Costs of a second process: messages between the two, and the slowdown of one while the other is busy.

Run ``torchrun --nproc-per-node 2 -m free_dit.experiments.scale.link OUT.json MODEL {cpu,cuda}``; the command
``scale-model`` does.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from free_dit.experiments.network_calls import NetworkCalls
from free_dit.loading import load_target

SIZES = (8, 1_000, 10_000, 100_000, 1_000_000, 4_000_000)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def link_cost(sizes: np.ndarray, seconds: np.ndarray) -> tuple[float, float]:
    """Latency and bytes per second that fit one-way times of messages of so many bytes, in relative errors."""
    from scipy.optimize import nnls

    features = np.stack([np.ones_like(seconds), sizes], axis=1) / seconds[:, None]
    (latency, per_byte), _ = nnls(features, np.ones_like(seconds))
    return float(latency), float("inf") if per_byte == 0 else float(1 / per_byte)


def ping(device: torch.device, repeats: int = 60) -> dict[str, Any]:
    """One-way seconds of messages between ranks 0 and 1, and the link that fits them; both call it."""
    rank, times = dist.get_rank(), []
    for size in SIZES:
        message = torch.zeros(size, dtype=torch.uint8, device=device)
        taken = np.empty(repeats)
        for turn in range(-3, repeats):
            began = time.perf_counter()
            for sender in (0, 1):
                (dist.send if rank == sender else dist.recv)(message, 1 - rank)
            _wait(device)
            if turn >= 0:
                taken[turn] = (time.perf_counter() - began) / 2
        times.append(float(np.median(taken)))
    latency, bandwidth = link_cost(np.array(SIZES, float), np.array(times))
    return {"link_latency": latency, "link_bandwidth": bandwidth, "sizes": list(SIZES), "seconds": times}


def neighbour_slowdown(call: Callable[[], object], device: torch.device, turns: int = 30, calls: int = 5) -> float:
    """Time of rank 0's call while rank 1 makes the same calls, over its time while rank 1 waits; at least 1."""
    ratios = []
    for turn in range(-1, turns):
        seconds = []
        for busy in (False, True):
            dist.barrier()
            if dist.get_rank() == 0 or busy:
                began = time.perf_counter()
                for _ in range(calls):
                    call()
                _wait(device)
                seconds.append(time.perf_counter() - began)
        if turn >= 0:
            ratios.append(seconds[-1] / seconds[0])
    return max(1.0, float(np.median(ratios)))


def link_cost_and_slowdown(call: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """Cost of messages and slowdown, measured by two processes that both call this; rank 0's values count."""
    found = ping(device)
    found["slowdown"] = neighbour_slowdown(call, device)
    return found


def main() -> None:
    """Measure as one of two processes; rank 0 writes the result."""
    out, model, kind = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    device = torch.device(kind) if kind == "cpu" else torch.device(kind, int(os.environ["LOCAL_RANK"]))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    target, _ = load_target(model, device, **json.loads(sys.argv[4]))
    with torch.inference_mode():
        found = link_cost_and_slowdown(NetworkCalls(target, 8).target, device)
    if dist.get_rank() == 0:
        out.write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
