"""What ``sample`` and ``ancestral_sample`` share: the checked target, transitions, labels and noise; a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from free_kernels.conditioning import hoisted
from free_kernels.conditions import Condition, bind
from free_kernels.constants import Purpose, TransitionColumn
from free_kernels.ops.coupling import gaussian_transition
from free_kernels.ops.shapes import image_shape
from free_kernels.protocols import (
    NoiseSource,
    Schedule,
    ScheduleDefaults,
    Target,
    TargetDefaults,
    guided_channels,
    null_label,
)
from free_kernels.sampling.guidance import GuidanceScales, guidance_of, mixed
from free_kernels.sampling.noise import as_noise_source
from free_kernels.sampling.options import Options
from free_kernels.targets import as_target
from free_kernels.targets.adaln import AdaLNTarget
from free_kernels.targets.fused_head import FusedHead
from free_kernels.validation import check_int, describe, fail

# Noise is drawn for several steps or images at once, up to this many elements.
NOISE_CHUNK_ELEMENTS = 1 << 22


class Verified(NamedTuple):
    """What the target says of a round's rows.

    Attributes:
        output: ``[B R, C or 2C, H, W]``.
        wait: returns the features ``[B R, T, D]``, which may arrive after the output.
    """

    output: Tensor
    wait: Callable[[], Tensor]


# A packed call of the target: states, timesteps and labels of all of its rows.
Network = Callable[[Tensor, Tensor, Tensor], Verified]


class Step(NamedTuple):
    """What an ordinary step leaves: ``state [S, C, H, W]`` after it, and the target's ``output`` and ``features``."""

    state: Tensor
    output: Tensor
    features: Tensor


