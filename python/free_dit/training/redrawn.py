"""Training windows whose noise is drawn anew, so that no draft is learned twice."""

from __future__ import annotations

import torch
from torch import Tensor

from free_dit.training.refused_rounds import TrainedDrafter
from free_dit.training.windows import Windows


class RedrawnWindows:
    """The chains' windows with other noise from the step before the first one on.

    A set of chains has one noise at each of its steps, and a drafter that meets it often enough learns it by heart.
    Here the target's transition of the step before a window is drawn from again, and the target is asked about the
    state that comes of it, then about the next, ``unroll`` calls in all. A window that begins at step 0, where there
    is no transition, has the chain's own first state.

    Args:
        loss: whose target this is, and how many steps a window has; those behind the chain's last draft hold no data.
        windows: R windows; R' network rows.
        start: int64 ``[R]``, their first steps.
        guidance: float32 ``[R]``.

    Attributes:
        states: of each step ``[R, ...]``, of the latent's shape.
        features: the target's there, of each step ``[R', T, D]``.
        means: of each step's transition, like ``states``.
        stds: its deviations, like ``states``.
    """

    def __init__(self, loss: TrainedDrafter, windows: Windows, start: Tensor, guidance: Tensor) -> None:
        self.states: list[Tensor] = []
        self.features: list[Tensor] = []
        self.means: list[Tensor] = []
        self.stds: list[Tensor] = []
        here, last, both = windows.y.device, windows.chain.num_steps - 2, windows.network.both
        guidance, before = guidance.to(here), (start - 1).clamp(min=0)
        drawn = _draw(windows.rows("mean", before), windows.rows("std", before))
        at_first_step = (start == 0).to(here).view(-1, *[1] * (drawn.ndim - 1))
        state = torch.where(at_first_step, windows.rows("states", start), drawn)
        with torch.no_grad():
            for ahead in range(loss.config.unroll):
                step = (start + ahead).clamp(max=last)
                t = both(windows.chain.timesteps[step.to(here)])
                feature = loss.target.features(both(state), t, windows.y)
                mean, std = loss.transition(windows, feature, state, step, guidance)
                self.states.append(state)
                self.features.append(feature.float())
                self.means.append(mean)
                self.stds.append(std)
                state = _draw(mean, std)


def _draw(mean: Tensor, std: Tensor) -> Tensor:
    """Normals of these means and deviations; drawn on the host, as all that an iteration draws."""
    return torch.addcmul(mean, std, torch.randn(mean.shape).to(mean))
