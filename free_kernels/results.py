"""What sampling hands back: images, what a run did, what a callback sees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor


@dataclass
class SampleStats:
    """What a run did.

    Attributes:
        target_calls: packed calls of the target.
        target_rows: rows in them (with guidance a row is two network rows).
        drafter_calls: calls of the drafter's network.
        rounds_per_image: int64 ``[N]``; the rounds each image took part in, up to date in every callback.
        tested_by_step: int64 ``[K]``; drafts of step k that reached the accept/reject test.
        accepted_by_step: int64 ``[K]``; those of them that were accepted.
        uncertainty_by_step: ``[K]``; mean squared whitened deviation between drafted and reference outputs over the
            tested drafts of step k; NaN where none was tested.
        bias_bound: mean over images of the bound on the total variation from the exact sampler; 0 is lossless.
        bias_bound_per_image: ``[N]``; sum over each image's tested rows.
        elapsed_s: wall-clock seconds of the run.
    """

    target_calls: int = 0
    target_rows: int = 0
    drafter_calls: int = 0
    rounds_per_image: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    tested_by_step: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    accepted_by_step: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    uncertainty_by_step: np.ndarray = field(default_factory=lambda: np.zeros(0))
    bias_bound: float = 0.0
    bias_bound_per_image: np.ndarray = field(default_factory=lambda: np.zeros(0))
    elapsed_s: float = 0.0

    @property
    def acceptance_by_step(self) -> np.ndarray:
        """Fraction of tested drafts accepted, float64 ``[K]``; NaN where no draft of the step was tested."""
        with np.errstate(invalid="ignore"):
            return self.accepted_by_step / self.tested_by_step

    @property
    def acceptance(self) -> float:
        """Fraction of all tested drafts that were accepted; NaN if none was tested."""
        tested = int(self.tested_by_step.sum())
        return float(self.accepted_by_step.sum() / tested) if tested else float("nan")

    @property
    def call_reduction(self) -> float:
        """Committed steps per round, ``K N / sum(rounds_per_image)`` of a whole run; NaN before the first round."""
        rounds = int(self.rounds_per_image.sum())
        # A round commits the drafts that it accepts and one step more.
        return float((rounds + self.accepted_by_step.sum()) / rounds) if rounds else float("nan")


@dataclass
class SampleResult:
    """Images and how they came about.

    Attributes:
        samples: float32 ``[N, *latent_shape]``, which is ``[N, C, H, W]`` of images, in the order of the conditions.
        stats: what the run did.
    """

    samples: Tensor
    stats: SampleStats


@dataclass(frozen=True)
class RoundInfo:
    """What a ``callback`` sees after every round (for ``ancestral_sample``: after every step).

    Attributes:
        round: rounds done in this call.
        images: int64 list, image index of each slot that took part.
        steps: the step each of them is at now, in ``[0, K]``; K is finished.
        images_done: finished images so far.
        num_images: N.
    """

    round: int
    images: list[int]
    steps: list[int]
    images_done: int
    num_images: int


Callback = Callable[[RoundInfo], None]
