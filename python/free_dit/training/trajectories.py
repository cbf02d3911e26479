"""Trajectories that a target's sampler takes: training and test data of a drafter. Needs labels, no images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from free_dit.networks.families import device_of, schedule_for
from free_dit.networks.policy import policy_schedule
from free_kernels.conditioning import hoisted
from free_kernels.constants import Purpose, TransitionColumn
from free_kernels.ops.coupling import gaussian_transition
from free_kernels.protocols import Schedule, Target, guided_channels, unconditional_labels
from free_kernels.sampling.job import image_shape
from free_kernels.sampling.noise import PhiloxNoise
from free_kernels.schedules import DDPMSchedule, FlowSDESchedule
from free_kernels.validation import check_choice, check_int, fail

# Schedules that a configuration can name, for a target and a number of steps; "auto" is that of the target's family,
# and "policy" that of the bundled policy.
SCHEDULES: dict[str, Callable[[Target, int], Schedule]] = {
    "auto": schedule_for,
    "ddpm": lambda _, num_steps: DDPMSchedule(num_steps),
    "policy": lambda _, num_steps: policy_schedule(num_steps),
}


def make_schedule(name: str, target: Target, num_steps: int) -> Schedule:
    """The schedule of a configuration, for chains of ``num_steps`` of ``target``.

    Raises:
        ValueError, TypeError: an unknown name, or a number of steps that it does not have.
    """
    return SCHEDULES[check_choice("train_drafter", "schedule", name, tuple(SCHEDULES))](target, num_steps)


@dataclass(frozen=True)
class Trajectories:
    """Chains of B images over K steps, both guidance branches (the same twice for a target without a null label).

    Attributes:
        states: ``[K, B, C, H, W]``, the state before each step.
        features: ``[K, 2, B, T, D]``, conditional and unconditional branch.
        mean: ``[K, B, C, H, W]``, the target's mean of each step.
        std: ``[K, B, C, H, W]``, its standard deviation; 0 at the last step.
        labels: int64 ``[B]``.
        guidance: float32 ``[B]``, guidance scale of each image.
    """

    states: Tensor
    features: Tensor
    mean: Tensor
    std: Tensor
    labels: Tensor
    guidance: Tensor

    def at(self, name: str, step: Tensor, image: Tensor) -> Tensor:
        """Rows ``[R, ...]`` of ``"states"``, ``"mean"`` or ``"std"`` at steps and images ``[R]``.

        Of ``"features"`` they are ``[2R, T, D]``, conditional rows first.
        """
        if name == "features":
            return self.features[step, :, image].transpose(0, 1).flatten(0, 1)
        return getattr(self, name)[step, image]

    def scale_samples(self) -> tuple[Tensor, Tensor]:
        """Features ``[..., D]`` and their changes over a step, to take a drafter's scales from."""
        return self.features, self.features.diff(dim=0)


def guided_transition(
    state: Tensor, output: Tensor, columns: Tensor, guidance: Tensor, channels: int, clip: float = math.inf
) -> tuple[Tensor, Tensor]:
    """Mean and deviation where every row has its own guidance scale ``[R]``, of the shape of ``state [R, C, ...]``.

    ``output`` is ``[2R, C or 2C, ...]``, and ``clip`` the schedule's. In float32, whatever the network's dtype.
    """
    shape = state.shape
    sides = image_shape(shape[1:])
    conditional, unconditional = output.float().view(len(output), -1, *sides[1:]).chunk(2)
    weight = torch.ones(len(guidance), output.shape[1], 1, 1, device=output.device)
    weight[:, :channels] = guidance.view(-1, 1, 1, 1)
    mixed = torch.lerp(unconditional, conditional, weight)
    mean, std = gaussian_transition(state.view(-1, *sides), mixed, columns, clip=clip)
    return mean.view(shape), std.view(shape)


def image_chunks(count: int, max_rows: int | None) -> Iterator[slice]:
    """Images of each part, such that their two guidance branches are at most ``max_rows`` network rows; all if None.

    Raises:
        ValueError, TypeError: ``max_rows`` is below 2 or not an int.
    """
    size = count if max_rows is None else check_int("collect", "max_rows", max_rows, 2) // 2
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def noised_chains(schedule: Schedule, images: Tensor, seed: int) -> Tensor:
    """Chains ``[K, B, C, H, W]`` of images ``[B, C, H, W]`` that are noised step by step, in sampling order.

    The K states of a chain have the joint law of the data's forward process. A sampler's states have this law only as
    far as its model is exact.

    Raises:
        ValueError: a flow schedule, whose path is not noised in steps.
    """
    if isinstance(schedule, FlowSDESchedule):
        fail("train_drafter", "forward_dataset", "empty for a flow model", "a data set")
    # The forward step multiplies the state by sqrt(1 - beta); the mean of the sampling step divides by it.
    keep = schedule.table(schedule.resolve_variance(False))[:, TransitionColumn.MEAN_FROM_STATE].reciprocal()
    generator = torch.Generator().manual_seed(seed)
    chains, x = torch.empty(schedule.num_steps, *images.shape), images
    for k in range(schedule.num_steps - 1, -1, -1):
        noise = torch.randn(x.shape, generator=generator)
        x = chains[k] = keep[k] * x + (1 - keep[k].square()).clamp(min=0.0).sqrt() * noise
    return chains


