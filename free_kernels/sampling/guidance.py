"""Guidance whose scale depends on the step or on the image."""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from free_kernels.protocols import Schedule, ScheduleDefaults
from free_kernels.validation import check_float, describe, fail

# What a sampler takes as ``guidance_scale``.
GuidanceScale = float | Tensor | Callable[[int], float | Tensor]
SCALE_KINDS = "a finite number in [0, inf), a tensor [N] of them or a callable of the step"
# What is mixed already stands in the place of the unconditional output, which a scale of 0 takes as it is.
SCALE_OF_MIXED = 0.0


@dataclass(frozen=True)
class GuidanceScales:
    """The scale of every step and image, where one number does not hold for all.

    Attributes:
        values: float32 ``[K or 1, N or 1]``.
        inside: bool ``[K]``, the steps at which some image is guided; the scales of the others are 1.
    """

    values: Tensor
    inside: Tensor

    def at(self, steps: Tensor, images: Tensor) -> Tensor:
        """Scales of rows, float32 like ``steps``; both int64, of shapes that broadcast. Waits for no device."""
        by_step, by_image = (size > 1 for size in self.values.shape)
        if by_step and by_image:
            return self.values[steps, images]
        if by_step:
            return self.values[:, 0][steps]
        return self.values[0][images.expand_as(steps)]

    def to(self, device: torch.device) -> GuidanceScales:
        """The same on another device."""
        return GuidanceScales(self.values.to(device), self.inside.to(device))

    @property
    def share(self) -> float:
        """Share of the steps at which some image is guided."""
        return float(self.inside.float().mean())

    @property
    def mean(self) -> float:
        """The mean over those steps and all images."""
        guided = self.values[self.inside] if len(self.values) > 1 and bool(self.inside.any()) else self.values
        return float(guided.mean())


def mixed(output: Tensor, scales: Tensor, channels: int) -> Tensor:
    """A network's output with what guidance makes of it in the place of the unconditional branch.

    An op that mixes the two branches with scale :data:`SCALE_OF_MIXED` then takes it as it is, bit for bit. So the
    ops know one number, whatever the rows' scales. The output of an earlier round's row is mixed once, with the scale
    of its step and image, which are those of every draft that it serves. A row of scale 1 has the conditional output,
    bit for bit where the unconditional one is finite.

    Args:
        output: ``[2R, C or 2C, H, W]``, conditional rows first.
        scales: float32 ``[R]``.
        channels: leading channels that guidance mixes.

    Returns:
        float32 like ``output``.
    """
    both = output.float() if output.dtype != torch.float32 else output.clone()
    conditional, unconditional = both.unflatten(0, (2, -1))[:, :, :channels].unbind(0)
    # Interpolation from the end that is nearer leaves the conditional output as it is where the scale is 1.
    unconditional.lerp_(conditional, scales.view(-1, 1, 1, 1))
    return both


def check_scale(where: str, scale: object) -> None:
    """Check the ``guidance_scale`` of a sampler as far as one can without the images.

    Raises:
        ValueError, TypeError: it is none.
    """
    if isinstance(scale, bool) or not (isinstance(scale, numbers.Real | Tensor) or callable(scale)):
        fail(where, "guidance_scale", SCALE_KINDS, scale, TypeError)
    if isinstance(scale, numbers.Real):
        check_float(where, "guidance_scale", scale, 0.0)


def check_interval(where: str, interval: object) -> tuple[float, float] | None:
    """The ``guidance_interval`` of a sampler.

    Raises:
        ValueError, TypeError: neither None nor two finite numbers in order.
    """
    if interval is None:
        return None
    wanted = "None or two finite numbers (low, high) with low <= high"
    if not isinstance(interval, tuple | list) or len(interval) != 2:
        fail(where, "guidance_interval", wanted, describe(interval), TypeError)
    if any(isinstance(bound, bool) or not isinstance(bound, numbers.Real) for bound in interval):
        fail(where, "guidance_interval", wanted, describe(interval), TypeError)
    low, high = map(float, interval)
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        fail(where, "guidance_interval", wanted, describe(interval))
    return low, high


def scale_of_images(scale: GuidanceScale, images: Tensor, count: int) -> GuidanceScale:
    """The ``guidance_scale`` of some ``images [M]`` of a job of ``count``; what is not one for each of them stays."""

    def chosen(value: object) -> object:
        if not isinstance(value, Tensor) or tuple(value.shape) != (count,):
            return value
        return value[images.to(value.device)]

    return (lambda step: chosen(scale(step))) if callable(scale) else chosen(scale)


