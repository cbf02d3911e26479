"""What the drafting ops take; ``free_kernels.ops.drafting.api`` describes each argument."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from free_kernels.ops.fields import Written


class AdvanceArguments(NamedTuple):
    """Arguments of ``advance_drafts``: S slots of at most L rows, states ``[C, H, W]``."""

    states: Written  # float32 [S, L, C, H, W], written behind the first row
    mean: Written  # float32 [S, L - 1, C, H, W], written
    std: Written  # float32 [S, L - 1, C, H, W], written
    noise: Tensor  # float32 [S, L, C, H, W]
    columns: Tensor  # float32 [S, L, 8]
    output: Tensor  # float32, float16 or bfloat16 [B R, C or 2 C, H, W]
    rows: Tensor  # int64 [S, W], W >= end
    first: int
    end: int
    guidance_scale: float  # 1: output has no unconditional branch
    guidance_channels: int  # in [0, C]
    clip: float  # inf: no clipping


class Opened(NamedTuple):
    """What a round of L rows a slot begins with; steps past the end are the last.

    Attributes:
        steps: int64 ``[S, L]``.
        timesteps: int64 ``[S, L]``, the network's at ``steps``.
        columns: ``[S, L, 8]``, transition coefficients at ``steps``.
        states: ``[S, L, C, H, W]``, of the drafts: row 0 is the slot's state, the others are undefined.
        mean: ``[S, L - 1, C, H, W]``, undefined.
        std: alike.
    """

    steps: Tensor
    timesteps: Tensor
    columns: Tensor
    states: Tensor
    mean: Tensor
    std: Tensor


class OpenArguments(NamedTuple):
    """Arguments of ``open_round``: K steps."""

    state: Tensor  # float32 [S, C, H, W]
    current: Tensor  # int64 [S], steps
    timesteps: Tensor  # int64 [K]
    table: Tensor  # float32 [K, 8]
    length: int  # L


class RowArguments(NamedTuple):
    """Arguments of ``draft_rows``: A of S slots."""

    states: Tensor  # float32 [S, L, C, H, W]
    timesteps: Tensor  # int64 [S, L]
    draft: int  # in [0, L)
    branches: int  # 1 or 2
    active: Tensor | None  # int64 [A]; None: A = S


class ReplayArguments(NamedTuple):
    """Arguments of ``replay_drafts``: N rows that are held, K steps."""

    states: Written  # float32 [S, L, C, H, W], written behind the first row
    mean: Written  # float32 [S, L - 1, C, H, W], written
    std: Written  # float32 [S, L - 1, C, H, W], written
    noise: Tensor  # float32 [S, L, C, H, W]
    table: Tensor  # float32 [K, 8]
    steps: Tensor  # int64 [S]
    held_states: Tensor  # float32 [N, C, H, W]
    held_clean: Tensor  # float32 [N, C or 2 C, H, W]
    latest: Tensor  # int64 [S, W]
    before: Tensor  # int64 [S]
    response: Tensor  # float32 [S, 3, 2]
    pattern: Tensor  # float32 [S, 2, C, H, W]
    clip: float  # inf: no clipping


class JoinArguments(NamedTuple):
    """Arguments of ``join_rows``: A rows of a drafter's call, N rows that are held, ``drafts`` of each of S slots."""

    feature: Tensor  # float32, float16 or bfloat16 [B A, T, D]
    previous: Tensor  # float32 [B A, C, H, W]
    state: Tensor  # float32 [B A, C, H, W]
    t: Tensor  # int64 [B A]
    y: Tensor  # int64 [B A]
    asked: Tensor  # float32 [N, C, H, W]
    features: Tensor  # float32, float16 or bfloat16 [B, N, T, D]
    before: Tensor  # int64 [S]
    latest: Tensor  # int64 [S, W], W >= drafts
    timesteps: Tensor  # int64 [S, L], L > drafts
    labels: Tensor  # int64 [S]
    drafts: int
    null_label: int | None
    chosen: Tensor | None  # int64 [P], in [0, drafts S); None: P = drafts S, all of them


