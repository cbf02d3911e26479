"""What the drafting ops take; ``free_kernels.ops.drafting.api`` describes each argument."""

from __future__ import annotations

from typing import Annotated, NamedTuple

from torch import Tensor

# What an op writes to, as its schema says.
Written = Annotated[Tensor, "written"]


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
    asked: Tensor | None  # float32 [R, C, H, W]
    replaced: Tensor | None  # int64 [S, W]
    guidance_scale: float  # 1: output has no unconditional branch
    guidance_channels: int  # in [0, C]
    clip: float  # inf: no clipping


class KeepArguments(NamedTuple):
    """Arguments of ``keep_rows``: M places of each slot and one for what is not kept, G generations."""

    states: Tensor  # float32 [S, L, C, H, W]
    features: Tensor  # float32, float16 or bfloat16 [B R, T, D]
    output: Tensor  # float32, float16 or bfloat16 [B R, C or 2 C, H, W]
    row_offsets: Tensor  # int64 [S + 1]
    committed: Tensor  # int64 [S]
    lengths: Tensor  # int64 [S]
    steps: Tensor  # int64 [S]
    at: Written  # int64 [G, S, M + 1], written
    turn: Written  # int64 [S, M + 1], written
    held_states: Written  # float32 [G, S, M + 1, C, H, W], written
    held_features: Written  # of features' dtype [B, G, S, M + 1, T, D], written
    held_output: Written | None  # of output's dtype [B, G, S, M + 1, C or 2 C, H, W], written


class FindArguments(NamedTuple):
    """Arguments of ``find_rows``."""

    at: Tensor  # int64 [G, S, M + 1]
    turn: Tensor  # int64 [S, M + 1]
    steps: Tensor  # int64 [S]
    places: Written  # int64 [G, S, M], written
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
