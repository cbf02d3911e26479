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


class _Generation:
    """Rows by slot and place, and the step that each belongs to (-1: there is none).

    Args:
        at: int64 ``[S, M + 1]``.
        states: ``[S, M + 1, C, H, W]``.
        features: ``[B, S, M + 1, T, D]``.
        outputs: ``[B, S, M + 1, C or 2C, H, W]``.
    """

    def __init__(self, at: Tensor, states: Tensor, features: Tensor, outputs: Tensor) -> None:
        self.at, self.states, self.features, self.outputs = at, states, features, outputs

    def read(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """States ``[n, C, H, W]``, features ``[B, n, T, D]`` and outputs at ``index [n]`` of all places."""
        return (
            self.states.flatten(0, 1).index_select(0, index),
            self.features.flatten(1, 2).index_select(1, index),
            self.outputs.flatten(1, 2).index_select(1, index),
        )

    def write(self, index: Tensor, states: Tensor, features: Tensor, outputs: Tensor) -> None:
        """The opposite of :meth:`read`, in place."""
        self.states.flatten(0, 1).index_copy_(0, index, states)
        self.features.flatten(1, 2).index_copy_(1, index, features)
        self.outputs.flatten(1, 2).index_copy_(1, index, outputs)


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
    place takes what is not kept. Where two generations are kept, a step that was asked about twice has its row of the
    time before too. A generation holds ``S (M + 1)`` rows: with the shapes of DiT-XL/2 at 256 x 256 in bfloat16 (T =
    256, width 1152, C = 4, learned variance) and M = 12 that is 7.7 MiB for each slot, 15.2 MiB with guidance. Nothing
    waits for the device, shapes are fixed and every tensor is written in place, so rounds may be captured in a CUDA
    graph.

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
        self.rows, self._branches, self._count = rows, branches, generations
        self.counts = [0] * slots
        self.ahead = torch.zeros(slots, dtype=torch.int64, device=device)
        self._slot = torch.arange(slots, device=device).unsqueeze(1)
        # The latest first; made with the first round.
        self._generations: list[_Generation] = []

    @property
    def nbytes(self) -> int:
        """Bytes that states, features and outputs take."""
        return sum(g.states.nbytes + g.features.nbytes + g.outputs.nbytes for g in self._generations)

    @property
    def is_empty(self) -> bool:
        """Whether no round has been kept yet."""
        return not self._generations

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
        index = (self._slot * (self.rows + 1) + place).flatten()
        latest = self._generations[0]
        for earlier in self._generations[1:]:
            replaced = latest.at.gather(1, place)
            earlier.at.scatter_(1, place, torch.where(replaced == step, step, -1))
            earlier.write(index, *latest.read(index))
        latest.at.scatter_(1, place, torch.where(taken & finite, step, -1))
        latest.write(index, states.flatten(0, 1), features, outputs)

    def begin(self, steps: Tensor, fresh: Tensor) -> None:
        """After the commit: count the rows ahead.

        Args:
            steps: int64 ``[S]``, the step of each slot now.
            fresh: bool ``[S]``, slots whose image is at its first step; the rows of the image before are dropped.
        """
        if self.is_empty:
            return
        for generation in self._generations:
            generation.at.masked_fill_(fresh.unsqueeze(1), -1)
        steps = steps.unsqueeze(1) + torch.arange(self.rows - 1, device=steps.device)
        known = self._generations[0].at.gather(1, steps % self.rows) == steps
        self.ahead.copy_(known.to(torch.int64).cumprod(1).sum(1))

    def forget(self) -> None:
        """Steps were taken without drafts: what was kept is of earlier ones."""
        self.counts = [0] * len(self.counts)
        self.ahead.zero_()
        for generation in self._generations:
            generation.at.fill_(-1)

    def row_ahead(self, j: int, steps: Tensor) -> Held:
        """The rows of the ``j``-th step ahead, which is ``steps [S]``; the first one is number 0."""
        return Held(self.ahead > j, *self._generations[0].read(self._index(self._slot.squeeze(1), steps)))

    def replaced_row(self, j: int, steps: Tensor) -> Held:
        """As :meth:`row_ahead`, the rows of the same steps of the time before; with two generations only."""
        earlier = self._generations[1]
        known = earlier.at.gather(1, (steps % self.rows).unsqueeze(1)).squeeze(1) == steps
        return Held(known & (self.ahead > j), *earlier.read(self._index(self._slot.squeeze(1), steps)))

    def gathered(self, slots: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        """States ``[n, C, H, W]`` and features ``[B, n, T, D]`` of the rows at ``steps [n]`` of ``slots [n]``."""
        return self._generations[0].read(self._index(slots, steps))[:2]

    def _index(self, slots: Tensor, steps: Tensor) -> Tensor:
        return slots * (self.rows + 1) + steps % self.rows

    def _allocate(self, states: Tensor, features: Tensor, outputs: Tensor) -> None:
        """Buffers for rows like these, where there are none or they are of another dtype."""
        count, slots = (len(states), self.rows + 1), self._slot
        while len(self._generations) < self._count:
            both = (self._branches, *count)
            self._generations.append(
                _Generation(
                    torch.full(count, -1, dtype=torch.int64, device=slots.device),
                    states.new_zeros(*count, *states.shape[2:]),
                    features.new_zeros(*both, *features.shape[2:]),
                    outputs.new_zeros(*both, *outputs.shape[2:]),
                )
            )
        for held in self._generations:
            if held.features.dtype != features.dtype or held.outputs.dtype != outputs.dtype:
                held.features, held.outputs = held.features.to(features.dtype), held.outputs.to(outputs.dtype)
