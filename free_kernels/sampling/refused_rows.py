"""Rows that earlier rounds asked the target about and did not commit: they may draft the same steps again."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from free_kernels.ops.drafting import (
    FindArguments,
    KeepArguments,
    KeepCleanArguments,
    find_rows,
    keep_clean_rows,
    keep_rows,
)
from free_kernels.sampling.job import Job


class KeptRound(NamedTuple):
    """A round that was decided, as the memory of refused rows takes it.

    Attributes:
        states: ``[S, L, C, H, W]``, the drafts.
        features: ``[B R, T, D]`` of the packed rows.
        output: ``[B R, C or 2C, H, W]`` of the packed rows, as the coupling took it.
        row_offsets: int64 ``[S + 1]``.
        committed: int64 ``[S]``.
        lengths: int64 ``[S]``, rows of each slot.
        steps: int64 ``[S]``, step of each slot's first row.
    """

    states: Tensor
    features: Tensor
    output: Tensor
    row_offsets: Tensor
    committed: Tensor
    lengths: Tensor
    steps: Tensor


class RefusedRows:
    """The rows behind the last refusal of each slot and the row before them; what is kept of one is the subclass's.

    A round that refuses a draft has asked the target about the refused draft itself and about the rows behind it. The
    noise of those steps is used again, so the next round's states lie near them.

    The draft of step k may depend on whatever no noise of step k or later has entered. The state of a row at step k
    was made with noise of steps before k, so the row may draft step k and later ones; it may not draft step k - 1,
    whose noise it holds. Whether a row is known follows the same rule: it is decided by tests of steps before k, by
    draft lengths and by whether rows up to step k are finite. Nothing here may steer draft lengths, relaxation or
    stopping, which decide how noise is tested that has not been looked at.

    The row of step k stands at place ``k % M`` of its slot, so that nothing moves when steps are committed. One more
    place takes what is not kept. Nothing waits for the device, shapes are fixed and every tensor is written in place,
    so rounds may be captured in a CUDA graph.

    Args:
        slots: S.
        rows: how many may be used, the last committed one among them; those of a whole round are its L.
        device: where the slots are.
        backend: of the drafting ops.
        held: M, how many are kept; ``rows`` if None.

    Attributes:
        counts: how many of the steps ahead of each slot have a row, without a gap; for the host, which is told by the
            round's report.
        ahead: the same on the device, int64 ``[S]``.
        before: int64 ``[S]``, where the last committed row is, among all; -1: there is none.
        places: int64 ``[S, rows - 1]``, which of ``states`` is the last row of each draft's step; -1: none is.
        states: ``[S (M + 1), C, H, W]``, of all rows; there from the first round on.
    """

    states: Tensor

    def __init__(
        self, slots: int, rows: int, device: torch.device, backend: str = "auto", *, held: int | None = None
    ) -> None:
        self.rows, self.held, self.backend = rows, rows if held is None else held, backend
        self.counts = [0] * slots
        self.ahead = torch.zeros(slots, dtype=torch.int64, device=device)
        # By slot and place: the step of the row, -1 where there is none.
        self._at = torch.full((slots, self.held + 1), -1, dtype=torch.int64, device=device)
        self.places = torch.full((slots, rows - 1), -1, dtype=torch.int64, device=device)
        self.before = torch.full_like(self.ahead, -1)
        # By slot and place; made with the first round.
        self._states: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that the rows take."""
        return 0 if self._states is None else self._states.nbytes

    @property
    def is_empty(self) -> bool:
        """Whether no round has been kept yet."""
        return self._states is None

    def keep(self, played: KeptRound) -> None:
        """Take in a round: its last committed row and those behind it. Rows of rounds before stay where it has none."""
        raise NotImplementedError

    def begin(self, steps: Tensor) -> None:
        """After the commit: find and count the rows ahead.

        Args:
            steps: int64 ``[S]``, the step of each slot now; at step 0 the rows are of the image before and are dropped.
        """
        find_rows(FindArguments(self._at, steps, self.places, self.before, self.ahead), self.backend)

    def forget(self) -> None:
        """Steps were taken without drafts: what was kept is of earlier ones."""
        self.counts = [0] * len(self.counts)
        self.ahead.zero_()
        self.before.fill_(-1)
        self._at.fill_(-1)
        self.places.fill_(-1)

    def _allocate(self, states: Tensor) -> None:
        """A buffer for states ``[S, L, C, H, W]`` like these, where there is none."""
        if self._states is None:
            self._states = states.new_zeros(*self._at.shape, *states.shape[2:])
            self.states = self._states.flatten(0, 1)


