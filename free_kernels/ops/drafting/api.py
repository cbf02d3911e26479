"""Ops of the drafting pass: the states of drafts, and the memory of refused rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from free_kernels.constants import TransitionColumn
from free_kernels.ops.checks import FLOATS, INT64, Layouts
from free_kernels.ops.declaration import KernelOp
from free_kernels.ops.drafting import reference
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
    RowArguments,
    TallyArguments,
)
from free_kernels.validation import fail

FLOAT32 = (torch.float32,)


def _check_advance(a: AdvanceArguments) -> None:
    op = "advance_drafts"
    Layouts(op, None, {}).check("states", a.states, FLOAT32, "[S, L, C, H, W]")
    slots, length, channels, height, width = a.states.shape
    sizes = {"S": slots, "L": length, "L - 1": length - 1, "C": channels, "H": height, "W": width}
    sizes["8"] = len(TransitionColumn)
    layouts = Layouts(op, a.states.device, sizes)
    for name in ("mean", "std"):
        layouts.check(name, getattr(a, name), FLOAT32, "[S, L - 1, C, H, W]")
    layouts.check("noise", a.noise, FLOAT32, "[S, L, C, H, W]")
    layouts.check("columns", a.columns, FLOAT32, "[S, L, 8]")
    layouts.check("output", a.output, FLOATS, "[B R, C or 2 C, H, W]")
    branches, outputs = 1 if a.guidance_scale == 1.0 else 2, a.output.shape[1]
    sizes["R"] = a.output.shape[0] // branches
    if a.output.shape[0] % branches or outputs not in (channels, 2 * channels):
        fail(op, "output", f"[B R, C or 2 C, H, W] with B = {branches} and C = {channels}", a.output)
    layouts.check("rows", a.rows, INT64, "[S, width]")
    if not 0 <= a.first <= a.end <= min(length - 1, a.rows.shape[1]):
        fail(op, "first and end", f"in order in [0, {min(length - 1, a.rows.shape[1])}]", (a.first, a.end))
    if (a.asked is None) != (a.replaced is None):
        fail(op, "asked and replaced", "both given or neither", "one of them")
    if a.asked is not None:
        layouts.check("asked", a.asked, FLOAT32, "[R, C, H, W]")
        sizes["width"] = a.rows.shape[1]
        layouts.check("replaced", a.replaced, INT64, "[S, width]")


def _check_open(a: OpenArguments) -> None:
    op = "open_round"
    Layouts(op, None, {}).check("state", a.state, FLOAT32, "[S, C, H, W]")
    layouts = Layouts(op, a.state.device, {"S": a.state.shape[0], "8": len(TransitionColumn)})
    layouts.check("current", a.current, INT64, "[S]")
    layouts.check("timesteps", a.timesteps, INT64, "[K]")
    layouts.sizes = {"K": a.timesteps.shape[0], "8": len(TransitionColumn)}
    layouts.check("table", a.table, FLOAT32, "[K, 8]")
    if a.length < 1 or not len(a.timesteps):
        fail(op, "length and the number of timesteps", "at least 1", (a.length, len(a.timesteps)))


def _check_rows(a: RowArguments) -> None:
    op = "draft_rows"
    Layouts(op, None, {}).check("states", a.states, FLOAT32, "[S, L, C, H, W]")
    slots, length = a.states.shape[:2]
    layouts = Layouts(op, a.states.device, {"S": slots, "L": length})
    layouts.check("timesteps", a.timesteps, INT64, "[S, L]")
    if not 0 <= a.draft < length:
        fail(op, "draft", f"in [0, {length})", a.draft)
    if a.branches not in (1, 2):
        fail(op, "branches", "1 or 2", a.branches)
    if a.active is not None:
        layouts.check("active", a.active, INT64, "[A]")


def _check_follow(a: FollowArguments) -> None:
    op = "follow_features"
    Layouts(op, None, {}).check("features", a.features, FLOATS, "[B, N, T, D]")
    sizes = dict(zip(("B", "N", "T", "D"), a.features.shape, strict=True))
    layouts = Layouts(op, a.features.device, sizes)
    layouts.check("parent", a.parent, (a.features.dtype,), "[B, S, T, D]")
    sizes["S"] = a.parent.shape[1]
    layouts.check("latest", a.latest, INT64, "[S, W]")
    sizes["W"] = a.latest.shape[1]
    layouts.check("replaced", a.replaced, INT64, "[S, W]")
    layouts.check("ahead", a.ahead, INT64, "[S]")
    layouts.check("share", a.share, FLOAT32, "[S, drafts]")
    if not 1 <= a.share.shape[1] <= sizes["W"]:
        fail(op, "share", f"[S, drafts] with drafts in [1, {sizes['W']}]", a.share)


def _check_join(a: JoinArguments) -> None:
    op = "join_rows"
    Layouts(op, None, {}).check("feature", a.feature, FLOATS, "[B A, T, D]")
    sizes = dict(zip(("B A", "T", "D"), a.feature.shape, strict=True))
    layouts = Layouts(op, a.feature.device, sizes)
    layouts.check("state", a.state, FLOAT32, "[B A, C, H, W]")
    _, sizes["C"], sizes["H"], sizes["W"] = a.state.shape
    layouts.check("previous", a.previous, FLOAT32, "[B A, C, H, W]")
    for name in ("t", "y"):
        layouts.check(name, getattr(a, name), INT64, "[B A]")
    layouts.check("asked", a.asked, FLOAT32, "[N, C, H, W]")
    sizes["N"] = a.asked.shape[0]
    layouts.check("features", a.features, FLOATS, "[B, N, T, D]")
    layouts.check("latest", a.latest, INT64, "[S, width]")
    sizes["S"], width = a.latest.shape
    for name in ("before", "labels"):
        layouts.check(name, getattr(a, name), INT64, "[S]")
    layouts.check("timesteps", a.timesteps, INT64, "[S, L]")
    if not 1 <= a.drafts <= min(width, a.timesteps.shape[1]):
        fail(op, "drafts", f"in [1, {min(width, a.timesteps.shape[1])}]", a.drafts)
    if a.features.shape[0] != (1 if a.null_label is None else 2):
        fail(op, "null_label", "given exactly where features have 2 branches", a.null_label)
    if a.chosen is not None:
        layouts.check("chosen", a.chosen, INT64, "[P]")


def _check_errors(a: ErrorArguments) -> None:
    op = "row_errors"
    Layouts(op, None, {}).check("features", a.features, FLOATS, "[B, N, T, D]")
    branches, _, tokens, width = a.features.shape
    layouts = Layouts(op, a.features.device, {"T": tokens, "D": width})
    layouts.check("latest", a.latest, INT64, "[S, width]")
    if not 1 <= a.drafts <= a.latest.shape[1]:
        fail(op, "drafts", f"in [1, {a.latest.shape[1]}]", a.drafts)
    rows = a.drafts * a.latest.shape[0] if a.chosen is None else len(a.chosen)
    layouts.sizes = {"T": tokens, "D": width, "B A + B P": a.inputs + branches * rows}
    layouts.check("drafted", a.drafted, FLOATS, "[B A + B P, T, D]")
    if a.chosen is not None:
        layouts.check("chosen", a.chosen, INT64, "[P]")


def _fake_rows(a: RowArguments) -> tuple[Tensor, Tensor]:
    rows = a.branches * (a.states.shape[0] if a.active is None else a.active.shape[0])
    return a.states.new_empty(rows, *a.states.shape[2:]), a.timesteps.new_empty(rows)


def _fake_join(a: JoinArguments) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    further = a.drafts * a.latest.shape[0] if a.chosen is None else a.chosen.shape[0]
    rows = a.feature.shape[0] + a.features.shape[0] * further
    return tuple(part.new_empty(rows, *part.shape[1:]) for part in a[:5])


def _fake_errors(a: ErrorArguments) -> Tensor:
    return a.drafted.new_empty(a.features.shape[0], a.drafts, a.latest.shape[0], *a.drafted.shape[1:])


def _check_correct(a: CorrectArguments) -> None:
    op = "correct_features"
    Layouts(op, None, {}).check("drafted", a.drafted, FLOATS, "[B A, T, D]")
    sizes = dict(zip(("B A", "T", "D"), a.drafted.shape, strict=True))
    layouts = Layouts(op, a.drafted.device, sizes)
    layouts.check("errors", a.errors, (a.drafted.dtype,), "[B, drafts, S, T, D]")
    branches, drafts, sizes["S"] = a.errors.shape[:3]
    layouts.check("state", a.state, FLOAT32, "[A, C, H, W]")
    sizes |= dict(zip(("A", "C", "H", "W"), a.state.shape, strict=True))
    layouts.check("previous", a.previous, FLOAT32, "[A, C, H, W]")
    layouts.check("asked", a.asked, FLOAT32, "[N, C, H, W]")
    layouts.check("latest", a.latest, INT64, "[S, width]")
    if a.active is not None:
        layouts.check("active", a.active, INT64, "[A]")
    if sizes["B A"] != branches * sizes["A"] or (a.active is None and sizes["A"] != sizes["S"]):
        fail(op, "drafted", f"[B A, T, D] with B = {branches} and A = {sizes['A']} of {sizes['S']} slots", a.drafted)
    if not 0 <= a.draft < min(drafts, a.latest.shape[1]):
        fail(op, "draft", f"in [0, {min(drafts, a.latest.shape[1])})", a.draft)


def _check_keep(a: KeepArguments) -> None:
    op = "keep_rows"
    Layouts(op, None, {}).check("states", a.states, FLOAT32, "[S, L, C, H, W]")
    slots, _, channels, height, width = a.states.shape
    sizes = {"S": slots, "S + 1": slots + 1, "C": channels, "H": height, "W": width}
    layouts = Layouts(op, a.states.device, sizes)
    layouts.check("features", a.features, FLOATS, "[B R, T, D]")
    sizes["B R"], sizes["T"], sizes["D"] = a.features.shape
    layouts.check("output", a.output, FLOATS, "[B R, outputs, H, W]")
    sizes["outputs"] = a.output.shape[1]
    layouts.check("row_offsets", a.row_offsets, INT64, "[S + 1]")
    for name in ("committed", "lengths", "steps"):
        layouts.check(name, getattr(a, name), INT64, "[S]")
    layouts.check("at", a.at, INT64, "[G, S, M + 1]")
    sizes["G"], _, sizes["M + 1"] = a.at.shape
    layouts.check("turn", a.turn, INT64, "[S, M + 1]")
    layouts.check("held_states", a.held_states, FLOAT32, "[G, S, M + 1, C, H, W]")
    layouts.check("held_features", a.held_features, (a.features.dtype,), "[B, G, S, M + 1, T, D]")
    sizes["B"] = a.held_features.shape[0]
    if a.held_output is not None:
        layouts.check("held_output", a.held_output, (a.output.dtype,), "[B, G, S, M + 1, outputs, H, W]")


def _check_find(a: FindArguments) -> None:
    op = "find_rows"
    Layouts(op, None, {}).check("at", a.at, INT64, "[G, S, M + 1]")
    generations, slots, places = a.at.shape
    layouts = Layouts(op, a.at.device, {"G": generations, "S": slots, "M + 1": places, "M - 1": places - 2})
    layouts.check("turn", a.turn, INT64, "[S, M + 1]")
    layouts.check("places", a.places, INT64, "[G, S, M - 1]")
    for name in ("steps", "before", "ahead"):
        layouts.check(name, getattr(a, name), INT64, "[S]")


def _check_renew(a: RenewArguments) -> None:
    op = "renew_slots"
    Layouts(op, None, {}).check("steps", a.steps, INT64, "[S]")
    layouts = Layouts(op, a.steps.device, {"S": a.steps.shape[0]})
    for name in ("images", "indices", "rounds"):
        layouts.check(name, getattr(a, name), INT64, "[S]")
    layouts.check("numbers", a.numbers, INT64, "[N]")


def _check_tally(a: TallyArguments) -> None:
    op = "tally_round"
    Layouts(op, None, {}).check("next_states", a.next_states, FLOAT32, "[S, C, H, W]")
    layouts = Layouts(op, a.next_states.device, {"S": a.next_states.shape[0]})
    layouts.check("output", a.output, FLOATS, "[B R, outputs, H, W]")
    layouts.check("gap_sq", a.gap_sq, FLOAT32, "[S, L - 1]")
    for name in ("committed", "lengths", "steps"):
        layouts.check(name, getattr(a, name), INT64, "[S]")
    layouts.check("deviation", a.deviation, FLOAT32, "[K]")


def _advance(a: AdvanceArguments) -> Tensor:
    if a.states.is_cpu and not torch.compiler.is_compiling():
        count = a.output.shape[0] // (1 if a.guidance_scale == 1.0 else 2)
        for name, rows in (("rows", a.rows), ("replaced", a.replaced)):
            within = None if rows is None else rows[:, a.first : a.end]
            if within is not None and within.numel() and int(within.max()) >= count:
                fail("advance_drafts", name, f"below {count}", int(within.max()))
    return reference.advance_drafts(a)


def _fake_advance(a: AdvanceArguments) -> Tensor:
    return a.states.new_empty(a.states.shape[0], 0 if a.replaced is None else a.end - a.first)


def _fake_open(a: OpenArguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = a.state.shape[0], a.length
    steps = a.current.new_empty(rows)
    return steps, torch.empty_like(steps), a.table.new_empty(*rows, 8), a.state.new_empty(*rows, *a.state.shape[1:])


def _declare(
    name: str,
    arguments: type,
    run: Callable[[Any], Any],
    fake: Callable[[Any], Any],
    check: Callable[[Any], None],
    outputs: str = "()",
) -> KernelOp:
    return KernelOp(name, arguments, run, fake, check, folder="drafting", outputs=outputs)


ADVANCE = _declare("advance_drafts", AdvanceArguments, _advance, _fake_advance, _check_advance, "Tensor")
KEEP = _declare("keep_rows", KeepArguments, reference.keep_rows, lambda a: None, _check_keep)
FIND = _declare("find_rows", FindArguments, reference.find_rows, lambda a: None, _check_find)
TALLY = _declare(
    "tally_round", TallyArguments, reference.tally_round, lambda a: a.steps.new_empty(1), _check_tally, "Tensor"
)
OPEN = _declare(
    "open_round", OpenArguments, reference.open_round, _fake_open, _check_open, "(Tensor, Tensor, Tensor, Tensor)"
)
FOLLOW = _declare(
    "follow_features",
    FollowArguments,
    reference.follow_features,
    lambda a: torch.empty_like(a.parent),
    _check_follow,
    "Tensor",
)
CORRECT = _declare(
    "correct_features",
    CorrectArguments,
    reference.correct_features,
    lambda a: torch.empty_like(a.drafted),
    _check_correct,
    "Tensor",
)
RENEW = _declare(
    "renew_slots",
    RenewArguments,
    reference.renew_slots,
    lambda a: a.steps.new_empty(a.steps.shape, dtype=torch.bool),
    _check_renew,
    "Tensor",
)
JOIN = _declare(
    "join_rows",
    JoinArguments,
    reference.join_rows,
    _fake_join,
    _check_join,
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
)
ERRORS = _declare("row_errors", ErrorArguments, reference.row_errors, _fake_errors, _check_errors, "Tensor")
ROWS = _declare("draft_rows", RowArguments, reference.draft_rows, _fake_rows, _check_rows, "(Tensor, Tensor)")
OPS = OPEN, ROWS, ADVANCE, FOLLOW, JOIN, ERRORS, CORRECT, KEEP, FIND, TALLY, RENEW


def open_round(arguments: OpenArguments, backend: str = "auto") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a round of L rows a slot begins with.

    Returns:
        Steps ``current[s] + j``, those past the end being the last, int64 ``[S, L]``; the network's timesteps there;
        their transition coefficients ``[S, L, 8]``; the drafts' states ``[S, L, C, H, W]`` with ``state`` in row 0, the
        others undefined.

    Raises:
        ValueError, TypeError: a wrong argument.
        RuntimeError: the backend cannot be used; the message says why.
    """
    return OPEN(arguments, arguments.state, backend)


