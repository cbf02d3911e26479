"""Constants that several layers share."""

from __future__ import annotations

import enum

# Ticks in the unit of time of flow models. Timesteps are integers all the way to the target, which divides by this.
TIME_TICKS = 100_000


class Purpose(enum.IntEnum):
    """What a random number is for; part of its key."""

    INITIAL = 0
    STEP = 1
    SLACK = 2
    ACCEPT = 3


class TransitionColumn(enum.IntEnum):
    """Columns of a transition table ``[K, 8]``.

    With e the network's output, whatever it predicts: without clipping, ``mean = MEAN_FROM_STATE x + MEAN_FROM_OUTPUT
    e``; with clipping, ``x0 = clamp(X0_FROM_STATE x + X0_FROM_OUTPUT e)`` and ``mean = MEAN_FROM_X0 x0 +
    MEAN_FROM_STATE_GIVEN_X0 x``. In both, ``log std = LOG_STD + LOG_STD_SLOPE v`` with v the network's variance
    channels; a fixed variance has slope 0, and a step without noise, as the last one mostly is, ``LOG_STD = -inf``.
    """

    MEAN_FROM_STATE = 0
    MEAN_FROM_OUTPUT = 1
    LOG_STD = 2
    LOG_STD_SLOPE = 3
    X0_FROM_STATE = 4
    X0_FROM_OUTPUT = 5
    MEAN_FROM_X0 = 6
    MEAN_FROM_STATE_GIVEN_X0 = 7