def at_least_one(scale: GuidanceScale) -> GuidanceScale:
    """The same scale, with 1 in the place of smaller ones, which diffusers' pipelines take to mean no guidance."""
    if callable(scale) and not isinstance(scale, Tensor):
        return lambda step: at_least_one(scale(step))
    return scale.clamp(min=1) if isinstance(scale, Tensor) else max(scale, 1.0)


def step_times(schedule: Schedule) -> Tensor:
    """Times of the K steps in the schedule's own unit, float64: those that it names, else what the network is shown."""
    named = (ScheduleDefaults.read(schedule, name) for name in ("times", "shown_timesteps"))
    return next((times for times in named if times is not None), schedule.timesteps).double().cpu()


def guidance_of(
    where: str, scale: GuidanceScale, interval: object, schedule: Schedule, images: int
) -> tuple[float, GuidanceScales | None]:
    """The number that the ops mix with, and the scales of rows where these are not all the same.

    A scale of 1 everywhere is no guidance, and one that is the same everywhere is that number. An interval that holds
    no step is warned of.

    Args:
        where: the public function.
        scale: as :func:`free_kernels.sample` takes it.
        interval: alike.
        schedule: the chain's.
        images: N.

    Raises:
        ValueError, TypeError: one of the two is wrong.
    """
    check_scale(where, scale)
    bounds = check_interval(where, interval)
    if bounds is None and isinstance(scale, numbers.Real):
        return float(scale), None
    times = step_times(schedule)
    inside = torch.ones(len(times), dtype=torch.bool, device="cpu")
    if bounds is not None:
        inside = (times >= bounds[0]) & (times <= bounds[1])
        if not bool(inside.any()):
            # Most likely in another unit; few steps may also miss a narrow interval, which is no mistake.
            warnings.warn(
                f"{where}: guidance_interval ({bounds[0]:g}, {bounds[1]:g}) holds none of the steps' times, which go "
                f"from {float(times[0]):g} to {float(times[-1]):g}: no image is guided",
                # The public function's caller, behind it, its decorator, `make_job` and this function.
                stacklevel=5,
            )
    if isinstance(scale, numbers.Real) and bool(inside.all()):
        return float(scale), None
    values = _values(where, scale, inside, images)
    if not bool(inside.all()):
        values = torch.where(inside.unsqueeze(1), values, 1.0)
    if bool((values == values[0, 0]).all()):
        return float(values[0, 0]), None
    return SCALE_OF_MIXED, GuidanceScales(values, inside & (values != 1.0).any(1))


def _values(where: str, scale: GuidanceScale, inside: Tensor, images: int) -> Tensor:
    """Scales on the CPU, float32 ``[K or 1, N or 1]``; of steps outside, 1 where it is a callable."""
    on_cpu = {"dtype": torch.float32, "device": "cpu"}
    if isinstance(scale, Tensor):
        return _checked(where, "guidance_scale", scale, images).unsqueeze(0)
    if not callable(scale):
        return torch.full((1, 1), float(scale), **on_cpu)
    rows = [torch.ones(1, **on_cpu)] * len(inside)
    for step in inside.nonzero().flatten().tolist():
        value, name = scale(step), f"guidance_scale({step})"
        if isinstance(value, Tensor) and value.ndim:
            rows[step] = _checked(where, name, value, images)
        else:
            number = value.item() if isinstance(value, Tensor) else value
            rows[step] = torch.full((1,), check_float(where, name, number, 0.0), **on_cpu)
    return torch.stack(torch.broadcast_tensors(*rows) if len({len(row) for row in rows}) > 1 else rows)


def _checked(where: str, name: str, scale: Tensor, images: int) -> Tensor:
    """A scale for each of N images."""
    wanted = f"finite numbers in [0, inf), a tensor [{images}]"
    if scale.dtype == torch.bool or scale.is_complex():
        fail(where, name, wanted, scale, TypeError)
    if tuple(scale.shape) != (images,):
        fail(where, name, wanted, scale)
    # A copy: an iterator reads it while its caller goes on.
    scale = scale.detach().to("cpu", torch.float32, copy=True)
    if not bool((scale.isfinite() & (scale >= 0.0)).all()):
        fail(where, name, wanted, f"values in [{float(scale.min()):g}, {float(scale.max()):g}]")
    return scale
