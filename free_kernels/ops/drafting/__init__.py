"""The drafting pass: states of drafts from the network's outputs, and the memory of refused rows."""

from free_kernels.ops.drafting.api import advance_drafts, find_rows, keep_rows, tally_round
from free_kernels.ops.drafting.arguments import AdvanceArguments, FindArguments, KeepArguments, TallyArguments

__all__ = [
    "AdvanceArguments",
    "FindArguments",
    "KeepArguments",
    "TallyArguments",
    "advance_drafts",
    "find_rows",
    "keep_rows",
    "tally_round",
]
