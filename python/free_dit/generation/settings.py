"""How images are drawn, and the sampler with these settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from free_dit.loading import UNDRAFTED
from free_dit.networks.families import schedule_for
from free_kernels import DDIMSchedule, SampleResult, ancestral_sample, sample
from free_kernels.protocols import Drafter, Target
from free_kernels.sampling.options import fitting_length
from free_kernels.validation import check_choice, check_float, check_int

WHERE = "generate"
FORMATS = ("npz", "png", "npy")


@dataclass(frozen=True)
class ChainSettings:
    """The chains of a speculative run.

    Attributes:
        steps: sampling steps K.
        draft_length: rows of a round for one image; None takes 6, or the number of steps where that is smaller.
        guidance: classifier-free guidance scale; 1 is none.
        seed: seed of all noise; an image depends on it and on the image's index.
    """

    steps: int = 250
    draft_length: int | None = None
    guidance: float = 1.0
    seed: int = 0

    @property
    def length(self) -> int:
        """Rows of a round for one image."""
        return fitting_length(self.steps) if self.draft_length is None else self.draft_length


@dataclass(frozen=True)
class DrawSettings(ChainSettings):
    """How the images of a set are drawn; :class:`GenerateSettings` checks it.

    Attributes:
        drafter: "bundled", "frozen", "none" (the ordinary sampler), or a drafter.safetensors; None in a manifest is the
            ordinary sampler too.
        relaxation: strength; 0 is lossless.
        verification: "token" or "block".
        shard: images of a shard: drawn by one call and kept, or drawn again, as a whole, so that an image has the same
            neighbours in every run, and with them the same rounding.
        max_slots: images of a shard in the making at a time; all of them if None.
    """

    drafter: str | None = "bundled"
    relaxation: float = 0.0
    verification: Literal["token", "block"] = "token"
    shard: int = 64
    max_slots: int | None = None


@dataclass(frozen=True)
class GenerateSettings(DrawSettings):
    """What a sample set is drawn with: :class:`DrawSettings`, and the set's size and form.

    Attributes:
        num: images; image i has label i modulo the number of classes.
        format: "npz": a file of the ADM suite's form for each shard; "png": a file for each image; "npy": the samples
            themselves, float32 ``[N, C, H, W]``, a file for each shard.
    """

    num: int = 50_000
    format: Literal["npz", "png", "npy"] = "npz"

    def __post_init__(self) -> None:
        check_int(WHERE, "steps", self.steps, 1)
        if self.draft_length is None:
            # A manifest names the length itself.
            object.__setattr__(self, "draft_length", fitting_length(self.steps))
        for name in ("num", "draft_length", "shard"):
            check_int(WHERE, name, getattr(self, name), 1)
        if self.max_slots is not None:
            check_int(WHERE, "max_slots", self.max_slots, 1)
        check_int(WHERE, "seed", self.seed, 0, 2**64 - 1)
        check_float(WHERE, "relaxation", self.relaxation, 0.0)
        check_float(WHERE, "guidance", self.guidance, 0.0)
        check_choice(WHERE, "verification", self.verification, ("token", "block"))
        check_choice(WHERE, "format", self.format, FORMATS)

    @property
    def shards(self) -> int:
        """Number of shards; the last may be smaller."""
        return -(-self.num // self.shard)

    def images_of(self, shard: int) -> range:
        """Indices of the images of a shard."""
        return range(shard * self.shard, min(self.num, (shard + 1) * self.shard))


def sampler_for(
    target: Target, drafter: Drafter | str | None, settings: ChainSettings, **speculation: Any
) -> Callable[..., SampleResult]:
    """:func:`free_kernels.sample` with the settings given, or the sampler without drafts that the drafter's name says.

    What is returned takes the labels, and as keywords the seed or noise and the other arguments of the sampler.

    Args:
        target: the target.
        drafter: a drafter, ``"frozen"``, or a name of :data:`UNDRAFTED`; None is the ordinary sampler.
        settings: steps, guidance scale and draft length; the seed is the caller's.
        speculation: further arguments of ``sample``, which samplers without drafts do not take.
    """
    make_schedule = DDIMSchedule if drafter == "ddim" else partial(schedule_for, target)
    chain = {"schedule": make_schedule(settings.steps), "guidance_scale": settings.guidance}
    if drafter is None or drafter in UNDRAFTED:
        return partial(ancestral_sample, target, **chain)
    return partial(sample, target, drafter=drafter, draft_length=settings.length, **chain, **speculation)
