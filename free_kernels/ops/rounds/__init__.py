"""Ops of a round in one call."""

from free_kernels.ops.rounds.api import CloseArguments, HeadAdvanceArguments, advance_from_features, close_round

__all__ = ["CloseArguments", "HeadAdvanceArguments", "advance_from_features", "close_round"]