class ErrorArguments(NamedTuple):
    """Arguments of ``row_errors``, which comes after ``join_rows``."""

    drafted: Tensor  # float32, float16 or bfloat16 [B A + B P, T, D]
    features: Tensor  # float32, float16 or bfloat16 [B, N, T, D]
    latest: Tensor  # int64 [S, W], W >= drafts
    drafts: int
    inputs: int  # B A
    chosen: Tensor | None  # int64 [P]


def further_rows(a: JoinArguments | ErrorArguments) -> int:
    """P, the further rows of each branch."""
    return a.drafts * a.latest.shape[0] if a.chosen is None else a.chosen.shape[0]


class CorrectArguments(NamedTuple):
    """Arguments of ``correct_features``: A of S slots, N states that are held."""

    drafted: Tensor  # float32, float16 or bfloat16 [B A, T, D]
    errors: Tensor  # of drafted's dtype [B, drafts, S, T, D]
    state: Tensor  # float32 [A, C, H, W]
    previous: Tensor  # float32 [A, C, H, W]
    asked: Tensor  # float32 [N, C, H, W]
    latest: Tensor  # int64 [S, W], W > draft
    draft: int
    active: Tensor | None  # int64 [A]; None: A = S


class KeepArguments(NamedTuple):
    """Arguments of ``keep_rows``: M places of each slot and one for what is not kept."""

    states: Tensor  # float32 [S, L, C, H, W]
    features: Tensor  # float32, float16 or bfloat16 [B R, T, D]
    output: Tensor  # float32, float16 or bfloat16 [B R, C or 2 C, H, W]
    row_offsets: Tensor  # int64 [S + 1]
    committed: Tensor  # int64 [S]
    lengths: Tensor  # int64 [S]
    steps: Tensor  # int64 [S]
    at: Written  # int64 [S, M + 1], written
    held_states: Written  # float32 [S, M + 1, C, H, W], written
    held_features: Written  # of features' dtype [B, S, M + 1, T, D], written


class KeepCleanArguments(NamedTuple):
    """Arguments of ``keep_clean_rows``: M places of each slot, of which M - 1 rows take all but
    one, and one for what is not kept; K steps."""

    states: Tensor  # float32 [S, L, C, H, W]
    output: Tensor  # float32, float16 or bfloat16 [B R, C or 2 C, H, W]
    row_offsets: Tensor  # int64 [S + 1]
    committed: Tensor  # int64 [S]
    lengths: Tensor  # int64 [S]
    steps: Tensor  # int64 [S]
    table: Tensor  # float32 [K, 8]
    before: Tensor  # int64 [S]
    at: Written  # int64 [S, M + 1], written
    held_states: Written  # float32 [S, M + 1, C, H, W], written
    held_clean: Written  # float32 [S, M + 1, C or 2 C, H, W], written
    response: Written  # float32 [S, 3, 2], written
    pattern: Written  # float32 [S, 2, C, H, W], written
    guidance_scale: float  # 1: output has no unconditional branch
    guidance_channels: int  # in [0, C]
    clip: float  # inf: no clipping


class FindArguments(NamedTuple):
    """Arguments of ``find_rows``."""

    at: Written  # int64 [S, M + 1], written
    steps: Tensor  # int64 [S]
    places: Written  # int64 [S, W], W < M, written
    before: Written  # int64 [S], written
    ahead: Written  # int64 [S], written


class TallyArguments(NamedTuple):
    """Arguments of ``tally_round``."""

    output: Tensor  # float32, float16 or bfloat16 [B R, C or 2 C, H, W]
    next_states: Tensor  # float32 [S, C, H, W]
    gap_sq: Tensor  # float32 [S, L - 1]
    committed: Tensor  # int64 [S]
    lengths: Tensor  # int64 [S]
    steps: Tensor  # int64 [S]
    deviation: Written  # float32 [K], written


class RenewArguments(NamedTuple):
    """Arguments of ``renew_slots``: N images."""

    steps: Tensor  # int64 [S]
    images: Tensor  # int64 [S]
    numbers: Tensor  # int64 [N]
    indices: Written  # int64 [S], written
    rounds: Written  # int64 [S], written
