"""What the packing ops take; ``free_kernels.ops`` describes each argument."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from free_kernels.ops.fields import Open


class PackArguments(NamedTuple):
    """Arguments of ``pack_drafts``."""

    states: Tensor  # float32, float16 or bfloat16 [S, L, C, H, W]
    lengths: Tensor  # int64 [S]
    steps: Tensor  # int64 [S]
    labels: Tensor  # int64 [S]
    timesteps: Tensor  # int64 [K]
    num_rows: Open
    null_label: int | None = None


class CommitArguments(NamedTuple):
    """Arguments of ``commit_drafts``."""

    committed: Tensor  # int64 [S]
    next_states: Tensor  # of draft_states' dtype [S, C, H, W]
    draft_states: Tensor  # float32, float16 or bfloat16 [S, L, C, H, W]
    features: Tensor  # float32, float16 or bfloat16 [B R, T, D]
    row_offsets: Tensor  # int64 [S + 1]
    state: Tensor  # of draft_states' dtype [S, C, H, W], written
    previous: Tensor  # of draft_states' dtype [S, C, H, W], written
    parent: Tensor  # of features' dtype [B, S, T, D], written
    steps: Tensor  # int64 [S], written
    images: Tensor  # int64 [S], written
    labels: Tensor  # int64 [S], written
    samples: Tensor  # of draft_states' dtype [N, C, H, W], written
    all_labels: Tensor  # int64 [N]
    queue: Tensor  # int64 [1], written
    num_steps: int
