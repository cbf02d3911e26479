"""Which drafts a round makes: of all rows those most likely to be reached, as many as pay."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from free_kernels.extension import compiled_function
from free_kernels.steering.acceptance_model import AcceptanceModel

# What a row of the slot that lags most is worth more than one of the first: the last images are finished alone.
BEHIND = 0.05


class PlanArguments(NamedTuple):
    """What a round's drafts are chosen by, of S slots that may draft.

    Attributes:
        steps: ``[S]``, step of each.
        seen: ``[S]``, how many of the steps ahead an earlier round asked about.
        room: ``[S]``, the most drafts.
        acceptance: of drafts.
        saved: steps that a refusal is worth which a row saves later; None where rows behind a refusal draft no more.
        lengths: longest drafts to consider, ascending.
        seconds: ``[longest + 1, grains + 1]``, of a round, by its longest draft and its rows over ``grain``.
        grain: rows of a grain.
        images: in the making; each commits a step without drafts.
    """

    steps: list[int]
    seen: list[int]
    room: list[int]
    acceptance: AcceptanceModel
    saved: float | None
    lengths: list[int]
    seconds: np.ndarray
    grain: int
    images: int


class Plan(NamedTuple):
    """Drafts of a round.

    Attributes:
        speed: steps a second, with what rows save later.
        promised: steps that the round is expected to commit.
        drafts: ``[S]``.
    """

    speed: float
    promised: float
    drafts: list[int]


def plan_round(arguments: PlanArguments) -> tuple[Plan, Plan]:
    """The fastest plan; and the one of the shortest length, which is tried where none pays.

    In C++ where the extension is there: this stands in every round's way, between networks that have emptied the
    caches.
    """
    compiled = compiled_function("plan_round")
    if compiled is None:
        return reference_plan(arguments)
    a = arguments
    best, shortest = compiled(
        a.steps,
        a.seen,
        a.room,
        *a.acceptance.odds,
        a.saved,
        BEHIND,
        a.lengths,
        a.seconds,
        a.grain,
        a.images,
    )
    return Plan(*best), Plan(*shortest)


def reference_plan(a: PlanArguments) -> tuple[Plan, Plan]:
    """:func:`plan_round` in numpy."""
    steps, seen, width = np.array(a.steps), np.array(a.seen), a.lengths[-1] - 1
    if a.saved is None:
        gains = values = a.acceptance.survival(steps, seen, width)
    else:
        gains, saved = a.acceptance.outlook(steps, seen, width)
        values = gains + a.saved * saved
    fits = np.arange(width) < np.array(a.room)[:, None]
    gains, values = gains * fits, values * fits
    order = _order(values, steps)
    gains, worth, ahead = gains.ravel(), values.ravel()[order], order % width
    longest = np.array(a.lengths)[:, None]
    # For each longest draft how fast the round is that ends with each row, of the rows in order.
    taken = (ahead < longest - 1) & (worth > 0)
    rows = a.images + np.cumsum(taken, axis=1)
    grains = np.maximum((rows + a.grain // 2) // a.grain, 1)
    speeds = taken * (a.images + np.cumsum(taken * worth, axis=1)) / a.seconds[longest, grains]
    best = speeds.argmax(1).tolist()

    def plan(index: int) -> Plan:
        chosen = order[: best[index] + 1]
        chosen = chosen[chosen % width < a.lengths[index] - 1]
        drafts = np.bincount(chosen // width, minlength=len(steps))
        return Plan(float(speeds[index, best[index]]), a.images + float(sum(gains[chosen].tolist())), drafts.tolist())

    # Of equally fast ones the longest.
    fastest = max(range(len(best)), key=lambda index: (speeds[index, best[index]], index))
    return plan(fastest), plan(0)


def _order(values: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """The order in which to take rows worth ``[S, A]``: the best first, but each after those before it of its slot.

    Where those are worth less, they are taken for its sake.
    """
    slots, width = values.shape
    if slots == 1:
        return np.arange(width)
    behind = steps.max() - steps[:, None]
    values = values * (1 + BEHIND * np.minimum(behind / width, 1.0))
    best_behind = np.maximum.accumulate(values[:, ::-1], axis=1)[:, ::-1]
    return (-best_behind.ravel()).argsort(kind="stable")
