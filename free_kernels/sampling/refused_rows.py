"""Rows that earlier rounds asked the target about and did not commit: they may draft the same steps again."""

from __future__ import annotations

import torch
from torch import Tensor

from free_kernels.ops.drafting import FindArguments, KeepArguments, find_rows, keep_rows


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
    in bfloat16 (T = 256, width 1152, C = 4, learned variance) and M = 12 that is 7.7 MiB for each slot with outputs,
    15.2 MiB with guidance. Nothing waits for the device, shapes are fixed and every tensor is written in place, so
    rounds may be captured in a CUDA graph.

    Args:
        slots: S.
        branches: B, of guidance.
        rows: M, how many are kept, the last committed one among them; those of a whole round are its L.
        generations: 1, or 2 to keep the row that another one of the same step replaces.
        device: where the slots are.
        backend: of the drafting ops.
        with_outputs: keep the outputs, which a drafter that repeats its feature needs.

    Attributes:
        counts: how many of the steps ahead of each slot have a row, without a gap; for the host, which is told by the
            round's report.
        ahead: the same on the device, int64 ``[S]``.
        before: int64 ``[S]``, where the row of the step before is, among all: the last committed one. It is there
            wherever there is one ahead.
        latest_places: int64 ``[S, M - 1]``, which of ``states`` is the last row of each draft's step; -1: none is.
        replaced_places: the same of the rows that those replaced; -1 everywhere with one generation.
        states: ``[G S (M + 1), C, H, W]``, of all rows; this and the next two are there from the first round on.
        features: ``[B, G S (M + 1), T, D]``, of all rows.
        outputs: ``[B G S (M + 1), C or 2C, H, W]``, of all rows; only where outputs are kept.
    """

    states: Tensor
    features: Tensor
    outputs: Tensor

    def __init__(
        self,
        slots: int,
        branches: int,
        rows: int,
        generations: int,
        device: torch.device,
        backend: str = "auto",
        *,
        with_outputs: bool = True,
    ) -> None:
        self.rows, self._branches, self.backend = rows, branches, backend
        self.counts = [0] * slots
        self.ahead = torch.zeros(slots, dtype=torch.int64, device=device)
        places = slots, rows + 1
        # By generation, slot and place: the step of the row, -1 where there is none.
        self._at = torch.full((generations, *places), -1, dtype=torch.int64, device=device)
        # The generation of each place's latest row.
        self._turn = torch.zeros(places, dtype=torch.int64, device=device)
        # Latest and replaced rows by slot and step ahead: where the row is among all; -1: there is none.
        self._places = torch.full((2, slots, rows - 1), -1, dtype=torch.int64, device=device)
        # Views are made once: each would cost as much as a small op.
        self.latest_places, self.replaced_places = self._places.unbind(0)
        self._places_found = self._places[:generations]
        # Where the row of the step before is, wherever there is one ahead.
        self.before = torch.zeros_like(self.ahead)
        # By generation, slot and place, and before that by branch; made with the first round.
        self._states: Tensor | None = None
        self._features: Tensor | None = None
        self._outputs: Tensor | None = None
        self._with_outputs = with_outputs

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
        self._allocate(states, features, outputs)
        round_ = (states, features, outputs, row_offsets, committed, lengths, steps)
        held = (self._at, self._turn, self._states, self._features, self._outputs)
        keep_rows(KeepArguments(*round_, *held), self.backend)

    def begin(self, steps: Tensor) -> None:
        """After the commit: find and count the rows ahead.

        Args:
            steps: int64 ``[S]``, the step of each slot now; at step 0 the rows are of the image before and are dropped.
        """
        find_rows(
            FindArguments(self._at, self._turn, steps, self._places_found, self.before, self.ahead),
            self.backend,
        )

    def forget(self) -> None:
        """Steps were taken without drafts: what was kept is of earlier ones."""
        self.counts = [0] * len(self.counts)
        self.ahead.zero_()
        self._at.fill_(-1)
        self._places.fill_(-1)

    def _allocate(self, states: Tensor, features: Tensor, outputs: Tensor) -> None:
        """Buffers for rows like these, where there are none or they are of another dtype."""
        places = self._at.shape
        if self._states is None:
            self._states = states.new_zeros(*places, *states.shape[2:])
            self.states = self._states.flatten(0, 2)
        if self._features is None or self._features.dtype != features.dtype:
            shape = self._branches, *places, *features.shape[1:]
            self._features = features.new_zeros(shape) if self._features is None else self._features.to(features.dtype)
            self.features = self._features.flatten(1, 3)
        if self._with_outputs and (self._outputs is None or self._outputs.dtype != outputs.dtype):
            shape = self._branches, *places, *outputs.shape[1:]
            self._outputs = outputs.new_zeros(shape) if self._outputs is None else self._outputs.to(outputs.dtype)
            self.outputs = self._outputs.flatten(0, 3)
