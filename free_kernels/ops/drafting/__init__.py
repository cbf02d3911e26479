"""The drafting pass: states of drafts from the network's outputs, and the memory of refused rows."""

from free_kernels.ops.drafting.api import (
    advance_drafts,
    correct_features,
    find_rows,
    follow_features,
    keep_rows,
    open_round,
    renew_slots,
    tally_round,
)
from free_kernels.ops.drafting.arguments import (
    AdvanceArguments,
    CorrectArguments,
    FindArguments,
    FollowArguments,
    KeepArguments,
    OpenArguments,
    RenewArguments,
    TallyArguments,
)

__all__ = [
    "AdvanceArguments",
    "CorrectArguments",
    "FindArguments",
    "FollowArguments",
    "KeepArguments",
    "OpenArguments",
    "RenewArguments",
    "TallyArguments",
    "advance_drafts",
    "correct_features",
    "find_rows",
    "follow_features",
    "keep_rows",
    "open_round",
    "renew_slots",
    "tally_round",
]
