"""Rows that earlier rounds asked the target about and did not commit: they may draft the same steps again."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Held(NamedTuple):
    """Rows of one step ahead in every slot.

    Attributes:
        known: bool ``[S]``, whether the slot has a row there.
        state: ``[S, C, H, W]``.
        feature: ``[B, S, T, D]``.
        output: ``[B, S, C or 2C, H, W]``.
    """

    known: Tensor
    state: Tensor
    feature: Tensor
    output: Tensor

    def of(self, slots: Tensor | None) -> Held:
        """The rows of some slots (int64 ``[R]``); of all if None."""
        if slots is None:
            return self
        return Held(self.known[slots], self.state[slots], self.feature[:, slots], self.output[:, slots])


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
    place takes what is not kept. Buffers hold ``S (M + 1)`` rows: with the shapes of DiT-XL/2 at 256 x 256 in bfloat16
    (T = 256, width 1152, C = 4, learned variance) and M = 12 that is 7.7 MiB for each slot, 15.2 MiB with guidance.
    Nothing waits for the device, shapes are fixed and every tensor is written in place, so rounds may be captured in a
    CUDA graph.

    Args:
        slots: S.
        branches: B, of guidance.
        rows: M, how many are kept, the last committed one among them; those of a whole round are its L.
        device: where the slots are.

    Attributes:
        counts: how many of the steps ahead of each slot have a row, without a gap; for the host, which is told by the
            round's report.
        ahead: the same on the device, int64 ``[S]``.
    """

    def __init__(self, slots: int, branches: int, rows: int, device: torch.device) -> None:
        self.rows, self._branches = rows, branches
        self.counts = [0] * slots
        self.ahead = torch.zeros(slots, dtype=torch.int64, device=device)
        # The step of the row at each place; -1: none.
        self._at = torch.full((slots, rows + 1), -1, dtype=torch.int64, device=device)
        self._slot = torch.arange(slots, device=device).unsqueeze(1)
        self._states: Tensor | None = None
        self._features: Tensor | None = None
        self._outputs: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that the buffers hold."""
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
        # A row behind a refusal may hold anything. A sum overflows at most where the row is of no use either.
        sums = features.flatten(2).sum(2, dtype=torch.float32) + outputs.flatten(2).sum(2, dtype=torch.float32)
        finite = sums.isfinite().all(0).view(len(steps), -1)
        first = committed.unsqueeze(1) - 1
        taken = (j >= first) & (j < first + self.rows) & (j < lengths.unsqueeze(1))
        step = steps.unsqueeze(1) + j
        place = torch.where(taken, step % self.rows, self.rows)
        self._at.scatter_(1, place, torch.where(taken & finite, step, -1))
        index = (self._slot * (self.rows + 1) + place).flatten()
        self._states.flatten(0, 1).index_copy_(0, index, states.flatten(0, 1))
        self._features.flatten(1, 2).index_copy_(1, index, features)
        self._outputs.flatten(1, 2).index_copy_(1, index, outputs)

    def begin(self, steps: Tensor, fresh: Tensor) -> None:
        """After the commit: count the rows ahead.

        Args:
            steps: int64 ``[S]``, the step of each slot now.
            fresh: bool ``[S]``, slots whose image is at its first step; the rows of the image before are dropped.
        """
        self._at.masked_fill_(fresh.unsqueeze(1), -1)
        ahead = torch.arange(self.rows - 1, device=steps.device)
        steps = steps.unsqueeze(1) + ahead
        known = self._at.gather(1, steps % self.rows) == steps
        self.ahead.copy_(known.to(torch.int64).cumprod(1).sum(1))

    def forget(self) -> None:
        """Steps were taken without drafts: what was kept is of earlier ones."""
        self.counts = [0] * len(self.counts)
        self._at.fill_(-1)
        self.ahead.zero_()

    def row_ahead(self, j: int, steps: Tensor) -> Held:
        """The rows of the ``j``-th step ahead, which is ``steps [S]``; the first one is number 0."""
        index = self._slot.squeeze(1) * (self.rows + 1) + steps % self.rows
        return Held(
            self.ahead > j,
            self._states.flatten(0, 1).index_select(0, index),
            self._features.flatten(1, 2).index_select(1, index),
            self._outputs.flatten(1, 2).index_select(1, index),
        )

    def gathered(self, slots: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        """States ``[M, C, H, W]`` and features ``[B, M, T, D]`` of the rows at ``steps [M]`` of ``slots [M]``."""
        index = slots * (self.rows + 1) + steps % self.rows
        return self._states.flatten(0, 1).index_select(0, index), self._features.flatten(1, 2).index_select(1, index)

    def _allocate(self, states: Tensor, features: Tensor, outputs: Tensor) -> None:
        """Buffers for rows like these, where there are none or they are of another dtype."""
        count = (len(states), self.rows + 1)
        for name, rows in (("_states", states[:, 0]), ("_features", features), ("_outputs", outputs)):
            held = getattr(self, name)
            lead = count if name == "_states" else (self._branches, *count)
            if held is None:
                setattr(self, name, rows.new_zeros(*lead, *rows.shape[len(lead) - 1 :]))
            elif held.dtype != rows.dtype:
                setattr(self, name, held.to(rows.dtype))
