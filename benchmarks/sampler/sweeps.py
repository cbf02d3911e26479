"""A sampler that refines a window of steps by sweeps of one target call each, to stand beside speculative sampling.

Source: ParaDiGMS (Shih et al. 2023, arXiv 2305.16317) samples by Picard iteration. All noise is drawn beforehand; a
window of states is asked about at once, the steps are taken again with what the target said, and the window slides past
the steps whose states no longer move by more than a share of the noise of a step. Here steps are taken anew with their
linear part exact, so that only the network's output is iterated, and states that enter the window start from the last
known output, not from a copy of the last state; both make it converge in fewer sweeps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from free_kernels.constants import Purpose
from free_kernels.ops.coupling import gaussian_transition
from free_kernels.protocols import Schedule, Target
from free_kernels.sampling.noise import PhiloxNoise
from free_kernels.validation import check_float, check_int


@dataclass(frozen=True)
class Swept:
    """Images of the sweeping sampler.

    Attributes:
        samples: ``[N, C, H, W]``.
        calls: target calls of an image, mean over images.
        rows: rows in them, mean over images.
    """

    samples: Tensor
    calls: float
    rows: float


@torch.no_grad()
def sample_by_sweeps(
    target: Target, labels: Tensor, schedule: Schedule, *, window: int, tolerance: float, seed: int
) -> Swept:
    """Images of ``labels [N]``, one after the other, with the noise that ``ancestral_sample`` uses for this seed.

    The window's first state is final, so that a sweep fixes at least one step: with a window of 1 this is the ordinary
    sampler. A further step is fixed where its state was within the tolerance of what it came out as, and with tolerance
    0 the images are the ordinary sampler's to rounding. No guidance.

    Args:
        target: the network.
        labels: int64 ``[N]``.
        schedule: its Gaussian steps.
        window: rows of a call, at most.
        tolerance: root mean square over elements, in deviations of the step that leads to the state.
        seed: of all noise.

    Raises:
        ValueError, TypeError: a window below 1 or a negative tolerance.
    """
    check_int("sample_by_sweeps", "window", window, 1)
    check_float("sample_by_sweeps", "tolerance", tolerance, 0.0)
    chain = _Chain(target, schedule, seed)
    images, calls, rows = [], 0, 0
    for image, label in enumerate(labels):
        state, sizes = chain.run(image, label, window, tolerance)
        images.append(state)
        calls, rows = calls + len(sizes), rows + sum(sizes)
    return Swept(torch.stack(images), calls / len(labels), rows / len(labels))


class _Chain:
    """The chain of a target.

    Args:
        target: the network.
        schedule: its Gaussian steps.
        seed: of all noise.
    """

    def __init__(self, target: Target, schedule: Schedule, seed: int) -> None:
        self._target, self._timesteps, self._noise = target, schedule.timesteps, PhiloxNoise(seed)
        self._table = schedule.table(schedule.resolve_variance(target.learns_variance))

    def _draw(self, image: int, steps: Tensor, purpose: Purpose) -> Tensor:
        """Normals ``[n, C, H, W]`` of an image at ``steps [n]``."""
        return self._noise.normal(torch.full_like(steps, image), steps, purpose, tuple(self._target.latent_shape))

    def run(self, image: int, label: Tensor, window: int, tolerance: float) -> tuple[Tensor, list[int]]:
        """The image ``[C, H, W]`` and the rows of each call."""
        num_steps = len(self._timesteps)
        noise = self._draw(image, torch.arange(num_steps), Purpose.STEP)
        state = self._draw(image, torch.zeros(1, dtype=torch.int64), Purpose.INITIAL)
        step, sizes = 0, []
        # The target's outputs at the steps ahead as last asked about, and the states that they make.
        states: list[Tensor] = []
        output: Tensor | None = None
        while step < num_steps:
            states = [state, *states]
            # The first call has nothing to start from.
            count = 1 if output is None else min(window, num_steps - step)
            while len(states) < count:
                states.append(self._step(states[-1], output[-1:], step + len(states) - 1, noise)[0])
            steps = torch.arange(step, step + count)
            t, y = self._timesteps[steps], label.expand(count)
            asked = torch.cat(states[:count])
            output = self._target.head(self._target.features(asked, t, y), t, y)
            sizes.append(count)
            made, fixed = [], 0
            for j in range(count):
                before = made[-1] if made else state
                after, std = self._step(before, output[j : j + 1], step + j, noise)
                made.append(after)
                # The state at which the next step was asked about has not moved.
                if fixed == j and j + 1 < count and _distance(after, states[j + 1], std) <= tolerance:
                    fixed = j + 1
            state, states = made[fixed], made[fixed + 1 :]
            step += fixed + 1
        return state[0], sizes

    def _step(self, state: Tensor, output: Tensor, step: int, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The state after a step from ``state [1, C, H, W]``, and the step's deviation."""
        mean, std = gaussian_transition(state, output, self._table[step : step + 1])
        return torch.addcmul(mean, std, noise[step]), std


def _distance(state: Tensor, other: Tensor, std: Tensor) -> float:
    """Root mean square of the whitened difference; elements without noise count as they are."""
    return float(((state - other) / torch.where(std > 0, std, 1.0)).square().mean().sqrt())