class FeatureRows(RefusedRows):
    """State and feature of each row, from which a drafter's errors are measured.

    There are ``S (M + 1)`` rows: with the shapes of DiT-XL/2 at 256 x 256 in bfloat16 (T = 256, width 1152, C = 4) and
    M = 12 that is 7.5 MiB for each slot, 14.8 MiB with guidance.

    Args:
        slots, rows, device, backend: as for :class:`RefusedRows`; M is ``rows``.
        branches: B, of guidance.

    Attributes:
        features: ``[B, S (M + 1), T, D]``, of all rows; there from the first round on.
    """

    features: Tensor

    def __init__(self, slots: int, rows: int, device: torch.device, backend: str = "auto", *, branches: int) -> None:
        super().__init__(slots, rows, device, backend)
        self._branches = branches
        self._features: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """As :attr:`RefusedRows.nbytes`."""
        return super().nbytes + (0 if self._features is None else self._features.nbytes)

    def keep(self, played: KeptRound) -> None:
        """As :meth:`RefusedRows.keep`."""
        keep_rows(KeepArguments(*played, *self._held_for(played.states, played.features)), self.backend)

    def tensors(self, states: Tensor, features: Tensor) -> tuple[Tensor, ...]:
        """All that is held, to take in such states and features: ``at`` to ``ahead`` of ``decide_round``."""
        return *self._held_for(states, features), self.places, self.before, self.ahead

    def _held_for(self, states: Tensor, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Steps, states and features of the rows, with room for such."""
        self._allocate(states)
        if self._features is None or self._features.dtype != features.dtype:
            shape = self._branches, *self._at.shape, *features.shape[1:]
            self._features = features.new_zeros(shape) if self._features is None else self._features.to(features.dtype)
            self.features = self._features.flatten(1, 2)
        return self._at, self._states, self._features


class CleanRows(RefusedRows):
    """State and clean sample of each row, which draft without a network.

    There are ``S (M + 1)`` rows, M one more than may be used, so that the row of the step before stays while a round is
    kept: with C = 4, learned variance and L = 12, 0.7 MiB for each slot at 256 x 256 pixels of DiT-XL/2 and 2.8 MiB at
    512 x 512, with guidance or without.

    Args:
        slots, rows, device, backend: as for :class:`RefusedRows`.
        job: what is sampled.

    Attributes:
        clean: ``[S (M + 1), C or 2C, H, W]``, of all rows, with the output's variance channels where they are
            learned; there from the first round on.
        response: ``[S, 3, 2]``, how far the clean sample moves with the state; see
            :func:`~free_kernels.ops.drafting.keep_clean_rows`.
        pattern: ``[S, 2, C, H, W]``, the same of its elements.
    """

    clean: Tensor

    def __init__(self, slots: int, rows: int, device: torch.device, backend: str = "auto", *, job: Job) -> None:
        super().__init__(slots, rows, device, backend, held=rows + 1)
        self._job = job
        self.response = torch.zeros(slots, 3, 2, dtype=torch.float32, device=device)
        channels, *latent = job.state_shape
        self._allocate(torch.empty(slots, 1, channels, *latent, dtype=torch.float32, device=device))
        outputs = 2 * channels if job.learned else channels
        self._clean = self._states.new_zeros(*self._at.shape, outputs, *latent)
        self.clean = self._clean.flatten(0, 1)
        self.pattern = self._states.new_zeros(slots, 2, channels, *latent)

    @property
    def nbytes(self) -> int:
        """As :attr:`RefusedRows.nbytes`."""
        return super().nbytes + self._clean.nbytes + self.response.nbytes + self.pattern.nbytes

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that is held: ``clean_at`` to ``pattern`` of :func:`~free_kernels.ops.rounds.decide_round`."""
        held = self._at, self._states, self._clean, self.places, self.before, self.ahead
        return *held, self.response, self.pattern

    def keep(self, played: KeptRound) -> None:
        """As :meth:`RefusedRows.keep`; also measures the responses."""
        job = self._job
        states, _, output, *decided = played
        held = self._at, self._states, self._clean, self.response, self.pattern
        settings = job.guidance_scale, job.guidance_channels, job.clip
        keep_clean_rows(
            KeepCleanArguments(states, output, *decided, job.table, self.before, *held, *settings), self.backend
        )
