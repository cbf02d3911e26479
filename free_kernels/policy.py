"""What steers a round: the share of a draft's noise that is reflected.

Whatever steers later rounds may look at rows up to and including the first refused one, never behind it: the noise of
a discarded row is used again when its step is drafted anew.
"""

from __future__ import annotations

import torch
from torch import Tensor

from free_kernels.reference.coupling import Coupling


class SlackPolicy:
    """Chooses lambda, the share of the draft's variance that is reflected, slot by slot.

    With mean gap m and relative variance error r over D elements, the expected squared gap is about ``m^2 / lambda +
    D r^2 / (4 lambda (1 - lambda))``; its minimiser is ``lambda = s / (1 + s)`` with ``s^2 = 1 + 4 m^2 / (D r^2)``. Both are
    running means over the slot's own tested rows, so an image does not depend on its batch.

    Args:
        slots: S.
        decay: weight of the past in the running means.
        device: where the slots live.
    """

    LOWEST, HIGHEST = 0.5, 0.98

    def __init__(self, slots: int, device: torch.device, decay: float = 0.7) -> None:
        self._decay = decay
        self._mean_gap_sq = torch.zeros(slots, device=device)
        self._variance_gap_sq = torch.zeros(slots, device=device)
        self._shrink = torch.zeros(slots, device=device)

    def share(self, length: int) -> Tensor:
        """Lambda ``[S, length]`` of the next round's rows."""
        odds = (1 + 4 * self._mean_gap_sq / self._variance_gap_sq.clamp(min=1e-12)).sqrt_()
        # An element whose variance shrinks below lambda times the draft's refuses the whole row: keep twice the margin.
        ceiling = (1 - 2 * self._shrink).clamp_(self.LOWEST, self.HIGHEST)
        return torch.minimum(odds / (1 + odds), ceiling).clamp_(min=self.LOWEST).unsqueeze(1).expand(-1, length)

    def update(self, coupling: Coupling, lengths: Tensor) -> None:
        """Learn from the tested rows of a round."""
        rows = coupling.mean_gap_sq.shape[1]
        tested = torch.minimum(coupling.committed, lengths - 1)
        mask = torch.arange(rows, device=tested.device) < tested[:, None]
        count = mask.sum(1)
        weight = (1 - self._decay) * (count > 0)
        for running, figure in (
            (self._mean_gap_sq, coupling.mean_gap_sq),
            (self._variance_gap_sq, coupling.variance_gap_sq),
            (self._shrink, 1 - coupling.min_variance_ratio),
        ):
            mean = torch.where(mask, figure, 0.0).sum(1) / count.clamp(min=1)
            running.lerp_(mean, weight)

    def reset(self, slots: Tensor) -> None:
        """Forget the past of slots (a bool mask ``[S]``) that took in a new image."""
        for running in (self._mean_gap_sq, self._variance_gap_sq, self._shrink):
            running.masked_fill_(slots, 0.0)
