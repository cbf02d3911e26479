"""What the coupling ops take and what they give."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from free_kernels.ops.fields import Open


class CouplingArguments(NamedTuple):
    """Arguments of ``couple`` and ``couple_block``: S slots of at most L rows, states ``[C, H, W]``.

    ``free_kernels.ops.couple`` describes each of them.
    """

    draft_states: Tensor  # float32 [S, L, C, H, W], as all that have no dtype here
    draft_mean: Tensor  # [S, L - 1, C, H, W]
    draft_std: Tensor  # [S, L - 1, C, H, W]
    noise: Tensor  # [S, L, C, H, W]
    slack_noise: Tensor | None  # [S, L, C, H, W]; None where variances are fixed or L = 1
    uniform: Tensor  # [S, L]
    output: Tensor  # any floating-point dtype [B R, C or 2 C, H, W]
    row_offsets: Tensor  # int64 [S + 1]
    columns: Tensor  # [S, L, 8]
    relaxation: Tensor | None  # [S, L]; None in couple_block
    guidance_scale: float  # 1: output has no unconditional branch
    guidance_channels: int  # in [0, C]
    clip: float  # inf: no clipping


class KeyedCouplingArguments(NamedTuple):
    """Arguments of ``couple_philox`` and ``couple_block_philox``, which make their noise and uniforms from keys.

    ``free_kernels.ops.couple_philox`` describes each of them. Fields of :class:`CouplingArguments` are as there.
    """

    draft_states: Tensor
    draft_mean: Tensor
    draft_std: Tensor
    seed: Open  # int64 with the 64 bits of the seed
    images: Tensor  # int64 [S]
    steps: Tensor  # int64 [S, L]
    output: Tensor
    row_offsets: Tensor
    columns: Tensor
    relaxation: Tensor | None
    rounds: Tensor | None  # int64 [S]; None: round 0
    guidance_scale: float
    guidance_channels: int
    clip: float


class Coupling(NamedTuple):
    """Outcome of one round for S slots with at most L rows each.

    Values of rows behind a slot's first refusal must not be used: if they steered later rounds, samples would no longer
    have the target's law.

    Attributes:
        next_states: ``[S, C, H, W]``, the state after the committed steps; undefined where ``committed`` is 0.
        committed: int64 ``[S]``, steps committed, in ``[0, L]``; 0 for an idle slot.
        gap_sq: ``[S, L - 1]``, delta^2 of each draft's test (whitened, given the shared slack), also of drafts behind
            the first refusal. Not finite where a draft was far off; undefined in rows without a draft.
    """

    next_states: Tensor
    committed: Tensor
    gap_sq: Tensor
