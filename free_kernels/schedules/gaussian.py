"""A chain of Gaussian steps that is given by its coefficients."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from free_kernels.constants import TransitionColumn
from free_kernels.validation import fail


class Chain(NamedTuple):
    """The steps of a sampler in terms of the state x and the predicted clean sample x0, float64 ``[K]`` each.

    A step is ``FROM_STATE x + FROM_X0 x0 + std z`` with ``x0 = x0_from_state x + x0_from_output e``, e the network's
    output.

    Attributes:
        from_state: coefficient of x.
        from_x0: coefficient of x0.
        std: deviation of the noise; 0 where a step adds none.
        x0_from_state: coefficient of x in x0.
        x0_from_output: coefficient of e in x0.
        log_std_slope: how the logarithm of the deviation grows with the network's variance channels; None: not at all.
    """

    from_state: Tensor
    from_x0: Tensor
    std: Tensor
    x0_from_state: Tensor
    x0_from_output: Tensor
    log_std_slope: Tensor | None = None

    def columns(self) -> Tensor:
        """Coefficients float64 ``[K, 8]``, columns of :class:`TransitionColumn`."""
        columns = self.std.new_zeros(len(self.std), len(TransitionColumn), dtype=torch.float64)
        columns[:, TransitionColumn.X0_FROM_STATE] = self.x0_from_state
        columns[:, TransitionColumn.X0_FROM_OUTPUT] = self.x0_from_output
        columns[:, TransitionColumn.MEAN_FROM_X0] = self.from_x0
        columns[:, TransitionColumn.MEAN_FROM_STATE_GIVEN_X0] = self.from_state
        columns[:, TransitionColumn.MEAN_FROM_STATE] = self.from_state + self.from_x0 * self.x0_from_state
        columns[:, TransitionColumn.MEAN_FROM_OUTPUT] = self.from_x0 * self.x0_from_output
        columns[:, TransitionColumn.LOG_STD] = self.std.log()
        if self.log_std_slope is not None:
            columns[:, TransitionColumn.LOG_STD_SLOPE] = self.log_std_slope
        return columns


@dataclass(frozen=True, eq=False)
class GaussianSchedule:
    """Steps of any Gaussian chain, by their coefficients; made by :func:`free_kernels.schedule_from_diffusers`.

    Attributes:
        name: of what the steps were read from, for messages.
        timesteps: int64 ``[K]``, distinct and at least 0.
        columns: float64 ``[K, 8]``, columns of :class:`free_kernels.constants.TransitionColumn`. They act on the
            network's input: where a scheduler scales its state before the network has it, the chain is that of the
            scaled state.
        clip: bound of the predicted clean sample, or infinity.
        variance: ``"fixed"``, or ``"learned_range"`` where the deviation is the network's.
        family: ``"diffusion"``, or ``"flow"`` for networks that predict a velocity.
        num_train_steps: of the targets that it goes with; None: any.
        shown_timesteps: float32 ``[K]``, what the network is shown where that is not ``timesteps``; None: nothing else.
        init_noise_sigma: deviation of the first state.

    Raises:
        ValueError: two steps share a timestep, or a coefficient is not finite.
    """

    name: str
    timesteps: Tensor
    columns: Tensor
    clip: float = math.inf
    variance: str = "fixed"
    family: str = "diffusion"
    num_train_steps: int | None = None
    shown_timesteps: Tensor | None = None
    init_noise_sigma: float = 1.0

    def __post_init__(self) -> None:
        where, steps = "GaussianSchedule", self.timesteps.tolist()
        if len(set(steps)) < len(steps) or min(steps) < 0:
            repeated = sorted({step for step in steps if steps.count(step) > 1 or step < 0})
            fail(where, "timesteps", f"distinct and at least 0, of {self.name} (try fewer steps)", f"{repeated[:5]}")
        finite = self.columns.isfinite()
        finite[:, TransitionColumn.LOG_STD] |= self.columns[:, TransitionColumn.LOG_STD].isneginf()
        if not bool(finite.all()):
            step = int((~finite).any(1).nonzero()[0, 0])
            fail(
                where, "columns", f"finite, of {self.name}", f"{self.columns[step].tolist()} at timestep {steps[step]}"
            )

    @property
    def num_steps(self) -> int:
        """K."""
        return len(self.timesteps)

    def resolve_variance(self, learns_variance: bool) -> str:
        """The variance type in force for a target.

        Raises:
            ValueError: a learned variance of a target that learns none.
        """
        if self.variance == "learned_range" and not learns_variance:
            fail(self.name, "variance_type", "a fixed one for a target that learns no variance", self.variance)
        return self.variance

    def table(self, variance: str = "fixed") -> Tensor:
        """Transition coefficients, float32 ``[K, 8]``, rows in sampling order."""
        return self.columns.float()
