"""Rounds refused just before a training window: their rows correct the window's drafts, as in ``sample``."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from free_dit.training.drafter_config import DrafterTrainConfig
from free_dit.training.windows import Windows
from free_kernels.drafters.memory import FeatureMemory
from free_kernels.ops.drafting.reference import nearer
from free_kernels.protocols import Target


class TrainedDrafter(Protocol):
    """What other windows than a chain's own need of their loss: :class:`free_dit.training.drafter_loss.DrafterLoss`.

    Attributes:
        target: of whose features it learns.
        config: what the loss is.
        first_step: the first step that is drafted.
    """

    target: Target
    config: DrafterTrainConfig
    first_step: int

    def parents(self, windows: Windows, step: Tensor) -> Tensor:
        """Exact features before ``step``."""
        ...

    def draft(self, windows: Windows, feature: Tensor, step: Tensor, memory: FeatureMemory | None) -> Tensor:
        """The drafter's feature at the windows' own states of ``step``."""
        ...

    def draft_at(self, windows: Windows, feature: Tensor, previous: Tensor, state: Tensor, step: Tensor) -> Tensor:
        """The drafter's feature at any states of ``step``."""
        ...

    def transition(
        self, windows: Windows, feature: Tensor, state: Tensor, step: Tensor, guidance: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the next states."""
        ...


class RefusedRounds:
    """Rows that a round asked the target about whose first draft led to where a window begins, but was refused.

    Reflection is its own inverse: given the committed state ``mu_q + s z`` and the gap ``Delta = (mu_q - mu_p) / s``,
    the refused draft is ``mu_p + s (z - 2 Delta <z, Delta> / delta^2)``. From there the round goes on with the drafter
    and the chain's own noise, and one target call has all of its rows.

    Args:
        loss: whose drafter and target these are.
        windows: R windows.
        start: int64 ``[R]``, their first steps; a window that begins at the first drafted step has no round before it.
        guidance: float32 ``[R]``.
    """

    def __init__(self, loss: TrainedDrafter, windows: Windows, start: Tensor, guidance: Tensor) -> None:
        self._loss, self._windows, self._guidance = loss, windows, guidance.to(windows.y.device)
        last = windows.chain.num_steps - 2
        self._steps = [(start + ahead).clamp(max=last) for ahead in range(loss.config.unroll)]
        self._known = (start > loss.first_step).to(windows.y.device)
        parent = (start - 1).clamp(min=loss.first_step)
        with torch.no_grad():
            self._states = [windows.rows("states", parent), *self._drafted(parent)]
            # At the last committed row and at the round's.
            self._features = [windows.network.pick(windows.rows("features", parent)), *self._ask(self._states[1:])]

    def _drafted(self, parent: Tensor) -> list[Tensor]:
        """The round's states from the refused draft of step ``parent [R]`` on."""
        loss, windows = self._loss, self._windows
        previous, exact = windows.rows("states", parent), windows.rows("mean", parent)
        feature = loss.draft(windows, loss.parents(windows, parent), parent, None)
        mean, std = loss.transition(windows, feature, previous, parent, self._guidance)
        gap = ((exact - mean) / std).flatten(1)
        noise = self._noise(parent).flatten(1)
        along = (noise * gap).sum(1, keepdim=True) / gap.square().sum(1, keepdim=True).clamp(min=1e-12)
        states = [mean + std * (noise - 2 * along * gap).view_as(mean)]
        for step in self._steps[:-1]:
            feature = loss.draft_at(windows, feature, previous, states[-1], step)
            mean, std = loss.transition(windows, feature, states[-1], step, self._guidance)
            previous = states[-1]
            states.append(mean + std * self._noise(step))
        return states

    def _noise(self, step: Tensor) -> Tensor:
        """The normals that the chain used at ``step [R]``."""
        mean, std = self._windows.rows("mean", step), self._windows.rows("std", step)
        return (self._windows.rows("states", step + 1) - mean) / std

    def _ask(self, states: list[Tensor]) -> list[Tensor]:
        """The target's features ``[R', T, D]`` at the states of every draft, by one call."""
        windows, both = self._windows, self._windows.network.both
        t = torch.cat([both(windows.chain.timesteps[step.to(windows.y.device)]) for step in self._steps])
        rows = torch.cat([both(state) for state in states])
        return list(self._loss.target.features(rows, t, windows.y.repeat(len(states))).float().chunk(len(states)))

    def errors(self, ahead: int) -> Tensor:
        """What the drafter gets wrong at the round's row of draft ``ahead``, ``[R', T, D]``; 0 if it does not serve."""
        windows, step, there = self._windows, self._steps[ahead], self._states[ahead + 1]
        drafted = self._loss.draft_at(windows, self._features[ahead], self._states[ahead], there, step)
        state, previous = windows.rows("states", step), windows.rows("states", (step - 1).clamp(min=0))
        serves = self._known & nearer(state, previous, there)
        return torch.where(windows.network.both(serves).view(-1, 1, 1), self._features[ahead + 1] - drafted, 0.0)
