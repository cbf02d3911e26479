"""Ops of a round in one call."""

from free_kernels.ops.rounds.api import advance_from_features, close_round, open_keyed_round
from free_kernels.ops.rounds.arguments import CloseArguments, HeadAdvanceArguments, OpenedWithNoise, OpenKeyedArguments

__all__ = [
    "CloseArguments",
    "HeadAdvanceArguments",
    "OpenKeyedArguments",
    "OpenedWithNoise",
    "advance_from_features",
    "close_round",
    "open_keyed_round",
]
