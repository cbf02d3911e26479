"""What steers a round: the share of a draft's noise that is reflected.

Whatever steers later rounds may look at rows up to and including the first refused one, never behind it: the noise of
a discarded row is used again when its step is drafted anew.
"""

from __future__ import annotations

import torch
from torch import Tensor

from free_kernels.ops.coupling import Coupling


class SlackPolicy:
    """Chooses lambda, the share of the draft's variance that is reflected, slot by slot.

    With mean gap m and relative variance error r over D elements, the expected squared gap is about ``m^2 / lambda +
    D r^2 / (4 lambda (1 - lambda))``; its minimiser is ``lambda = s / (1 + s)``, ``s^2 = 1 + 4 m^2 / (D r^2)``. Both
    are running means over the slot's own tested rows, so an image does not depend on its batch.

    Args:
        slots: S.
        decay: weight of the past in the running means.
        device: where the slots live.
    """

    LOWEST, HIGHEST = 0.5, 0.98

    def __init__(self, slots: int, device: torch.device, decay: float = 0.7) -> None:
        self._decay = decay
        # Rows: running means of the squared mean gap and variance error, decaying maximum of the variance's shrinkage.
        self.running = torch.zeros(3, slots, device=device)

    def share(self, length: int) -> Tensor:
        """Lambda ``[S, length]`` of the next round's rows."""
        mean_gap_sq, variance_gap_sq, shrinkage = self.running.unbind(0)
        odds = (mean_gap_sq / variance_gap_sq.clamp(min=1e-12)).mul_(4).add_(1).sqrt_()
        # An element whose variance shrinks below lambda times the draft's refuses the whole row: keep a margin of the
        # same size beyond the largest shrinkage seen lately.
        ceiling = (1 - 2 * shrinkage).clamp_(self.LOWEST, self.HIGHEST)
        share = torch.minimum(odds / (1 + odds), ceiling).clamp_(min=self.LOWEST)
        return share.unsqueeze(1).expand(-1, length)

    def update(self, coupling: Coupling, tested: Tensor) -> None:
        """Learn from the tested rows of a round, a bool mask ``[S, L - 1]``."""
        figures = coupling.variance_figures
        count = tested.sum(1)
        # Rows behind the first refusal must not be used, and a draft that was far off has no figures.
        known = torch.where(tested & figures.isfinite(), figures, 0.0)
        mean = known[:2].sum(2) / count.clamp(min=1)
        self.running[:2].lerp_(mean, (1 - self._decay) * (count > 0))
        self.running[2] = torch.maximum(self._decay * self.running[2], known[2].amax(1))

    def reset(self, slots: Tensor) -> None:
        """Forget the past of slots (a bool mask ``[S]``) that took in a new image."""
        self.running.masked_fill_(slots, 0.0)
