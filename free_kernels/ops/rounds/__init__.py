"""Ops of a round in one call."""

from free_kernels.ops.rounds.api import advance_from_features, decide_round, open_keyed_round
from free_kernels.ops.rounds.arguments import (
    DecideArguments,
    DecidedRound,
    HeadAdvanceArguments,
    OpenedWithNoise,
    OpenKeyedArguments,
)

__all__ = [
    "DecideArguments",
    "DecidedRound",
    "HeadAdvanceArguments",
    "OpenKeyedArguments",
    "OpenedWithNoise",
    "advance_from_features",
    "decide_round",
    "open_keyed_round",
]
