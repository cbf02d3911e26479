"""What the ops of a round in one call take; ``free_kernels.ops.rounds.api`` describes it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from free_kernels.ops.fields import Written


class OpenKeyedArguments(NamedTuple):
    """Arguments of ``open_keyed_round``: those of ``open_round``, and of ``philox_round``."""

    state: Tensor  # float32 [S, C, H, W]
    current: Tensor  # int64 [S], steps
    timesteps: Tensor  # int64 [K]
    table: Tensor  # float32 [K, 8]
    length: int  # L
    seed: int  # int64 with the 64 bits of the seed
    images: Tensor  # int64 [S]
    slack: bool  # draw slack noise, too
    rounds: Tensor | None  # int64 [S]; None: round 0


class OpenedWithNoise(NamedTuple):
    """What ``open_keyed_round`` gives: that of ``open_round``, and the numbers of ``philox_round``.

    Attributes:
        steps, timesteps, columns, states, mean, std: as of :class:`free_kernels.ops.drafting.Opened`.
        noise: float32 ``[S, L, C, H, W]``.
        slack_noise: alike; ``[S, L, 0, H, W]`` where none was asked for.
        uniform: float32 ``[S, L]``.
    """

    steps: Tensor
    timesteps: Tensor
    columns: Tensor
    states: Tensor
    mean: Tensor
    std: Tensor
    noise: Tensor
    slack_noise: Tensor
    uniform: Tensor


class HeadAdvanceArguments(NamedTuple):
    """Arguments of ``advance_from_features``: those of ``final_layer``, and of ``advance_drafts`` for one draft."""

    h: Tensor  # float32 [B R, T, D]
    table: Tensor  # float32 [N, 2, 1, D]
    row_of_timestep: Tensor  # int64 [timesteps]
    row_of_label: Tensor  # int64 [labels]
    t: Tensor  # int64 [B R]
    y: Tensor  # int64 [B R]
    weight: Tensor  # float32 [O, D]
    bias: Tensor | None  # float32 [O]
    eps: float  # above 0
    grid_rows: int  # divides T
    patch_rows: int
    patch_columns: int  # patch_rows * patch_columns divides O
    states: Written  # float32 [S, L, C, H, W], written behind the first row
    mean: Written  # float32 [S, L - 1, C, H, W], written
    std: Written  # float32 [S, L - 1, C, H, W], written
    noise: Tensor  # float32 [S, L, C, H, W]
    columns: Tensor  # float32 [S, L, 8]
    rows: Tensor  # int64 [S, W], W > draft
    draft: int
    guidance_scale: float  # 1: output has no unconditional branch
    guidance_channels: int  # in [0, C]
    clip: float  # inf: no clipping


class DecideArguments(NamedTuple):
    """Arguments of ``decide_round``: S slots, R packed rows, N images, K steps, M places of each slot."""

    draft_states: Tensor  # float32 [S, L, C, H, W]
    draft_mean: Tensor  # float32 [S, L - 1, C, H, W]
    draft_std: Tensor  # float32 [S, L - 1, C, H, W]
    noise: Tensor  # float32 [S, L, C, H, W]
    slack_noise: Tensor | None  # float32 [S, L, C, H, W]
    uniform: Tensor  # float32 [S, L]
    output: Tensor  # float32, float16 or bfloat16 [B R, C or 2 C, H, W]
    row_offsets: Tensor  # int64 [S + 1]
    columns: Tensor  # float32 [S, L, 8]
    relaxation: Tensor | None  # float32 [S, L]
    guidance_scale: float  # 1: output has no unconditional branch
    guidance_channels: int  # in [0, C]
    clip: float  # inf: no clipping
    block: bool  # decide drafts together, by couple_block
    lengths: Tensor  # int64 [S]
    features: Tensor  # float32, float16 or bfloat16 [B R, T, D]
    state: Written  # float32 [S, C, H, W], written
    previous: Written  # float32 [S, C, H, W], written
    parent: Written  # of features' dtype [B, S, T, D], written
    steps: Written  # int64 [S], written
    images: Written  # int64 [S], written
    labels: Written  # int64 [S], written
    samples: Written  # float32 [N, C, H, W], written
    all_labels: Tensor  # int64 [N]
    queue: Written  # int64 [1], written
    numbers: Tensor  # int64 [N]
    indices: Written  # int64 [S], written
    rounds: Written  # int64 [S], written
    deviation: Written  # float32 [K], written
    table: Tensor  # float32 [K, 8]
    at: Written | None  # int64 [S, M + 1], written
    held_states: Written | None  # float32 [S, M + 1, C, H, W], written
    held_features: Written | None  # of features' dtype [B, S, M + 1, T, D], written
    places: Written | None  # int64 [S, W], W < M, written
    before: Written | None  # int64 [S], written
    ahead: Written | None  # int64 [S], written
    clean_at: Written | None  # as at, of places of their own
    clean_states: Written | None  # as held_states
    clean: Written | None  # float32 [S, M + 1, C or 2 C, H, W], written
    clean_places: Written | None  # as places
    clean_before: Written | None  # as before
    clean_ahead: Written | None  # as ahead
    response: Written | None  # float32 [S, 3, 2], written
    pattern: Written | None  # float32 [S, 2, C, H, W], written


class DecidedRound(NamedTuple):
    """What ``decide_round`` gives.

    Attributes:
        next_states, committed, gap_sq: as of :class:`free_kernels.ops.Coupling`.
        report: int64 ``[4 S + 1]``: of each slot committed steps, image and step after the round and rows ahead (of
            features if they are held, else of clean samples, else 0); and whether output and next states are finite.
        fresh: bool ``[S]``, the slots whose image is at its first step.
    """

    next_states: Tensor
    committed: Tensor
    gap_sq: Tensor
    report: Tensor
    fresh: Tensor