def draft_rows(arguments: RowArguments, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """States and timesteps of one draft of A slots, once for each guidance branch.

    Returns:
        ``states[active, draft]`` float32 ``[B A, C, H, W]``, and ``timesteps[active, draft]`` int64 ``[B A]``.

    Raises:
        ValueError, TypeError: a wrong argument.
        RuntimeError: the backend cannot be used; the message says why.
    """
    return ROWS(arguments, arguments.states, backend)


def follow_features(arguments: FollowArguments, backend: str = "auto") -> Tensor:
    """The features that drafts behind the refused rows of each slot repeat, ``[B, S, T, D]``.

    With ``j = min(ahead[s], drafts) - 1`` the last draft that a row serves: the feature of its row ``latest[s, j]``,
    followed along the secant from ``replaced[s, j]``, where there is one, by ``share[s, j]`` as
    :func:`advance_drafts` returns it. The parent's where no row serves.

    Raises:
        ValueError, TypeError: a wrong argument.
        RuntimeError: the backend cannot be used; the message says why.
    """
    return FOLLOW(arguments, arguments.features, backend)


def join_rows(arguments: JoinArguments, backend: str = "auto") -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Inputs of a drafter's call for A rows of each branch, and behind them those at refused rows of each branch.

    Number ``j S + s`` of the further rows is the refused one of draft j of slot s: its state and timestep, the state
    and feature of the row before it (``before[s]``, then ``latest[s, j - 1]``), and its label, ``null_label`` in the
    second branch. They are those of ``chosen``, in its order, or all. A row that is not there gives any numbers.

    Returns:
        Feature ``[B A + B P, T, D]``, previous state, state, timestep and label of all rows.

    Raises:
        ValueError, TypeError: a wrong argument.
        RuntimeError: the backend cannot be used; the message says why.
    """
    return JOIN(arguments, arguments.feature, backend)


def row_errors(arguments: ErrorArguments, backend: str = "auto") -> Tensor:
    """What a drafter gets wrong at the further rows of :func:`join_rows`: exact less drafted, ``[B, drafts, S, T, D]``.

    An error that is not finite counts as none, and one of a row that was not chosen is 0.

    Raises:
        ValueError, TypeError: a wrong argument.
        RuntimeError: the backend cannot be used; the message says why.
    """
    return ERRORS(arguments, arguments.drafted, backend)


def correct_features(arguments: CorrectArguments, backend: str = "auto") -> Tensor:
    """Drafted features plus the drafter's errors at refused rows, ``[B A, T, D]``.

    The error ``errors[b, draft, s]`` of a slot is added where it has a row ``latest[s, draft]``, and the state that
    was asked there is nearer to ``state`` than ``previous`` is. Row i is of slot ``active[i]``, or i.

    Raises:
        ValueError, TypeError: a wrong argument.
        RuntimeError: the backend cannot be used; the message says why.
    """
    return CORRECT(arguments, arguments.drafted, backend)


def renew_slots(arguments: RenewArguments, backend: str = "auto") -> Tensor:
    """After a commit: the job's number of each slot's image in ``indices``, and ``rounds`` one more, 0 for a new image.

    Returns:
        bool ``[S]``, the slots whose image is at its first step.

    Raises:
        ValueError, TypeError: a wrong argument.
        RuntimeError: the backend cannot be used; the message says why.
    """
    return RENEW(arguments, arguments.steps, backend)


def advance_drafts(
    states: Tensor,
    mean: Tensor,
    std: Tensor,
    noise: Tensor,
    columns: Tensor,
    output: Tensor,
    rows: Tensor,
    first: int,
    end: int,
    *,
    asked: Tensor | None = None,
    replaced: Tensor | None = None,
    guidance_scale: float = 1.0,
    guidance_channels: int | None = None,
    clip: float = math.inf,
    backend: str = "auto",
) -> Tensor:
    """Make drafts ``first`` to ``end - 1`` of every slot, each from the state before it, in place.

    Draft j of slot s takes the network's output at ``rows[s, j]``: ``mean[s, j]`` and ``std[s, j]`` are those of
    :func:`~free_kernels.ops.gaussian_transition` at ``states[s, j]``, and ``states[s, j + 1] = mean + std *
    noise[s, j]``. Where ``rows[s, j]`` is negative nothing is written.

    Where the outputs are of other states, ``asked``, and a step was asked about twice, the output follows the line
    through both rows to the point nearest to the draft's state (a secant), no further from the latest row than the two
    are apart: with ``share = clamp(<x - latest, latest - replaced> / |latest - replaced|^2, -1, 1)`` it is
    ``output[latest] + share (output[latest] - output[replaced])``.

    Args:
        states: float32 ``[S, L, C, H, W]``; entries ``first + 1`` to ``end`` are written.
        mean, std: float32 ``[S, L - 1, C, H, W]``, written.
        noise: float32 ``[S, L, C, H, W]``.
        columns: float32 ``[S, L, 8]``, transition coefficients of each row's step.
        output: ``[B R, C or 2C, H, W]``, float32, float16 or bfloat16; B = 2 with guidance, conditional rows first.
        rows: int64 ``[S, W]`` with W at least ``end``, in ``[0, R)`` or negative.
        first, end: in ``[0, L - 1]``.
        asked: float32 ``[R, C, H, W]``, states at which the rows of ``output`` were asked.
        replaced: int64 ``[S, W]``, the older row of the step of each draft; negative where there is none.
        guidance_scale, guidance_channels, clip: as in :func:`~free_kernels.ops.gaussian_transition`.
        backend: ``"auto"`` (Triton on a GPU, else the extension if it is there), ``"reference"``, ``"extension"`` or
            ``"triton"``.

    Returns:
        ``share``, float32 ``[S, end - first]``, 0 where it has no meaning; ``[S, 0]`` without ``replaced``.

    Raises:
        ValueError, TypeError: a wrong argument; values are checked on the CPU only.
        RuntimeError: the backend cannot be used; the message says why.
    """
    channels = states.shape[2] if guidance_channels is None else guidance_channels
    given = (states, mean, std, noise, columns, output, rows, first, end, asked, replaced)
    return ADVANCE(AdvanceArguments(*given, guidance_scale, channels, clip), states, backend)


def keep_rows(arguments: KeepArguments, backend: str = "auto") -> None:
    """Keep a round's last committed row of each slot and those behind it, in place.

    Row j of slot s is kept where ``-1 <= j - committed[s] < M - 1`` and ``j < lengths[s]``. It is of step ``steps[s] +
    j`` and goes to place ``step % M``, into the generation after the one of the place's latest row, ``turn``. There
    ``at`` is its step, or -1 if its feature or output is not finite.

    Raises:
        ValueError, TypeError: a wrong argument.
        RuntimeError: the backend cannot be used; the message says why.
    """
    KEEP(arguments, arguments.states, backend)


def find_rows(arguments: FindArguments, backend: str = "auto") -> None:
    """Where the rows of the next steps are: ``places`` and ``ahead``, in place.

    A slot at step 0 has a new image and loses the rows of the one before. Entry j of a slot is of step ``steps[s] +
    j``, draft j's. ``places[0]`` are its latest rows and ``places[1]`` those that they replaced, as numbers among all
    G S (M + 1); -1 from the first entry on that has no latest row, and where there is none. ``ahead`` counts the latest
    rows. ``before`` is the place of the row of the step before, which is there where ``ahead`` is not 0.

    Raises:
        ValueError, TypeError: a wrong argument.
        RuntimeError: the backend cannot be used; the message says why.
    """
    FIND(arguments, arguments.at, backend)


def tally_round(arguments: TallyArguments, backend: str = "auto") -> Tensor:
    """Add the squared gaps of the tested rows to ``deviation`` at their steps; int64 ``[1]``, whether all is finite.

    Rows are tested up to and including the first refused one. A gap that is not finite counts as 1e30.

    Raises:
        ValueError, TypeError: a wrong argument.
        RuntimeError: the backend cannot be used; the message says why.
    """
    return TALLY(arguments, arguments.next_states, backend)
