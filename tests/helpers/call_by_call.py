"""Rounds whose ops a test may replace."""

from __future__ import annotations

import pytest

from free_kernels.sampling.round import Rounds


def play_call_by_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let rounds call each op by itself, so that a test can put another in its place.

    On the CPU one op does several in one call, bit by bit the same (``tests/sampling/test_at_once.py``).
    """
    made = Rounds.__init__

    def separate(self, *arguments, **settings):
        made(self, *arguments, **settings)
        self._at_once = False

    monkeypatch.setattr(Rounds, "__init__", separate)
