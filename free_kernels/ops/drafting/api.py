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
    JoinArguments,
    KeepArguments,
    KeepCleanArguments,
    OpenArguments,
    Opened,
    RenewArguments,
    ReplayArguments,
    RowArguments,
    TallyArguments,
    further_rows,
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


def _check_replay(a: ReplayArguments) -> None:
    op = "replay_drafts"
    Layouts(op, None, {}).check("states", a.states, FLOAT32, "[S, L, C, H, W]")
    slots, length, channels, height, width = a.states.shape
    sizes = {"S": slots, "L": length, "L - 1": length - 1, "C": channels, "H": height, "W": width, "2": 2, "3": 3}
    layouts = Layouts(op, a.states.device, sizes | {"8": len(TransitionColumn)})
    for name in ("mean", "std"):
        layouts.check(name, getattr(a, name), FLOAT32, "[S, L - 1, C, H, W]")
    layouts.check("noise", a.noise, FLOAT32, "[S, L, C, H, W]")
    layouts.check("table", a.table, FLOAT32, "[K, 8]")
    for name in ("steps", "before"):
        layouts.check(name, getattr(a, name), INT64, "[S]")
    layouts.check("held_states", a.held_states, FLOAT32, "[N, C, H, W]")
    layouts.sizes["N"] = a.held_states.shape[0]
    layouts.check("held_clean", a.held_clean, FLOAT32, "[N, C or 2 C, H, W]")
    if a.held_clean.shape[1] not in (channels, 2 * channels):
        fail(op, "held_clean", f"[N, C or 2 C, H, W] with C = {channels}", a.held_clean)
    layouts.check("latest", a.latest, INT64, "[S, width]")
    layouts.check("response", a.response, FLOAT32, "[S, 3, 2]")
    layouts.check("pattern", a.pattern, FLOAT32, "[S, 2, C, H, W]")
    if length < 1 or not a.table.shape[0]:
        fail(op, "L and K", "at least 1", (length, a.table.shape[0]))


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
    _check_held(op, a)


def _check_held(op: str, a: JoinArguments | ErrorArguments) -> None:
    """The first row stands for those that are not there, so it has to be."""
    if further_rows(a) and not a.features.shape[1]:
        fail(op, "features", "[B, N, T, D] with N at least 1", a.features)


def _check_errors(a: ErrorArguments) -> None:
    op = "row_errors"
    Layouts(op, None, {}).check("features", a.features, FLOATS, "[B, N, T, D]")
    branches, _, tokens, width = a.features.shape
    layouts = Layouts(op, a.features.device, {"T": tokens, "D": width})
    layouts.check("latest", a.latest, INT64, "[S, width]")
    if not 1 <= a.drafts <= a.latest.shape[1]:
        fail(op, "drafts", f"in [1, {a.latest.shape[1]}]", a.drafts)
    if a.chosen is not None:
        layouts.check("chosen", a.chosen, INT64, "[P]")
    _check_held(op, a)
    layouts.sizes = {"T": tokens, "D": width, "B A + B P": a.inputs + branches * further_rows(a)}
    layouts.check("drafted", a.drafted, FLOATS, "[B A + B P, T, D]")


def _fake_rows(a: RowArguments) -> tuple[Tensor, Tensor]:
    rows = a.branches * (a.states.shape[0] if a.active is None else a.active.shape[0])
    return a.states.new_empty(rows, *a.states.shape[2:]), a.timesteps.new_empty(rows)


def _fake_join(a: JoinArguments) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = a.feature.shape[0] + a.features.shape[0] * further_rows(a)
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
    layouts.check("at", a.at, INT64, "[S, M + 1]")
    sizes["M + 1"] = a.at.shape[1]
    layouts.check("held_states", a.held_states, FLOAT32, "[S, M + 1, C, H, W]")
    layouts.check("held_features", a.held_features, (a.features.dtype,), "[B, S, M + 1, T, D]")
    sizes["B"] = a.held_features.shape[0]