@dataclass(frozen=True)
class Storage:
    """How trajectories are kept.

    Attributes:
        dtype: of the features; the rest is float32.
        device: where all is kept; the target's device if None.
        images_first: lay memory out image by image, as on disk, behind the same shapes.
    """

    dtype: torch.dtype = torch.float32
    device: torch.device | str | None = None
    images_first: bool = False

    def empty(self, target: Target, num_steps: int, labels: Tensor, guidance: Tensor) -> Trajectories:
        """Memory for chains of ``num_steps`` of images with these labels and guidance scales ``[B]``."""
        device = device_of(target) if self.device is None else torch.device(self.device)
        count = len(labels)

        def tensor(leading: tuple[int, ...], trailing: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            """Memory of shape ``[*leading, B, *trailing]``."""
            if self.images_first:
                first = torch.empty(count, *leading, *trailing, dtype=dtype, device=device)
                return first.movedim(0, len(leading))
            return torch.empty(*leading, count, *trailing, dtype=dtype, device=device)

        states, mean, std = (tensor((num_steps,), target.latent_shape, torch.float32) for _ in range(3))
        features = tensor((num_steps, 2), target.feature_shape, self.dtype)
        return Trajectories(states, features, mean, std, labels.to(device), guidance.to(device))


@torch.no_grad()
def collect(
    target: Target,
    schedule: Schedule,
    labels: Tensor,
    guidance: Tensor,
    seed: int,
    progress: bool = False,
    *,
    first_image: int = 0,
    max_rows: int | None = None,
    storage: Storage = Storage(),
    given: Tensor | None = None,
) -> Trajectories:
    """Run the ordinary sampler for ``labels [B]`` with guidance scales ``[B]`` and keep everything.

    Holds ``K B (2 T D itemsize + 12 C H W)`` bytes of trajectories and the network's activations for ``max_rows`` rows.

    Args:
        target: the frozen network.
        schedule: its Gaussian steps.
        labels: int64 ``[B]``.
        guidance: float32 ``[B]``.
        seed: seed of all noise; an image's noise depends on it and on the image's number.
        progress: show a bar.
        first_image: number of the first image.
        max_rows: bound of the network rows of a call, two for each image; None takes all images at once.
        storage: how the trajectories are kept.
        given: ``[K, B, C, H, W]``, chains to run the target on instead of its own.

    Raises:
        ValueError, TypeError: a wrong ``max_rows``.
        FloatingPointError: the target's output is not finite.
    """
    num_steps, shape, here = schedule.num_steps, tuple(target.latent_shape), device_of(target)
    data = storage.empty(target, num_steps, labels, guidance)
    table = schedule.table(schedule.resolve_variance(target.learns_variance)).to(here)
    timesteps, source = schedule.timesteps.to(here), PhiloxNoise(seed, first_image)
    guided = guided_channels(target)
    parts = list(image_chunks(len(labels), max_rows))
    with tqdm(total=num_steps * len(parts), desc="trajectories", unit="step", disable=not progress, leave=False) as bar:
        for part in parts:
            images = torch.arange(part.start, part.stop, device=here)
            y, scale = labels[part].to(here), guidance[part].to(here)
            y = torch.cat([y, unconditional_labels(target, y)])
            network: Target = hoisted(target, timesteps, y.unique())  # type: ignore[assignment]
            x = source.normal(images, torch.zeros_like(images), Purpose.INITIAL, shape)
            for k in range(num_steps):
                if given is not None:
                    x = given[k, part].to(here)
                t = timesteps[k].expand(len(y))
                h = network.features(torch.cat([x, x]), t, y)
                output = network.head(h, t, y)
                mean, std = guided_transition(x, output, table[k : k + 1], scale, guided, schedule.clip)
                data.states[k, part], data.features[k, :, part] = x, h.unflatten(0, (2, len(images)))
                data.mean[k, part], data.std[k, part] = mean, std
                x = torch.addcmul(mean, std, source.normal(images, torch.full_like(images, k), Purpose.STEP, shape))
                bar.update()
            if not bool(x.isfinite().all()):
                raise FloatingPointError(f"collect: the target's output must be finite, got {x.sum().item()}")
    return data
