"""What ``sample`` and ``ancestral_sample`` share: the checked target, its transitions, its labels and its noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

import torch
from torch import Tensor

from free_kernels.conditioning import hoisted
from free_kernels.constants import TransitionColumn
from free_kernels.ops.coupling import gaussian_transition
from free_kernels.protocols import NoiseSource, Target, guided_channels, null_label
from free_kernels.sampling.noise import Purpose, as_noise_source
from free_kernels.targets import as_target
from free_kernels.validation import check_float, check_int, check_labels, describe, fail

# Noise is drawn for several steps or images at once, up to this many elements.
NOISE_CHUNK_ELEMENTS = 1 << 22
_SCHEDULE_MEMBERS = ("num_steps", "timesteps", "table", "resolve_variance", "clip")


@dataclass(frozen=True)
class Chain:
    """One job: N images, K steps.

    Attributes:
        where: name of the public function, which begins error messages.
        target: the network.
        labels: int64 ``[N]``.
        noise: where random numbers come from.
        timesteps: int64 ``[K]``.
        table: float32 ``[K, 8]``, transition coefficients.
        learned: whether the variance is the network's.
        guidance_scale: 1 is none.
        guidance_channels: leading channels that guidance mixes.
        clip: bound of the clean sample.
    """

    where: str
    target: Target
    labels: Tensor
    noise: NoiseSource
    timesteps: Tensor
    table: Tensor
    learned: bool
    guidance_scale: float
    guidance_channels: int
    clip: float

    @property
    def branches(self) -> int:
        """Network rows per row."""
        return 1 if self.guidance_scale == 1.0 else 2

    @property
    def null(self) -> int | None:
        """The null label, where guidance needs one."""
        return null_label(self.target) if self.branches == 2 else None

    @property
    def used_labels(self) -> Tensor:
        """Distinct labels that the network will see."""
        unique = self.labels.unique()
        return unique if self.null is None else torch.cat([unique, unique.new_tensor([self.null])])

    @property
    def is_deterministic(self) -> bool:
        """Whether a step between the first and the last adds no noise, so that no draft of it is ever accepted."""
        return bool(self.table[1:-1, TransitionColumn.LOG_STD].isneginf().any())

    def hoisted(self) -> Chain:
        """The same job on a target whose (t, y)-only work is done."""
        return replace(self, target=hoisted(self.target, self.timesteps, self.used_labels))

    def branched(self, labels: Tensor) -> Tensor:
        """Labels of both guidance branches, conditional first."""
        return labels if self.null is None else torch.cat([labels, torch.full_like(labels, self.null)])

    def doubled(self, rows: Tensor) -> Tensor:
        """The same rows for each guidance branch."""
        return rows if self.branches == 1 else torch.cat([rows, rows])

    def features(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The target's features, of the shape it promised."""
        h = self.target.features(x, t, y)
        if h.shape != (len(x), *self.target.feature_shape):
            fail(self.where, "target.features", f"[R, T, D] = {[len(x), *self.target.feature_shape]}", h)
        return h.contiguous()

    def head(self, h: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The target's output, of the shape it promised; without variance channels where the variance is fixed."""
        channels, height, width = self.target.latent_shape
        outputs = 2 * channels if self.target.learns_variance else channels
        output = self.target.head(h, t, y)
        if output.shape != (len(h), outputs, height, width):
            fail(self.where, "target.head", f"[R, C or 2C, H, W] = {[len(h), outputs, height, width]}", output)
        return output if self.learned else output[:, :channels]

    def draw(self, purpose: Purpose, images: Tensor, steps: Tensor, rounds: Tensor | None = None) -> Tensor:
        """Normals ``[S, L, C, H, W]`` for images, steps and perhaps rounds ``[S, L]``, all contiguous."""
        shape = tuple(self.target.latent_shape)
        keys = None if rounds is None else rounds.view(-1)
        return self.noise.normal(images.view(-1), steps.view(-1), purpose, shape, keys).view(*steps.shape, *shape)

    def initial_states(self, images: Tensor) -> Tensor:
        """Pure noise ``[M, C, H, W]`` of images ``[M]``."""
        shape = tuple(self.target.latent_shape)
        states = torch.empty(len(images), *shape, device=self.labels.device)
        chunk = max(1, NOISE_CHUNK_ELEMENTS // math.prod(shape))
        for first in range(0, len(images), chunk):
            part = images[first : first + chunk]
            states[first : first + chunk] = self.noise.normal(part, torch.zeros_like(part), Purpose.INITIAL, shape)
        return states

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

    def check_output(self, output: Tensor, steps: Sequence[int] | int, images: Sequence[int] | Tensor) -> None:
        """Raise FloatingPointError unless the target's output ``[B R, ...]`` is finite; waits for the device.

        Row r belongs to ``images[r]``, at ``steps[r]``, or at one step that all rows share.
        """
        if not bool(output.isfinite().all()):
            row = int((~output.isfinite()).flatten(1).any(1).nonzero()[0, 0]) % len(images)
            self.raise_non_finite(
                "the target's output", steps if isinstance(steps, int) else steps[row], int(images[row])
            )

    def raise_non_finite(self, culprit: str, step: int, image: int) -> NoReturn:
        """Name the network, step and image of a NaN or an infinity."""
        raise FloatingPointError(
            f"{self.where}: {culprit} must be finite, got a non-finite value at step {step} of image {image}"
        )


def _check_family(where: str, schedule: object, target: Target) -> None:
    """Raise ValueError where the schedule's steps would misread the target's output or timesteps."""
    steps = getattr(schedule, "family", "diffusion")
    network = getattr(target, "family", steps)
    if steps != network:
        example = {"flow": "FlowSDESchedule()", "diffusion": "DDPMSchedule()"}.get(network, "of its own")
        fail(where, "schedule", f"one for a {network} model such as {example}", f"one for a {steps} model")
    own = getattr(schedule, "num_train_steps", None)
    wanted = getattr(target, "num_train_steps", own)
    if own is not None and wanted is not None and own != wanted:
        fail(where, "schedule", f"one with the target's num_train_steps {wanted}", f"{own}")


def make_chain(
    where: str,
    target: object,
    class_labels: object,
    schedule: object,
    guidance_scale: object,
    guidance_channels: object,
    seed: object,
    noise: object,
    backend: str = "auto",
) -> Chain:
    """Check a sampler's arguments and put them together.

    Raises:
        ValueError, TypeError: an argument is wrong; the message begins with ``where`` and names it.
    """
    adapted = as_target(where, target)
    labels = check_labels(where, class_labels, adapted.num_classes)
    if isinstance(schedule, type) or not all(hasattr(schedule, name) for name in _SCHEDULE_MEMBERS):
        fail(where, "schedule", "a schedule such as DDPMSchedule()", describe(schedule), TypeError)
    _check_family(where, schedule, adapted)
    scale = check_float(where, "guidance_scale", guidance_scale, 0.0)
    if scale != 1.0 and not getattr(adapted, "has_null_label", True):
        fail(where, "guidance_scale", "1 for a target trained without label dropout", f"{scale:g}")
    if guidance_channels is None:
        guidance_channels = guided_channels(adapted)
    guided = check_int(where, "guidance_channels", guidance_channels, 1, adapted.latent_shape[0])
    device = torch.device(getattr(adapted, "device", labels.device))
    labels = labels.to(device).contiguous()
    latent, steps = tuple(adapted.latent_shape), schedule.num_steps
    variance = schedule.resolve_variance(adapted.learns_variance)
    table = schedule.table(variance).to(device)
    # A tensor of noise holds the initial state and the noise of every step that adds some.
    held = steps + int(table[-1, TransitionColumn.LOG_STD] > -torch.inf)
    return Chain(
        where,
        adapted,
        labels,
        as_noise_source(where, noise, seed, latent, len(labels), held, device, backend),
        schedule.timesteps.to(device),
        table,
        variance == "learned_range",
        scale,
        guided,
        schedule.clip,
    )