@dataclass(frozen=True)
class Job:
    """N images, K steps.

    States of any shape are held as ``[C, H, W]``, by :func:`free_kernels.ops.shapes.image_shape`; target, drafter,
    noise source and caller see them in their own.

    Shapes are asked of the target once: a round asks for them several times, and a target may work them out.

    Attributes:
        where: name of the public function, which begins error messages.
        options: the caller's.
        target: the network.
        labels: int64 ``[N]``.
        noise: where random numbers come from.
        timesteps: int64 ``[K]``.
        table: float32 ``[K, 8]``, transition coefficients.
        learned: whether the variance is the network's.
        guidance_scale: with which the ops mix the two branches of an output; 1 is none.
        guidance_channels: leading channels that guidance mixes.
        clip: bound of the clean sample.
        scales: of every step and image, where one number does not hold for all; outputs are then mixed before an op
            has them (:meth:`mixed`).
    """

    where: str
    options: Options
    target: Target
    labels: Tensor
    noise: NoiseSource
    timesteps: Tensor
    table: Tensor
    learned: bool
    guidance_scale: float
    guidance_channels: int
    clip: float
    scales: GuidanceScales | None = None

    @property
    def branches(self) -> int:
        """Network rows per row."""
        return 1 if self.guidance_scale == 1.0 else 2

    @property
    def guidance_level(self) -> tuple[int, int]:
        """How strong guidance is, in halves of an octave, and at how many tenths of the steps.

        Runs of one level speculate about as well.
        """
        if self.scales is None:
            return round(2 * math.log2(1 + self.guidance_scale)), 10
        return round(2 * math.log2(1 + self.scales.mean)), round(10 * self.scales.share)

    @property
    def null(self) -> int | None:
        """The null label, where guidance needs one."""
        return null_label(self.target) if self.branches == 2 else None

    @cached_property
    def state_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the states that are held."""
        return image_shape(self.target.latent_shape)

    @cached_property
    def feature_shape(self) -> tuple[int, int]:
        """(T, D) of the target's features."""
        return self.target.feature_shape

    def shaped(self, states: Tensor) -> Tensor:
        """States ``[R, C, H, W]`` in the target's own shape."""
        shape = self.target.latent_shape
        return states if len(shape) == 3 else states.reshape(len(states), *shape)

    @property
    def used_labels(self) -> Tensor:
        """Distinct labels that the network will see."""
        unique = self.labels.unique()
        return unique if self.null is None else torch.cat([unique, unique.new_tensor([self.null])])

    @property
    def is_deterministic(self) -> bool:
        """Whether a step between the first and the last adds no noise, so that no draft of it is ever accepted."""
        return bool(self.table[1:-1, TransitionColumn.LOG_STD].isneginf().any())

    @property
    def room(self) -> list[int]:
        """The most rows of a round from each step on: up to the next step without noise, whose draft is never accepted.

        Such a step is the last row of its round, which has no draft, and so an ordinary step.
        """
        silent, num_steps = self.table[:, TransitionColumn.LOG_STD].isneginf().tolist(), len(self.timesteps)
        room, ahead = [], 0
        for step in reversed(range(num_steps)):
            ahead = 1 if silent[step] or step == num_steps - 1 else ahead + 1
            room.append(ahead)
        return room[::-1]

    def unguided(self) -> Job:
        """The same job at a step that is not guided: one network row per row."""
        return replace(self, guidance_scale=1.0, scales=None)

    def hoisted(self) -> Job:
        """The same job on a target whose (t, y)-only work is done; to be called as soon as the job is made."""
        if isinstance(self.target, AdaLNTarget):
            return replace(self, target=self.target.tabled(self.timesteps, self.used_labels))
        return replace(self, target=hoisted(self.target, self.timesteps, self.used_labels))

    def branched(self, labels: Tensor) -> Tensor:
        """Labels of both guidance branches, conditional first."""
        return labels if self.null is None else torch.cat([labels, torch.full_like(labels, self.null)])

    def doubled(self, rows: Tensor) -> Tensor:
        """The same rows for each guidance branch."""
        return rows if self.branches == 1 else torch.cat([rows, rows])

    def features(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The target's features, of the shape it promised."""
        return self._checked_features(self.target.features(self.shaped(x), t, y), x)

    def head(self, h: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The target's output, of the shape it promised; without variance channels where the variance is fixed."""
        return self._checked_output(self.target.head(h, t, y), h)

    def drafting_head(self) -> FusedHead | None:
        """The head in one call that makes a draft, too, if the target has such a one and its output is used whole."""
        return self.target.drafting_head() if self._drafts_with_head else None

    @cached_property
    def _drafts_with_head(self) -> bool:
        target = self.target
        whole = isinstance(target, AdaLNTarget) and self.learned == target.learns_variance
        return whole and self.options.takes_compiled and len(target.latent_shape) == 3 and self.scales is None

    def scales_at(self, steps: Tensor, images: Tensor) -> Tensor | None:
        """Guidance scales at ``steps [S]`` or ``[S, L]`` of ``images [S]``; None where one number holds for all."""
        if self.scales is None:
            return None
        return self.scales.at(steps, images if steps.ndim == 1 else images.unsqueeze(1))

    def mixed(self, output: Tensor, scales: Tensor | None) -> Tensor:
        """An output ``[B R, ...]`` as the ops take it, of rows with ``scales [R]`` by :meth:`scales_at`."""
        return output if scales is None else mixed(output, scales, self.guidance_channels)

    def _checked_features(self, h: object, x: Tensor) -> Tensor:
        return self.checked_rows("target.features", "[R, T, D]", h, x, self.feature_shape).contiguous()

    def _checked_output(self, output: object, x: Tensor) -> Tensor:
        shape = self._output_shape
        layout = "[R, C or 2C, H, W]" if len(shape) == 3 else "[R, C or 2C, ...]"
        output = self.checked_rows("target.head", layout, output, x, shape)
        if len(shape) != 3:
            output = output.reshape(len(x), shape[0], *self.state_shape[1:])
        return _single(output if self.learned else output[:, : self.state_shape[0]]).contiguous()

    @cached_property
    def _output_shape(self) -> tuple[int, ...]:
        channels, *rest = self.target.latent_shape
        return (2 * channels if self.target.learns_variance else channels, *rest)

    def verify(self, x: Tensor, t: Tensor, y: Tensor) -> Verified:
        """The target's output and features of rows ``x [B R, C, H, W]``, ``t`` and ``y [B R]``."""
        packed = TargetDefaults.read(self.target, "packed_call")
        if packed is not None:
            output, wait = packed(self.shaped(x), t, y)
            return Verified(self._checked_output(output, x), lambda: _single(self._checked_features(wait(), x)))
        features = self.features(x, t, y)
        return Verified(self.head(features, t, y), lambda: _single(features))

    def draw(self, purpose: Purpose, images: Tensor, steps: Tensor, rounds: Tensor | None = None) -> Tensor:
        """Normals ``[S, L, C, H, W]`` for images, steps and perhaps rounds ``[S, L]``, all contiguous."""
        keys = None if rounds is None else rounds.view(-1)
        return self._normal(images.view(-1), steps.view(-1), purpose, keys).view(*steps.shape, *self.state_shape)

    def _normal(self, images: Tensor, steps: Tensor, purpose: Purpose, rounds: Tensor | None = None) -> Tensor:
        """Normals of the source, of the shape that it promises."""
        shape = tuple(self.target.latent_shape)
        return self.checked_numbers(
            "normal", self.noise.normal(images, steps, purpose, shape, rounds), len(images), *shape
        )

    def checked_numbers(self, which: str, numbers: object, *shape: int) -> Tensor:
        """What a method of the noise source gave, which a caller may have written."""
        wrong_kind = not isinstance(numbers, Tensor) or numbers.dtype != torch.float32
        if wrong_kind or numbers.shape != shape:
            wanted = f"float32 {list(shape)} from {which}"
            fail(self.where, "noise", wanted, describe(numbers), TypeError if wrong_kind else ValueError)
        return numbers.contiguous()

    def checked_rows(self, name: str, layout: str, found: object, given: Tensor, shape: tuple[int, ...]) -> Tensor:
        """What a network of the caller's gave: floating-point numbers ``[R, *shape]`` where ``given [R, ...]`` is."""
        wanted = (given.shape[0], *shape)
        if not isinstance(found, Tensor) or found.shape != wanted:
            fail(self.where, name, f"{layout} = {list(wanted)}", describe(found))
        if not found.is_floating_point():
            fail(self.where, name, "floating-point numbers", found, TypeError)
        if found.device != given.device or found.layout != torch.strided:
            fail(self.where, name, f"dense, on {given.device}", f"{found.layout} on {found.device}")
        return found

    def initial_states(self, images: Tensor) -> Tensor:
        """Pure noise ``[M, C, H, W]`` of images ``[M]``, at the schedule's deviation."""
        shape = tuple(self.target.latent_shape)
        states = torch.empty(len(images), *self.state_shape, dtype=torch.float32, device=self.labels.device)
        chunk = max(1, NOISE_CHUNK_ELEMENTS // math.prod(shape))
        for first in range(0, len(images), chunk):
            part = images[first : first + chunk]
            numbers = self._normal(part, torch.zeros_like(part), Purpose.INITIAL)
            states[first : first + chunk] = numbers.view(-1, *self.state_shape)
        deviation = ScheduleDefaults.read(self.options.schedule, "init_noise_sigma")
        return states if deviation == 1.0 else states.mul_(deviation)

    def transition(self, state: Tensor, output: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the next state."""
        return gaussian_transition(
            state,
            output,
            columns,
            guidance_scale=self.guidance_scale,
            guidance_channels=self.guidance_channels,
            clip=self.clip,
        )

    def ordinary_step(
        self,
        network: Network,
        state: Tensor,
        t: Tensor,
        y: Tensor,
        columns: Tensor,
        noise: Tensor,
        scales: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Step:
        """A step of the ordinary sampler.

        Args:
            network: the target's packed call.
            state: ``[S, C, H, W]``.
            t: int64 ``[B S]``, timesteps of both branches.
            y: int64 ``[B S]``, labels of both branches.
            columns: ``[S, 8]`` or ``[1, 8]``, transition coefficients.
            noise: ``[S, C, H, W]``.
            scales: ``[S]``, of :meth:`scales_at`.
            out: where the next state goes, which may be ``state``; a new tensor if None.
        """
        output, wait = network(self.doubled(state), t, y)
        output = self.mixed(output, scales)
        mean, std = self.transition(state, output, columns)
        return Step(torch.addcmul(mean, std, noise, out=out), output, wait())

    def check_finite(
        self, steps: Sequence[int] | int, images: Sequence[int] | Tensor, output: Tensor, state: Tensor | None = None
    ) -> None:
        """Raise FloatingPointError unless the target's output and the next state are finite; waits for the device.

        Args:
            steps: of the rows, or one that all share.
            images: of the R rows.
            output: ``[B R, ...]``.
            state: ``[R, ...]``, what an ordinary step made of the output: its variance may not be finite even so.
        """
        found = {"the target's output": output} | ({} if state is None else {"the next state": state})
        finite = [rows.isfinite().all() for rows in found.values()]
        if bool(finite[0] if state is None else finite[0] & finite[1]):
            return
        for culprit, rows in found.items():
            if not bool(rows.isfinite().all()):
                row = int((~rows.isfinite()).flatten(1).any(1).nonzero()[0, 0]) % len(images)
                self.raise_non_finite(culprit, steps if isinstance(steps, int) else steps[row], int(images[row]))

    def raise_non_finite(self, culprit: str, step: int, image: int) -> NoReturn:
        """Name the network, step and image of a NaN or an infinity."""
        raise FloatingPointError(
            f"{self.where}: {culprit} must be finite, got a non-finite value at step {step} of image {image}"
        )


def _single(tensor: Tensor) -> Tensor:
    """What leaves a network, in float32 where it is wider.

    States, coupling and drafts are float32, so a float64 network's output is rounded once, here, as the ordinary
    sampler's is; its features are rounded for the drafts alone, after its head has read them.
    """
    return tensor.float() if tensor.dtype == torch.float64 else tensor


def _check_family(where: str, schedule: Schedule, target: Target) -> None:
    """Raise ValueError where the schedule's steps would misread the target's output or timesteps."""
    steps = ScheduleDefaults.read(schedule, "family")
    network = TargetDefaults.read(target, "family") or steps
    if steps != network:
        example = {"flow": "FlowSDESchedule()", "diffusion": "DDPMSchedule()"}.get(network, "of its own")
        fail(where, "schedule", f"one for a {network} model such as {example}", f"one for a {steps} model")
    own = ScheduleDefaults.read(schedule, "num_train_steps")
    wanted = TargetDefaults.read(target, "num_train_steps")
    if own is not None and wanted is not None and own != wanted:
        fail(where, "schedule", f"one with the target's num_train_steps {wanted}", f"{own}")


def _showing(where: str, target: Target, schedule: Schedule) -> Target:
    """The target, showing its network the schedule's own timesteps where these are not whole numbers."""
    shown = ScheduleDefaults.read(schedule, "shown_timesteps")
    if shown is None:
        return target
    showing = TargetDefaults.read(target, "showing")
    if showing is None:
        wanted = "one with whole timesteps for this target (timestep_spacing 'leading' or 'trailing')"
        fail(where, "schedule", wanted, f"{float(shown[shown != shown.round()][0]):g}")
    return showing(schedule.timesteps, shown)


def make_job(
    where: str,
    target: object,
    class_labels: Tensor | None,
    options: Options,
    conditions: Condition | None = None,
    null_condition: Condition | None = None,
) -> Job:
    """Check a sampler's arguments and put them together.

    Raises:
        ValueError, TypeError: an argument is wrong; the message begins with ``where`` and names it.
    """
    options.check(where)
    adapted, labels = bind(where, as_target(where, target), conditions, class_labels, null_condition)
    schedule = options.schedule
    _check_family(where, schedule, adapted)
    adapted = _showing(where, adapted, schedule)
    scale, scales = guidance_of(where, options.guidance_scale, options.guidance_interval, schedule, len(labels))
    if scale != 1.0 and not TargetDefaults.read(adapted, "has_null_label"):
        asked = f"{scale:g}" if scales is None else "scales other than 1"
        if conditions is not None and TargetDefaults.read(adapted, "conditioned") is not None:
            fail(where, "null_condition", f"given with guidance_scale {asked}", describe(null_condition))
        fail(where, "guidance_scale", "1 for a target trained without label dropout", asked)
    channels = guided_channels(adapted) if options.guidance_channels is None else options.guidance_channels
    guided = check_int(where, "guidance_channels", channels, 1, adapted.latent_shape[0])
    device = torch.device(TargetDefaults.read(adapted, "device") or labels.device)
    if device.type == "meta":
        fail(where, "target", "a network with weights", "one on the meta device")
    # A copy: an iterator reads it while its caller goes on.
    labels = labels.to(device, copy=True, memory_format=torch.contiguous_format)
    variance = schedule.resolve_variance(adapted.learns_variance)
    table = schedule.table(variance).to(device)
    # A tensor of noise holds the initial state and the noise of every step that adds some.
    held = schedule.num_steps + int(table[-1, TransitionColumn.LOG_STD] > -torch.inf)
    shapes = (len(labels), *adapted.latent_shape), (len(labels), held, *adapted.latent_shape)
    return Job(
        where,
        options,
        adapted,
        labels,
        as_noise_source(where, options.noise, options.seed, shapes, device, options.packing_backend),
        schedule.timesteps.to(device),
        table,
        variance == "learned_range",
        scale,
        guided,
        schedule.clip,
        None if scales is None else scales.to(device),
    )
