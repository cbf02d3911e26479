"""The drafting pass of a round: every slot's states ahead, each from the output that its source gives."""

from __future__ import annotations

import copy
from typing import NamedTuple

from torch import Tensor

from free_kernels.ops.drafting import AdvanceArguments, OpenArguments, open_round
from free_kernels.ops.drafting.api import ADVANCE
from free_kernels.ops.rounds import OpenKeyedArguments, open_keyed_round
from free_kernels.sampling.job import Job
from free_kernels.sampling.slots import Slots
from free_kernels.targets.fused_head import FusedHead


class Drafts(NamedTuple):
    """What the drafting pass of a round leaves: ``states [S, L, ...]``, ``mean`` and ``std [S, L - 1, ...]``."""

    states: Tensor
    mean: Tensor
    std: Tensor


class Numbers(NamedTuple):
    """Random numbers of a round's rows: ``noise [S, L, ...]``, ``slack_noise`` alike or None, ``uniform [S, L]``."""

    noise: Tensor
    slack_noise: Tensor | None
    uniform: Tensor


class NoiseKeys(NamedTuple):
    """What a round's Philox numbers are drawn with.

    Attributes:
        seed: the int64 with its 64 bits.
        images: int64 ``[S]``, what stands in the key for each slot's image.
        slack: whether variances are learned, so that slack noise is needed.
        rounds: int64 ``[S]``, where noise is new every round.
    """

    seed: int
    images: Tensor
    slack: bool
    rounds: Tensor | None


class DraftingPass:
    """Drafts of a round in the making, which sources fill in.

    Args:
        job: the job.
        slots: where the images are.
        length: L.
        lengths: rows that each slot wants, so that a shorter one drafts no further; None drafts all of all slots, in
            fixed shapes.
        keys: of the round's random numbers, which are then drawn at once; None where something else draws them.

    Attributes:
        steps: int64 ``[S, L]``.
        timesteps: int64 ``[S, L]``, the network's.
        columns: ``[S, L, 8]``, transition coefficients at ``steps``.
        scales: ``[S, L]``, guidance scales at ``steps``; None where one number holds for all rows of the job.
        numbers: those that ``keys`` give; None without.
        noise: ``[S, L, C, H, W]``, to be set before drafts are made.
        drafts: the states so far; those of slots that draft no further are undefined.
        count: L - 1.
        chosen: bool ``[S]``, slots whose drafts are made, where shapes are fixed; None: all.
    """

    noise: Tensor
    numbers: Numbers | None = None
    chosen: Tensor | None = None

    def __init__(
        self, job: Job, slots: Slots, length: int, lengths: list[int] | None, keys: NoiseKeys | None = None
    ) -> None:
        self.job, self.slots, self.lengths, self.count = job, slots, lengths, length - 1
        given = slots.state, slots.steps, job.timesteps, job.table, length
        if keys is None:
            opened = open_round(OpenArguments(*given), job.options.backend)
            self.steps, self.timesteps, self.columns, *drafts = opened
        else:
            opened = open_keyed_round(OpenKeyedArguments(*given, *keys))
            self.steps, self.timesteps, self.columns, *drafts, noise, slack_noise, uniform = opened
            self.numbers = Numbers(noise, slack_noise if keys.slack else None, uniform)
        self.drafts = Drafts(*drafts)
        self.scales = job.scales_at(self.steps, slots.indices)
        self._settings = job.guidance_scale, job.guidance_channels, job.clip

    def behind(self, step: int, lengths: list[int] | None) -> DraftingPass:
        """The same pass for slots at ``step`` or later only: drafts of others stay as they are.

        Args:
            step: the first.
            lengths: rows that each slot wants, at most 1 of others; None with fixed shapes.
        """
        part = copy.copy(self)
        part.lengths = lengths
        if lengths is None:
            part.chosen = self.slots.steps >= step
        return part

    @property
    def parent(self) -> Tensor:
        """Features ``[B, S, T, D]`` one step before the first row."""
        slots, job = self.slots, self.job
        # Before the first round no image has a parent; only the warm-up calls of a capture draft then.
        if slots.parent is None:
            return slots.state.new_zeros(job.branches, len(slots), *job.feature_shape)
        return slots.parent

    def advance(self, output: Tensor, rows: Tensor, draft: int) -> None:
        """Make one draft of each slot whose entry in ``rows [S, L - 1]``, a row of the output, is not negative."""
        given = *self.drafts, self.noise, self.columns, output, rows, draft, draft + 1
        ADVANCE(AdvanceArguments(*given, *self._settings), output, self.job.options.backend)

    def advance_from(self, head: FusedHead, feature: Tensor, t: Tensor, y: Tensor, rows: Tensor, draft: int) -> None:
        """As :meth:`advance`, with the output of ``head`` for ``feature [B R, T, D]``, ``t`` and ``y [B R]``."""
        head.advance(feature, t, y, *self.drafts, self.noise, self.columns, rows, draft, *self._settings)
