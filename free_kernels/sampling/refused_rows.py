"""Rows that earlier rounds asked the target about and did not commit: they may draft the same steps again."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class HeldRows(NamedTuple):
    """Rows at n steps one after the other, the same number of every slot.

    Attributes:
        known: bool ``[n, S]``, whether the slot has the row.
        states: ``[n, S, C, H, W]``.
        features: ``[B, n, S, T, D]``.
        outputs: ``[B, n, S, C or 2C, H, W]``; None where they were not asked for.
    """

    known: Tensor
    states: Tensor
    features: Tensor
    outputs: Tensor | None


class RefusedRows:
    """State, feature and output of the rows behind the last refusal of each slot, and of the row before them.

    A round that refuses a draft has asked the target about the refused draft itself and about the rows behind it. The
    noise of those steps is used again, so the next round's states lie near them.

    The draft of step k may depend on whatever no noise of step k or later has entered. The state of a row at step k
    was made with noise of steps before k, so the row may draft step k and later ones; it may not draft step k - 1,
    whose noise it holds. Whether a row is known follows the same rule: it is decided by tests of steps before k, by
    draft lengths and by whether rows up to step k are finite. Nothing here may steer draft lengths, relaxation or
    stopping, which decide how noise is tested that has not been looked at.

    The row of step k stands at place ``k % M`` of its slot, so that nothing moves when steps are committed. One more
    place takes what is not kept. Where two generations are kept, which take turns, a step that was asked about twice
    has its row of the time before too. A generation holds ``S (M + 1)`` rows: with the shapes of DiT-XL/2 at 256 x 256
    in bfloat16 (T = 256, width 1152, C = 4, learned variance) and M = 12 that is 7.7 MiB for each slot, 15.2 MiB with
    guidance. Nothing waits for the device, shapes are fixed and every tensor is written in place, so rounds may be
    captured in a CUDA graph.

    Args:
        slots: S.
        branches: B, of guidance.
        rows: M, how many are kept, the last committed one among them; those of a whole round are its L.
        generations: 1, or 2 to keep the row that another one of the same step replaces.
        device: where the slots are.

    Attributes:
        counts: how many of the steps ahead of each slot have a row, without a gap; for the host, which is told by the
            round's report.
        ahead: the same on the device, int64 ``[S]``.
    """

    def __init__(self, slots: int, branches: int, rows: int, generations: int, device: torch.device) -> None:
        self.rows, self._branches, self._generations = rows, branches, generations
        self.counts = [0] * slots
        self.ahead = torch.zeros(slots, dtype=torch.int64, device=device)
        places = slots, rows + 1
        # By generation, slot and place: the step of the row, -1 where there is none.
        self._at = torch.full((generations, *places), -1, dtype=torch.int64, device=device)
        # The generation of each place's latest row.
        self._latest = torch.zeros(places, dtype=torch.int64, device=device)
        self._first_places = torch.arange(slots, device=device) * (rows + 1)
        self._numbers = torch.arange(-1, rows, device=device)
        # By generation, slot and place, and before that by branch; made with the first round.
        self._states: Tensor | None = None
        self._features: Tensor | None = None
        self._outputs: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that states, features and outputs take."""
        return sum(b.nbytes for b in (self._states, self._features, self._outputs) if b is not None)

    @property
    def is_empty(self) -> bool:
        """Whether no round has been kept yet."""
        return self._states is None

    def keep(
        self,
        states: Tensor,
        features: Tensor,
        outputs: Tensor,
        row_offsets: Tensor,
        committed: Tensor,
        lengths: Tensor,
        steps: Tensor,
    ) -> None:
        """Take in a round: its last committed row and those behind it. Rows of rounds before stay where it has none.

        Args:
            states: ``[S, L, C, H, W]``, the drafts.
            features: ``[B R, T, D]`` of the packed rows.
            outputs: ``[B R, C or 2C, H, W]`` of the packed rows.
            row_offsets: int64 ``[S + 1]``.
            committed: int64 ``[S]``.
            lengths: int64 ``[S]``, rows of each slot.
            steps: int64 ``[S]``, step of each slot's first row.
        """
        features, outputs = features.unflatten(0, (self._branches, -1)), outputs.unflatten(0, (self._branches, -1))
        self._allocate(states, features, outputs)
        j = torch.arange(states.shape[1], device=steps.device)
        packed = (row_offsets[:-1].unsqueeze(1) + j).clamp_(max=features.shape[1] - 1).flatten()
        features, outputs = features.index_select(1, packed), outputs.index_select(1, packed)
        # A row behind a refusal may not be finite; then its sum is not either. Rows whose sum overflows are left out.
        sums = features.flatten(2).sum(2, dtype=torch.float32) + outputs.flatten(2).sum(2, dtype=torch.float32)
        finite = sums.isfinite().all(0).view(len(steps), -1)
        behind = j - committed.unsqueeze(1)
        taken = (behind >= -1) & (behind < self.rows - 1) & (j < lengths.unsqueeze(1))
        step = steps.unsqueeze(1) + j
        place = (torch.where(taken, step % self.rows, self.rows) + self._first_places.unsqueeze(1)).flatten()
        index = self._index(place, turns=1)
        if self._generations > 1:
            self._latest.view(-1).index_copy_(0, place, index // self._latest.numel())
        self._at.view(-1).index_copy_(0, index, torch.where(taken & finite, step, -1).flatten())
        self._states.flatten(0, 2).index_copy_(0, index, states.flatten(0, 1))
        self._features.flatten(1, 3).index_copy_(1, index, features)
        self._outputs.flatten(1, 3).index_copy_(1, index, outputs)

    def begin(self, steps: Tensor, fresh: Tensor) -> None:
        """After the commit: count the rows ahead.

        Args:
            steps: int64 ``[S]``, the step of each slot now.
            fresh: bool ``[S]``, slots whose image is at its first step; the rows of the image before are dropped.
        """
        self._at.masked_fill_(fresh.unsqueeze(1), -1)
        known = self._has(*self._places(steps, self._numbers[1:-1]), turns=0)
        self.ahead.copy_(known.to(torch.int64).cumprod(0).sum(0))

    def forget(self) -> None:
        """Steps were taken without drafts: what was kept is of earlier ones."""
        self.counts = [0] * len(self.counts)
        self.ahead.zero_()
        self._at.fill_(-1)

    def latest(self, steps: Tensor, count: int, outputs: bool = True) -> HeldRows:
        """The last rows at ``count`` steps from ``steps [S]`` on, and before them at the step just before ``steps``.

        That first one, the last committed row, is there wherever the next one is known, and called known itself.
        """
        numbers = self._numbers[: count + 1]
        _, place = self._places(steps, numbers)
        return self._read(self._index(place, turns=0), self.ahead > numbers.unsqueeze(1), outputs)

    def replaced(self, steps: Tensor, count: int) -> HeldRows:
        """As :meth:`latest`, the rows that those replaced; with two generations only."""
        numbers = self._numbers[: count + 1]
        step, place = self._places(steps, numbers)
        known = self._has(step, place, turns=1) & (self.ahead > numbers.unsqueeze(1))
        return self._read(self._index(place, turns=1), known, outputs=True)

    def _places(self, steps: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Steps ``[n, S]`` at ``steps [S]`` plus each number ``[n]``, and their places among all slots' ``[n S]``."""
        step = steps + numbers.unsqueeze(1)
        return step, (step % self.rows + self._first_places).flatten()

    def _index(self, place: Tensor, turns: int) -> Tensor:
        """Where the rows at places ``[n]`` of all slots are: the latest ones, or ``turns`` generations on."""
        if self._generations == 1:
            return place
        generation = (self._latest.view(-1).index_select(0, place) + turns) % self._generations
        return place + generation * self._latest.numel()

    def _has(self, step: Tensor, place: Tensor, turns: int) -> Tensor:
        """Whether there are rows of the steps ``[n, S]``."""
        return self._at.view(-1).index_select(0, self._index(place, turns)).view_as(step) == step

    def _read(self, index: Tensor, known: Tensor, outputs: bool) -> HeldRows:
        return HeldRows(
            known,
            self._states.flatten(0, 2).index_select(0, index).unflatten(0, known.shape),
            self._features.flatten(1, 3).index_select(1, index).unflatten(1, known.shape),
            self._outputs.flatten(1, 3).index_select(1, index).unflatten(1, known.shape) if outputs else None,
        )

    def _allocate(self, states: Tensor, features: Tensor, outputs: Tensor) -> None:
        """Buffers for rows like these, where there are none or they are of another dtype."""
        places = self._at.shape
        if self._states is None:
            self._states = states.new_zeros(*places, *states.shape[2:])
            self._features = features.new_zeros(self._branches, *places, *features.shape[2:])
            self._outputs = outputs.new_zeros(self._branches, *places, *outputs.shape[2:])
        elif self._features.dtype != features.dtype or self._outputs.dtype != outputs.dtype:
            self._features, self._outputs = self._features.to(features.dtype), self._outputs.to(outputs.dtype)
