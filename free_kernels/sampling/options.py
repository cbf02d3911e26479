"""The keywords of the samplers as one object, checked once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from free_kernels.ops.coupling.api import BACKENDS
from free_kernels.protocols import Drafter, Schedule
from free_kernels.results import Callback
from free_kernels.sampling.guidance import GuidanceScale, check_interval, check_scale
from free_kernels.schedules import DDPMSchedule
from free_kernels.steering.relaxation import Relaxation
from free_kernels.validation import check_choice, check_int, describe, fail

_SCHEDULE_MEMBERS = ("num_steps", "timesteps", "table", "resolve_variance", "clip")
_SCHEDULE = DDPMSchedule(num_steps=250)
VERIFICATIONS = ("token", "block")
DRAFT_LENGTH = 6


def fitting_length(num_steps: int) -> int:
    """The draft length of a caller who gives none, for chains of so many steps."""
    return max(1, min(DRAFT_LENGTH, num_steps))


@dataclass(frozen=True)
class Options:
    """Every keyword of :func:`free_kernels.sample`, which says what each one means, with its default."""

    schedule: Schedule = _SCHEDULE
    drafter: str | Drafter = "frozen"
    guidance_scale: GuidanceScale = 1.0
    guidance_channels: int | None = None
    guidance_interval: tuple[float, float] | None = None
    draft_length: int | str | None = None
    relaxation: float | Relaxation = 0.0
    verification: str = "token"
    seed: int = 0
    noise: object = None
    max_slots: int | None = None
    backend: str = "auto"
    cuda_graphs: bool = False
    reuse_refused: bool = True
    progress: bool = False
    callback: Callback | None = None

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The keywords."""
        return tuple(field.name for field in fields(cls))

    @classmethod
    def of(cls, where: str, keywords: Mapping[str, Any]) -> Options:
        """Options from keywords that a caller hands on.

        Raises:
            TypeError: a keyword that :func:`free_kernels.sample` does not have.
        """
        unknown = keywords.keys() - set(cls.names())
        if unknown:
            fail(where, "settings", "arguments of sample", ", ".join(map(repr, sorted(unknown))), TypeError)
        return cls(**keywords)

    @property
    def length(self) -> int | str:
        """The draft length, or the one that fits the schedule where none is given."""
        return fitting_length(self.schedule.num_steps) if self.draft_length is None else self.draft_length

    @property
    def block(self) -> bool:
        """Whether a round's drafts are decided together."""
        return self.verification == "block"

    @property
    def packing_backend(self) -> str:
        """Of packing, which has no Triton kernels, and of noise, which has several: the best one or the reference."""
        return "reference" if self.backend == "reference" else "auto"

    @property
    def takes_compiled(self) -> bool:
        """Whether drafting and coupling of CPU tensors run compiled where that is built."""
        return self.backend in ("auto", "extension")

    def check(self, where: str) -> None:
        """Check what can be checked without a target.

        Raises:
            ValueError, TypeError: an option is wrong; the message begins with ``where`` and names it.
        """
        check_choice(where, "backend", self.backend, BACKENDS)
        check_choice(where, "verification", self.verification, VERIFICATIONS)
        if isinstance(self.schedule, type) or not all(hasattr(self.schedule, name) for name in _SCHEDULE_MEMBERS):
            fail(where, "schedule", "a schedule such as DDPMSchedule()", describe(self.schedule), TypeError)
        check_scale(where, self.guidance_scale)
        check_interval(where, self.guidance_interval)
        check_int(where, "seed", self.seed, 0, 2**64 - 1)
        for name in ("reuse_refused", "progress"):
            if not isinstance(getattr(self, name), bool):
                fail(where, name, "a bool", getattr(self, name), TypeError)
        if self.callback is not None and not callable(self.callback):
            fail(where, "callback", "callable", self.callback, TypeError)
        if self.max_slots is not None:
            check_int(where, "max_slots", self.max_slots, 1)
        if isinstance(self.draft_length, str):
            if self.draft_length != "auto":
                fail(where, "draft_length", "an int or 'auto'", repr(self.draft_length))
        else:
            check_int(where, "draft_length", self.length, 1, self.schedule.num_steps)
