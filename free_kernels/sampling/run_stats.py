"""The stats of a speculative run: what is counted on the host, and what is summed on the device until the end."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from free_kernels.ops.coupling import Coupling
from free_kernels.ops.drafting import TallyArguments, tally_round
from free_kernels.ops.drafting.reference import LARGEST_GAP_SQ
from free_kernels.results import SampleStats
from free_kernels.steering.relaxation import bias_of_rows


class RunStats:
    """The stats of a run in the making.

    Args:
        images: N.
        num_steps: K.
        device: where the rounds are.

    Attributes:
        stats: calls are up to date after every round, counts by image and step after :meth:`sum_counts`, and all of it
            after :meth:`gather`.
        deviation: ``[K]``, sum of the squared deviations of the tested rows of each step.
        bias: ``[N]``, sum of the biases of each image's tested rows.
    """

    def __init__(self, images: int, num_steps: int, device: torch.device) -> None:
        self.deviation = torch.zeros(num_steps, dtype=torch.float32, device=device)
        self.bias = torch.zeros(images, dtype=torch.float32, device=device)
        # Rounds that are not in the counts yet: a few calls of numpy take longer than a round's ops.
        self._rounds: list[tuple[list[int], list[int], list[int], list[int]]] = []
        self.stats = SampleStats(
            rounds_per_image=np.zeros(images, np.int64),
            tested_by_step=np.zeros(num_steps, np.int64),
            accepted_by_step=np.zeros(num_steps, np.int64),
            uncertainty_by_step=np.full(num_steps, np.nan),
            bias_bound_per_image=np.zeros(images),
        )

    def called(self, rows: int, drafter_calls: int = 0) -> None:
        """Count a round's calls."""
        self.stats.target_calls += 1
        self.stats.target_rows += rows
        self.stats.drafter_calls += drafter_calls

    def count(self, images: list[int], steps: list[int], lengths: list[int], committed: list[int]) -> None:
        """Count a round of every slot: its image (negative where idle), step, rows and committed steps."""
        self._rounds.append((images, steps, lengths, committed))

    def sum_counts(self) -> None:
        """Bring the counts by image and step up to date."""
        if not self._rounds:
            return
        # [rounds, 4, S] to one row for each round of each image.
        images, steps, lengths, committed = np.array(self._rounds).transpose(1, 0, 2).reshape(4, -1)
        live = images >= 0
        images, steps, lengths, committed = (column[live] for column in (images, steps, lengths, committed))
        np.add.at(self.stats.rounds_per_image, images, 1)
        for counts, many in (
            (self.stats.tested_by_step, np.minimum(committed, lengths - 1)),
            (self.stats.accepted_by_step, committed - 1),
        ):
            # One more from `steps` on, one less behind the last of so many.
            ends = np.zeros(len(counts) + 1, np.int64)
            np.add.at(ends, steps, 1)
            np.add.at(ends, steps + many, -1)
            counts += ends[:-1].cumsum()
        self._rounds.clear()

    def count_ordinary(self, images: list[int], steps: int) -> None:
        """Count so many ordinary steps of every slot: its image."""
        for image in images:
            self.stats.rounds_per_image[image] += steps

    def tally(
        self, output: Tensor, coupling: Coupling, committed: Tensor, lengths: Tensor, steps: Tensor, backend: str
    ) -> Tensor:
        """Add up the deviations of a round's tested rows; waits for nothing.

        Args:
            output: ``[B R, C or 2C, H, W]``, the target's.
            coupling: what was decided.
            committed: int64 ``[S]``.
            lengths: int64 ``[S]``, rows of each slot.
            steps: int64 ``[S]``, step of each slot's first row.
            backend: of the drafting ops.

        Returns:
            int64 ``[1]``, whether the output and the next states are finite.
        """
        found = (coupling.next_states, coupling.gap_sq, committed, lengths, steps, self.deviation)
        return tally_round(TallyArguments(output, *found), backend)

    def gather_bias(self, images: Tensor, gap_sq: Tensor, tested: Tensor, weights: Tensor) -> None:
        """Add up a round's biases; waits for nothing.

        Args:
            images: int64 ``[S]``.
            gap_sq: ``[S, L - 1]``, squared whitened deviations.
            tested: bool ``[S, L - 1]``.
            weights: ``[S, L - 1]``, of relaxation.
        """
        known = torch.where(tested, gap_sq, 0.0).nan_to_num(LARGEST_GAP_SQ, LARGEST_GAP_SQ)
        bias = torch.where(tested, bias_of_rows(known, weights), 0.0)
        self.bias.index_add_(0, images, bias.sum(1))

    def gather(self) -> None:
        """Bring the counts up to date, and over what the device has summed; waits for it."""
        self.sum_counts()
        with np.errstate(invalid="ignore"):
            self.stats.uncertainty_by_step = self.deviation.double().cpu().numpy() / self.stats.tested_by_step
        self.stats.bias_bound_per_image = self.bias.double().cpu().numpy()
        self.stats.bias_bound = float(self.stats.bias_bound_per_image.mean())
