"""The drafting pass: states of drafts from the network's outputs, and the memory of refused rows."""

from free_kernels.ops.drafting.api import (
    advance_drafts,
    correct_features,
    find_rows,
    follow_features,
    join_rows,
    keep_rows,
    open_round,
    renew_slots,
    row_errors,
    tally_round,
)
from free_kernels.ops.drafting.arguments import (
    AdvanceArguments,
    CorrectArguments,
    ErrorArguments,
    FindArguments,
    FollowArguments,
    JoinArguments,
    KeepArguments,
    OpenArguments,
    RenewArguments,
    TallyArguments,
)

__all__ = [
    "AdvanceArguments",
    "CorrectArguments",
    "ErrorArguments",
    "FindArguments",
    "FollowArguments",
    "JoinArguments",
    "KeepArguments",
    "OpenArguments",
    "RenewArguments",
    "TallyArguments",
    "advance_drafts",
    "correct_features",
    "find_rows",
    "follow_features",
    "join_rows",
    "keep_rows",
    "open_round",
    "renew_slots",
    "row_errors",
    "tally_round",
]