def _check_keep_clean(a: KeepCleanArguments) -> None:
    op = "keep_clean_rows"
    Layouts(op, None, {}).check("states", a.states, FLOAT32, "[S, L, C, H, W]")
    slots, _, channels, height, width = a.states.shape
    sizes = {"S": slots, "S + 1": slots + 1, "C": channels, "H": height, "W": width, "2": 2, "3": 3}
    layouts = Layouts(op, a.states.device, sizes | {"8": len(TransitionColumn)})
    layouts.check("output", a.output, FLOATS, "[B R, C or 2 C, H, W]")
    branches, outputs = 1 if a.guidance_scale == 1.0 else 2, a.output.shape[1]
    if a.output.shape[0] % branches or outputs not in (channels, 2 * channels):
        fail(op, "output", f"[B R, C or 2 C, H, W] with B = {branches} and C = {channels}", a.output)
    layouts.check("row_offsets", a.row_offsets, INT64, "[S + 1]")
    layouts.check("table", a.table, FLOAT32, "[K, 8]")
    for name in ("committed", "lengths", "steps", "before"):
        layouts.check(name, getattr(a, name), INT64, "[S]")
    layouts.check("at", a.at, INT64, "[S, M + 1]")
    layouts.sizes |= {"M + 1": a.at.shape[1], "outputs": outputs}
    layouts.check("held_states", a.held_states, FLOAT32, "[S, M + 1, C, H, W]")
    layouts.check("held_clean", a.held_clean, FLOAT32, "[S, M + 1, outputs, H, W]")
    layouts.check("response", a.response, FLOAT32, "[S, 3, 2]")
    layouts.check("pattern", a.pattern, FLOAT32, "[S, 2, C, H, W]")
    if a.at.shape[1] < 3:
        # The row of the step before stays where it is while the rows of the round are kept.
        fail(op, "M", "at least 2", a.at.shape[1] - 1)
    if not a.table.shape[0]:
        fail(op, "K", "at least 1", a.table.shape[0])


def _check_find(a: FindArguments) -> None:
    op = "find_rows"
    Layouts(op, None, {}).check("at", a.at, INT64, "[S, M + 1]")
    slots, places = a.at.shape
    layouts = Layouts(op, a.at.device, {"S": slots})
    layouts.check("places", a.places, INT64, "[S, width]")
    if a.places.shape[1] >= places - 1:
        fail(op, "places", f"[S, W] with W below M = {places - 1}", a.places)
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


def _advance(a: AdvanceArguments) -> None:
    if a.states.is_cpu and not torch.compiler.is_compiling():
        count, within = a.output.shape[0] // (1 if a.guidance_scale == 1.0 else 2), a.rows[:, a.first : a.end]
        if within.numel() and int(within.max()) >= count:
            fail("advance_drafts", "rows", f"below {count}", int(within.max()))
    reference.advance_drafts(a)


def _fake_open(a: OpenArguments) -> Opened:
    slots, *latent = a.state.shape
    steps, states = a.current.new_empty(slots, a.length), a.state.new_empty(slots, a.length, *latent)
    drafts = (a.state.new_empty(slots, a.length - 1, *latent) for _ in range(2))
    return Opened(steps, torch.empty_like(steps), a.table.new_empty(slots, a.length, 8), states, *drafts)


def _declare(
    name: str,
    arguments: type,
    run: Callable[[Any], Any],
    fake: Callable[[Any], Any],
    check: Callable[[Any], None],
    outputs: str = "()",
) -> KernelOp:
    return KernelOp(name, arguments, run, fake, check, folder="drafting", outputs=outputs)


