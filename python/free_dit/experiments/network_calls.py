"""Calls of a target and a drafter as the sampler makes them, and their times."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from free_dit.networks.families import device_of, schedule_for
from free_kernels.conditioning import hoisted
from free_kernels.protocols import Drafter, Target, new_memory


class NetworkCalls:
    """Calls with random states, all timesteps and two labels, after everything that depends on these was hoisted.

    Args:
        target: the target.
        rows: network rows of a call.
    """

    def __init__(self, target: Target, rows: int) -> None:
        device = device_of(target)
        self.rows, self.timesteps = rows, schedule_for(target, 250).timesteps.to(device)
        self.labels = torch.tensor([0, target.num_classes], device=device)
        at = torch.arange(rows, device=device)
        self.state = torch.randn(rows, *target.latent_shape, device=device)
        self.t, self.y = self.timesteps[at % len(self.timesteps)], self.labels[at % 2]
        self.network: Target = hoisted(target, self.timesteps, self.labels)  # type: ignore[assignment]

    def target(self) -> Tensor:
        """One call of the target: features and head."""
        return self.network.head(self.network.features(self.state, self.t, self.y), self.t, self.y)

    def drafter(self, drafter: Drafter) -> Callable[[], Tensor]:
        """A call of the drafter alone."""
        draft: Drafter = hoisted(drafter, self.timesteps, self.labels)  # type: ignore[assignment]
        memory = new_memory(draft, self.rows, 1, 1)
        remembered = {} if memory is None else {"memory": memory}
        feature, previous = self.network.features(self.state, self.t, self.y), torch.randn_like(self.state)
        return partial(draft, feature, previous, self.state, self.t, self.y, **remembered)

    def drafting(self, drafter: Drafter) -> Callable[[], Tensor]:
        """A drafting pass: the drafter and the target's head."""
        draft = self.drafter(drafter)
        return lambda: self.network.head(draft(), self.t, self.y)


def timed_in_turn(
    calls: dict[Any, Callable[[], object]],
    turns: int,
    device: torch.device,
    summary: Callable[[np.ndarray], float] = np.median,
) -> dict[Any, float]:
    """Seconds of each call, summarised over the turns; in every other turn the calls are made in reverse order."""
    names, seconds = list(calls), {name: np.empty(turns) for name in calls}
    for turn in tqdm(range(-2, turns), desc="calls", unit="turn", leave=False):
        for name in names if turn % 2 else reversed(names):
            began = time.perf_counter()
            calls[name]()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn >= 0:
                seconds[name][turn] = time.perf_counter() - began
    return {name: float(summary(times)) for name, times in seconds.items()}
