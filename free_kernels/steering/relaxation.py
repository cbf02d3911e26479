"""Relaxed acceptance: more steps a round for a bias that is bounded and reported."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from free_kernels.constants import TransitionColumn
from free_kernels.ops.coupling import Coupling
from free_kernels.validation import check_choice, check_float, fail

SOURCES = ("deviation", "variance")


@dataclass(frozen=True)
class Relaxation:
    """How far acceptance is loosened: a row of weight w is accepted with probability ``2 Phi(-(1 - w) delta / 2)``.

    ``w = min(w_max, strength * u)`` with an uncertainty u in [0, 1) of the step, known before the row's own noise. The
    exact rule is w = 0. Source: our reconstruction of FREE (relax), arXiv 2511.20390.

    Args:
        strength: at least 0; 0 is lossless, bit for bit.
        w_max: largest weight, in [0, 1).
        source: ``"deviation"``: ``u = r / (1 + r)`` with r the running mean of the squared whitened deviation between
            drafted and reference outputs over the image's own tested rows. ``"variance"``: where the drafted variance
            stands in the target's learned range, on average over the elements.

    Raises:
        ValueError, TypeError: an argument is out of range.
    """

    strength: float
    w_max: float = 0.9
    source: str = "deviation"

    def __post_init__(self) -> None:
        check_float("Relaxation", "strength", self.strength, 0.0)
        if check_float("Relaxation", "w_max", self.w_max, 0.0) >= 1.0:
            fail("Relaxation", "w_max", "in [0, 1)", f"{self.w_max:g}")
        check_choice("Relaxation", "source", self.source, SOURCES)


def as_relaxation(where: str, relaxation: object, learned: bool, verification: str) -> Relaxation | None:
    """A sampler's ``relaxation`` argument, None where it is lossless.

    Raises:
        ValueError, TypeError: neither a number nor a :class:`Relaxation`, or one that the other arguments do not allow.
    """
    if not isinstance(relaxation, Relaxation):
        relaxation = Relaxation(check_float(where, "relaxation", relaxation, 0.0))
    if relaxation.strength == 0.0 or relaxation.w_max == 0.0:
        return None
    if verification != "token":
        fail(where, "relaxation", f"0 with verification {verification!r}", f"{relaxation.strength:g}")
    if relaxation.source == "variance" and not learned:
        fail(where, "relaxation", "source 'deviation' where the variance is fixed", repr(relaxation.source))
    return relaxation


class RelaxationPolicy:
    """Weights of a round's rows, slot by slot, from that slot's past.

    Args:
        relaxation: strength and source.
        slots: S.
        device: where the slots live.
        decay: weight of the past in the running mean.
    """

    def __init__(self, relaxation: Relaxation, slots: int, device: torch.device, decay: float = 0.7) -> None:
        self.relaxation = relaxation
        # A tensor: a number times a mask would be of torch's default dtype.
        self._share = torch.full((), 1 - decay, dtype=torch.float32, device=device)
        self.running = torch.zeros(slots, dtype=torch.float32, device=device)

    def weights(self, draft_std: Tensor, columns: Tensor) -> Tensor:
        """Weights ``[S, L]`` from drafted deviations ``[S, L - 1, ...]`` and transition coefficients ``[S, L, 8]``."""
        slots, length = columns.shape[:2]
        if self.relaxation.source == "deviation":
            uncertainty = (self.running / (1 + self.running)).unsqueeze(1).expand(slots, length)
        else:
            slope = columns[:, :-1, TransitionColumn.LOG_STD_SLOPE]
            mean_log = draft_std.flatten(2).log().mean(2)
            place = (mean_log - columns[:, :-1, TransitionColumn.LOG_STD]) / slope
            place = torch.where(slope > 0, (place + 1) / 2, 0.0).nan_to_num(0.0).clamp(0.0, 1.0)
            uncertainty = torch.nn.functional.pad(place, (0, 1))
        return (self.relaxation.strength * uncertainty).clamp(max=self.relaxation.w_max)

    def update(self, coupling: Coupling, tested: Tensor) -> None:
        """Learn from the tested rows of a round, a bool mask ``[S, L - 1]``."""
        count = tested.sum(1)
        known = torch.where(tested, coupling.gap_sq, 0.0).nan_to_num(0.0, posinf=1e6).clamp(max=1e6)
        self.running.lerp_(known.sum(1) / count.clamp(min=1), self._share * (count > 0))

    def reset(self, slots: Tensor) -> None:
        """Forget the past of slots (a bool mask ``[S]``) that took in a new image."""
        self.running.masked_fill_(slots, 0.0)


def bias_of_rows(gap_sq: Tensor, weights: Tensor) -> Tensor:
    """Total variation between a relaxed row's law and the exact one: ``2 Phi(-(1 - w) delta/2) - 2 Phi(-delta/2)``."""
    delta = gap_sq.sqrt()
    return 2 * (torch.special.ndtr(-(1 - weights) * delta / 2) - torch.special.ndtr(-delta / 2))