ADVANCE = _declare("advance_drafts", AdvanceArguments, _advance, lambda a: None, _check_advance)
REPLAY = _declare("replay_drafts", ReplayArguments, reference.replay_drafts, lambda a: None, _check_replay)
KEEP = _declare("keep_rows", KeepArguments, reference.keep_rows, lambda a: None, _check_keep)
KEEP_CLEAN = _declare(
    "keep_clean_rows", KeepCleanArguments, reference.keep_clean_rows, lambda a: None, _check_keep_clean
)
FIND = _declare("find_rows", FindArguments, reference.find_rows, lambda a: None, _check_find)
TALLY = _declare(
    "tally_round", TallyArguments, reference.tally_round, lambda a: a.steps.new_empty(1), _check_tally, "Tensor"
)
OPEN = _declare(
    "open_round",
    OpenArguments,
    reference.open_round,
    _fake_open,
    _check_open,
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
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
OPS = OPEN, ROWS, ADVANCE, REPLAY, JOIN, ERRORS, CORRECT, KEEP, KEEP_CLEAN, FIND, TALLY, RENEW


def open_round(arguments: OpenArguments, backend: str = "auto") -> Opened:
    """What a round of L rows a slot begins with.

    Raises:
        ValueError, TypeError: a wrong argument.
        RuntimeError: the backend cannot be used; the message says why.
    """
    return Opened(*OPEN(arguments, arguments.state, backend))


def draft_rows(arguments: RowArguments, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """States and timesteps of one draft of A slots, once for each guidance branch.

    Returns:
        ``states[active, draft]`` float32 ``[B A, C, H, W]``, and ``timesteps[active, draft]`` int64 ``[B A]``.

    Raises:
        ValueError, TypeError: a wrong argument.
        RuntimeError: the backend cannot be used; the message says why.
    """
    return ROWS(arguments, arguments.states, backend)


def replay_drafts(arguments: ReplayArguments, backend: str = "auto") -> None:
    """Make all drafts of every slot from rows that the target was asked about, in place, without a network.

    Each draft has a clean sample, which its mean and state come from as in the schedule: ``mean[s, j] = c clean + d
    states[s, j]`` and ``states[s, j + 1] = mean + std noise[s, j]``, with the coefficients of step ``steps[s] + j`` in
    ``table``. The clean sample follows the state linearly and each element by itself, as it does exactly where the data
    are Gaussian with independent elements: ``clean_j = known + response unit (states[s, j] - there)``, clipped, with
    the unit of its step: X0_FROM_STATE, by which a clean sample moves if the network's output stays, or 1 where that is
    not positive.

    * Where step j has a row ``latest[s, j]``: known is its clean sample and there its state.
    * Elsewhere known is the clean sample of the draft before and there that draft's mean: the noise of its step is what
      has been learned since. Before the first draft is the row ``before[s]``; where there is none, known is 0, which is
      the mean of normalised data, and the variance channels are 0.

    A response is ``average_i = response[s, i, 0] / response[s, i, 1]``, at least 0, with i = 1 at rows and i = 0
    elsewhere. Elsewhere it is an element's own as far as such responses have been right: ``average_0 + share (own -
    average_0)``, where ``own = (pattern[s, 0] + average_0) / (pattern[s, 1] + 1)``, at least 0, and the share is
    ``average_2``, at most 1. An average is 0 where there is nothing to divide by (that of rows is then average_0), and
    every response where there is no row before the first draft: the sums are then those of another image.

    Source: the update of a Kalman filter, with the gains measured along the chain (:func:`keep_clean_rows`).

    Raises:
        ValueError, TypeError: a wrong argument.
        RuntimeError: the backend cannot be used; the message says why.
    """
    REPLAY(arguments, arguments.states, backend)


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
    guidance_scale: float = 1.0,
    guidance_channels: int | None = None,
    clip: float = math.inf,
    backend: str = "auto",
) -> None:
    """Make drafts ``first`` to ``end - 1`` of every slot, each from the state before it, in place.

    Draft j of slot s takes the network's output at ``rows[s, j]``: ``mean[s, j]`` and ``std[s, j]`` are those of
    :func:`~free_kernels.ops.gaussian_transition` at ``states[s, j]``, and ``states[s, j + 1] = mean + std *
    noise[s, j]``. Where ``rows[s, j]`` is negative nothing is written.

    Args:
        states: float32 ``[S, L, C, H, W]``; entries ``first + 1`` to ``end`` are written.
        mean, std: float32 ``[S, L - 1, C, H, W]``, written.
        noise: float32 ``[S, L, C, H, W]``.
        columns: float32 ``[S, L, 8]``, transition coefficients of each row's step.
        output: ``[B R, C or 2C, H, W]``, float32, float16 or bfloat16; B = 2 with guidance, conditional rows first.
        rows: int64 ``[S, W]`` with W at least ``end``, in ``[0, R)`` or negative.
        first, end: in ``[0, L - 1]``.
        guidance_scale, guidance_channels, clip: as in :func:`~free_kernels.ops.gaussian_transition`.
        backend: ``"auto"`` (Triton on a GPU, else the extension if it is there), ``"reference"``, ``"extension"`` or
            ``"triton"``.

    Raises:
        ValueError, TypeError: a wrong argument; values are checked on the CPU only.
        RuntimeError: the backend cannot be used; the message says why.
    """
    channels = states.shape[2] if guidance_channels is None else guidance_channels
    given = (states, mean, std, noise, columns, output, rows, first, end)
    ADVANCE(AdvanceArguments(*given, guidance_scale, channels, clip), states, backend)


def keep_rows(arguments: KeepArguments, backend: str = "auto") -> None:
    """Keep a round's last committed row of each slot and those behind it, in place.

    Row j of slot s is kept where ``-1 <= j - committed[s] < M - 1`` and ``j < lengths[s]``. It is of step ``steps[s] +
    j`` and goes to place ``step % M``. There ``at`` is its step, or -1 if its feature or output is not finite.

    Raises:
        ValueError, TypeError: a wrong argument.
        RuntimeError: the backend cannot be used; the message says why.
    """
    KEEP(arguments, arguments.states, backend)


def keep_clean_rows(arguments: KeepCleanArguments, backend: str = "auto") -> None:
    """Keep a round's last committed row of each slot and those behind it, and measure the responses, in place.

    Rows and their places are those of :func:`keep_rows`, but for the last: one place of M is left to the row of the
    step before, so that ``j - committed[s] < M - 2``. ``held_clean`` takes the clean sample
    that the row's mean is made of, guided and clipped, and behind it the output's variance channels, if there are any.
    ``at`` is -1 where a row is not finite.

    A response is how far the clean sample moves with the state. It is measured at every step k that the round commits,
    one after the other. With ``moved = x_k - there`` and ``changed = (clean_k - known) / unit``, in the unit of
    :func:`replay_drafts` at the step, ``ratio = <moved, changed> / |moved|^2`` and ``response[s, i]`` becomes ``0.7
    response[s, i] + (ratio, 1)``, whose quotient is a weighted average.

    * i = 0, to noise that the draft before has not seen: there and known are mean and clean sample of the step before,
      by the row before or, for the first row, by the row ``before[s]``.
    * i = 1, to what else moves a state between rounds: there and known are state and clean sample of the row that is
      held of step k from an earlier round.

    With the first go those of single elements: ``pattern[s]`` becomes ``0.9 pattern[s] + (moved changed, moved^2) /
    mean(moved^2)``. And ``response[s, 2]`` tests them on steps that they have not seen. With ``gap = (own - average_0)
    moved``, own and average_0 of :func:`replay_drafts` by the sums of the rounds before, it becomes ``0.9 response[s,
    2] + (<gap, changed - average_0 moved>, <gap, gap>) / |moved|^2``, whose quotient is the share of the gap that fits
    the steps best.

    All are set to 0 first where ``steps[s]`` is 0, which is a new image's, and something is committed. A step without
    such a row says nothing, nor does one whose ratio is not finite, or whose ``1 / mean(moved^2)`` is not or is 0.

    Raises:
        ValueError, TypeError: a wrong argument.
        RuntimeError: the backend cannot be used; the message says why.
    """
    KEEP_CLEAN(arguments, arguments.states, backend)


def find_rows(arguments: FindArguments, backend: str = "auto") -> None:
    """Where the rows of the next steps are: ``places`` and ``ahead``, in place.

    A slot at step 0 has a new image and loses the rows of the one before. Entry j of a slot is of step ``steps[s] +
    j``, draft j's: the number of its row among all S (M + 1), -1 from the first entry on that has none. ``ahead``
    counts the rows. ``before`` is the number of the row of the step before; -1 where there is none, and at step 0.

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
