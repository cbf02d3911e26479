"""Ops that follow one another in a round, in one call on the CPU, where calls take longer than what they do."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from free_kernels.ops.checks import FLOATS, Layouts
from free_kernels.ops.coupling.arguments import Coupling, CouplingArguments
from free_kernels.ops.coupling.dispatch import COMPILED, decide
from free_kernels.ops.declaration import KernelOp, Op
from free_kernels.ops.drafting import (
    AdvanceArguments,
    FindArguments,
    KeepArguments,
    KeepCleanArguments,
    OpenArguments,
    RenewArguments,
    TallyArguments,
)
from free_kernels.ops.drafting.api import ADVANCE, FIND, KEEP, KEEP_CLEAN, OPEN, RENEW, TALLY
from free_kernels.ops.final_layer.api import OP as FINAL_LAYER
from free_kernels.ops.final_layer.arguments import FinalLayerArguments
from free_kernels.ops.packing.api import COMMIT
from free_kernels.ops.packing.arguments import CommitArguments
from free_kernels.ops.random.api import ROUND
from free_kernels.ops.random.arguments import RoundArguments
from free_kernels.ops.rounds.arguments import (
    DecideArguments,
    DecidedRound,
    HeadAdvanceArguments,
    OpenedWithNoise,
    OpenKeyedArguments,
)
from free_kernels.validation import fail

_HELD = (
    ("at", "held_states", "held_features", "places", "before", "ahead"),
    ("clean_at", "clean_states", "clean", "clean_places", "clean_before", "clean_ahead", "response", "pattern"),
)


def _opening(a: OpenKeyedArguments) -> OpenArguments:
    return OpenArguments(*a[: len(OpenArguments._fields)])


def _numbers(a: OpenKeyedArguments, steps: Tensor) -> RoundArguments:
    return RoundArguments(a.seed, a.images, steps, math.prod(a.state.shape[1:]), a.slack, a.rounds)


def _open(a: OpenKeyedArguments) -> OpenedWithNoise:
    return _shaped(a, OPEN(_opening(a), a.state, "reference"), ROUND.reference)


def _fake_open(a: OpenKeyedArguments) -> OpenedWithNoise:
    return _shaped(a, OPEN.compiled.fake(_opening(a)), ROUND.fake)


def _shaped(
    a: OpenKeyedArguments, opened: Sequence[Tensor], draw: Callable[[RoundArguments], tuple[Tensor, Tensor, Tensor]]
) -> OpenedWithNoise:
    noise, slack_noise, uniform = draw(_numbers(a, opened[0]))
    shape, (channels, *latent) = opened[0].shape, a.state.shape[1:]
    slack_noise = slack_noise.view(*shape, channels if a.slack else 0, *latent)
    return OpenedWithNoise(*opened, noise.view(*shape, channels, *latent), slack_noise, uniform)


def _check_open(a: OpenKeyedArguments) -> None:
    OPEN.check(_opening(a))
    ROUND.check(_numbers(a, a.current.new_empty(a.state.shape[0], a.length)))


OPEN_KEYED = Op(
    "open_keyed_round_cpu",
    OpenKeyedArguments,
    _open,
    _fake_open,
    check=_check_open,
    public="open_keyed_round",
    parts=(OPEN.public, ROUND.public),
)


def _coupling(a: DecideArguments) -> CouplingArguments:
    return CouplingArguments(*a[: len(CouplingArguments._fields)])


def _check_held(a: DecideArguments) -> None:
    for names in _HELD:
        given = [name for name in names if getattr(a, name) is not None]
        if len(given) not in (0, len(names)):
            fail("decide_round", ", ".join(names), "tensors, or None all of them", f"tensors for {', '.join(given)}")


def _closing(a: DecideArguments, coupling: Coupling) -> Iterator[tuple[Op | KernelOp, Any]]:
    """What follows the coupling, with its arguments."""
    next_states, committed, gap_sq = coupling
    decided = committed, a.lengths, a.steps
    rows = a.output, a.row_offsets, *decided
    yield TALLY, TallyArguments(a.output, next_states, gap_sq, *decided, a.deviation)
    if a.at is not None:
        held = a.at, a.held_states, a.held_features
        yield KEEP, KeepArguments(a.draft_states, a.features, *rows, *held)
    if a.clean_at is not None:
        held = a.clean_before, a.clean_at, a.clean_states, a.clean, a.response, a.pattern
        settings = a.guidance_scale, a.guidance_channels, a.clip
        yield KEEP_CLEAN, KeepCleanArguments(a.draft_states, *rows, a.table, *held, *settings)
    drafted, pool = (a.draft_states, a.features, a.row_offsets), (a.samples, a.all_labels, a.queue, len(a.table))
    slots = a.state, a.previous, a.parent, a.steps, a.images, a.labels
    yield COMMIT, CommitArguments(committed, next_states, *drafted, *slots, *pool)
    yield RENEW, RenewArguments(a.steps, a.images, a.numbers, a.indices, a.rounds)
    if a.at is not None:
        yield FIND, FindArguments(a.at, a.steps, a.places, a.before, a.ahead)
    if a.clean_at is not None:
        yield FIND, FindArguments(a.clean_at, a.steps, a.clean_places, a.clean_before, a.clean_ahead)


def _decide(a: DecideArguments) -> DecidedRound:
    coupling = decide(_couples(a), _coupling(a), "reference")
    found = {op: op(arguments, a.state, "reference") for op, arguments in _closing(a, coupling)}
    ahead = a.ahead if a.at is not None else a.clean_ahead
    ahead = torch.zeros_like(a.steps) if ahead is None else ahead
    # As free_kernels.sampling.round.RoundReport.pack.
    report = torch.cat([coupling.committed, a.images, a.steps, ahead, found[TALLY]])
    return DecidedRound(*coupling, report, found[RENEW])


def _couples(a: DecideArguments) -> str:
    return "couple_block" if a.block else "couple"


def _check_decide(a: DecideArguments) -> None:
    _check_held(a)
    Layouts("decide_round", None, {}).check("output", a.output, FLOATS, "[B R, outputs, H, W]")
    Layouts("decide_round", None, {"K": len(a.table)}).check("deviation", a.deviation, (torch.float32,), "[K]")
    compiled = COMPILED[_couples(a)]
    compiled.check(_coupling(a))
    for op, arguments in _closing(a, compiled.fake(_coupling(a))):
        op.check(arguments)


def _fake_decide(a: DecideArguments) -> DecidedRound:
    slots = a.steps.shape[0]
    coupling = COMPILED[_couples(a)].fake(_coupling(a))
    return DecidedRound(*coupling, a.steps.new_empty(4 * slots + 1), a.steps.new_empty(slots, dtype=torch.bool))


DECIDE = Op(
    "decide_round_cpu",
    DecideArguments,
    _decide,
    _fake_decide,
    check=_check_decide,
    public="decide_round",
    parts=(*COMPILED, *(op.public for op in (TALLY, KEEP, KEEP_CLEAN, COMMIT, RENEW, FIND))),
)


def _advancing(a: HeadAdvanceArguments, output: Tensor) -> AdvanceArguments:
    drafts = a.states, a.mean, a.std, a.noise, a.columns, output, a.rows, a.draft, a.draft + 1
    return AdvanceArguments(*drafts, a.guidance_scale, a.guidance_channels, a.clip)


def _head(a: HeadAdvanceArguments) -> FinalLayerArguments:
    return FinalLayerArguments(*a[: len(FinalLayerArguments._fields)])


def _advance(a: HeadAdvanceArguments) -> None:
    output = FINAL_LAYER(_head(a), a.h, "reference")
    ADVANCE(_advancing(a, output), a.states, "reference")


def _check_advance(a: HeadAdvanceArguments) -> None:
    FINAL_LAYER.check(_head(a))
    ADVANCE.check(_advancing(a, FINAL_LAYER.fake(_head(a))))


ADVANCE_FROM_FEATURES = Op(
    "advance_from_features_cpu",
    HeadAdvanceArguments,
    _advance,
    lambda a: None,
    check=_check_advance,
    public="advance_from_features",
    parts=(FINAL_LAYER.public, ADVANCE.public),
)
OPS = OPEN_KEYED, DECIDE, ADVANCE_FROM_FEATURES


def open_keyed_round(arguments: OpenKeyedArguments, backend: str = "auto") -> OpenedWithNoise:
    """What a round begins with, and its random numbers: :func:`~free_kernels.ops.drafting.open_round`, then
    :func:`~free_kernels.ops.random.philox_round` at its steps.

    Args:
        arguments: theirs; numbers have the states' shape.
        backend: ``"auto"``, ``"reference"`` or ``"extension"``.

    Raises:
        ValueError, TypeError: a wrong argument.
        RuntimeError: the backend cannot be used; the message says why.
    """
    return OpenedWithNoise(*OPEN_KEYED(arguments, arguments.state, backend))


def decide_round(arguments: DecideArguments, backend: str = "auto") -> DecidedRound:
    """Decide a round and do all that follows from it: these ops, one after the other.

    * :func:`~free_kernels.ops.couple` or, with ``block``, :func:`~free_kernels.ops.couple_block`.
    * :func:`~free_kernels.ops.drafting.tally_round`.
    * :func:`~free_kernels.ops.drafting.keep_rows`, where rows of features are held (``at`` to ``ahead``), and
      :func:`~free_kernels.ops.drafting.keep_clean_rows`, where clean samples are (``clean_at`` to ``pattern``).
    * :func:`~free_kernels.ops.commit_drafts`, with ``len(table)`` steps, and
      :func:`~free_kernels.ops.drafting.renew_slots`.
    * :func:`~free_kernels.ops.drafting.find_rows` of what is held.

    Args:
        arguments: theirs; those of rows that are not held are None.
        backend: ``"auto"``, ``"reference"`` or ``"extension"``.

    Raises:
        ValueError, TypeError: a wrong argument.
        RuntimeError: the backend cannot be used, or the extension refuses a value; the message says why.
    """
    return DecidedRound(*DECIDE(arguments, arguments.state, backend))


def advance_from_features(arguments: HeadAdvanceArguments, backend: str = "auto") -> None:
    """A draft of every slot from its features: :func:`~free_kernels.ops.final_layer.final_layer`, then
    :func:`~free_kernels.ops.drafting.advance_drafts` for ``draft`` with the output.

    Args:
        arguments: theirs, but for the output; ``table`` is the rows of modulations.
        backend: ``"auto"``, ``"reference"`` or ``"extension"``, which has no gradient.

    Raises:
        ValueError, TypeError: a wrong argument.
        RuntimeError: the backend cannot be used, or the extension refuses a value; the message says why.
    """
    ADVANCE_FROM_FEATURES(arguments, arguments.states, backend)
