"""Trainings that are interrupted on purpose."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from free_dit.training.loop import TrainingLoop


@contextmanager
def interrupted_at(step: int) -> Iterator[None]:
    """Whatever trains inside is interrupted before iteration ``step``, and has to be."""
    iterate = TrainingLoop._iterate

    def stop(loop: TrainingLoop) -> dict[str, float]:
        if loop.step == step:
            raise KeyboardInterrupt
        return iterate(loop)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingLoop, "_iterate", stop)
        with pytest.raises(KeyboardInterrupt):
            yield
