"""Noise sources: counter-based by default, or tensors that the caller brings."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from free_kernels.constants import Purpose
from free_kernels.ops.random import philox_normal, philox_round, philox_uniform
from free_kernels.ops.random.api import BACKENDS
from free_kernels.protocols import NoiseSource
from free_kernels.validation import check_choice, check_int, describe, fail

# Images that a 32-bit word of a key tells apart.
_KEYS = 2**32


class PhiloxNoise:
    """Philox4x32-10 keyed by (seed, image index, step, purpose) (Salmon et al. 2011).

    Args:
        seed: in ``[0, 2**64)``.
        first_image: added to every image index, so that parts of one job can be drawn by several calls.
        backend: of the random ops: ``"auto"``, ``"reference"``, ``"extension"`` or ``"triton"``.
        image_keys: int64 ``[N]`` in ``[0, 2**32)``, what stands in the key for each image's index; None: the index.

    Raises:
        ValueError, TypeError: an argument is none of that.
    """

    def __init__(
        self, seed: int, first_image: int = 0, backend: str = "auto", image_keys: Tensor | None = None
    ) -> None:
        where = "PhiloxNoise"
        self.seed = check_int(where, "seed", seed, 0, 2**64 - 1)
        self.first_image = check_int(where, "first_image", first_image, 0, _KEYS - 1)
        if image_keys is not None:
            _check_keys(where, image_keys)
        self.backend = check_choice(where, "backend", backend, BACKENDS)
        self.image_keys = image_keys

    @property
    def philox(self) -> PhiloxNoise | None:
        """Itself, for kernels that draw the same numbers; None where a class or somebody has put in others."""
        return self if self._has_own("normal", "uniform") else None

    @property
    def draws_rounds(self) -> bool:
        """Whether :meth:`of_round` is this class's, so that an op may draw a round's numbers in its place."""
        return self._has_own("of_round")

    def _has_own(self, *names: str) -> bool:
        kept = all(getattr(type(self), name) is getattr(PhiloxNoise, name) for name in names)
        return kept and vars(self).keys().isdisjoint(names)

    def keys(self, images: Tensor) -> Tensor:
        """What stands in the key for images ``[M]``."""
        shifted = images + self.first_image if self.first_image else images
        return shifted if self.image_keys is None else self.image_keys[shifted]

    def normal(
        self, images: Tensor, steps: Tensor, purpose: int, shape: tuple[int, ...], rounds: Tensor | None = None
    ) -> Tensor:
        """Standard normals ``[M, *shape]``."""
        count = math.prod(shape)
        return philox_normal(self.seed, self.keys(images), steps, int(purpose), count, rounds, self.backend).view(
            -1, *shape
        )

    def of_round(
        self, images: Tensor, steps: Tensor, shape: tuple[int, ...], slack: bool, rounds: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Noise and slack noise ``[S, L, *shape]`` and uniforms ``[S, L]`` for images ``[S]`` at steps ``[S, L]``."""
        numbers = philox_round(self.seed, self.keys(images), steps, math.prod(shape), slack, rounds, self.backend)
        noise, slack_noise, uniform = numbers
        rows = *steps.shape, *shape
        return noise.view(rows), slack_noise.view(rows) if slack else None, uniform

    def uniform(self, images: Tensor, steps: Tensor, purpose: int, rounds: Tensor | None = None) -> Tensor:
        """Uniforms in (0, 1], ``[M]``."""
        return philox_uniform(self.seed, self.keys(images), steps, int(purpose), 1, rounds, self.backend).view(-1)


def _check_keys(where: str, keys: object) -> None:
    expectation = "int64 [N] in [0, 2**32)"
    if not isinstance(keys, Tensor) or keys.dtype != torch.int64:
        fail(where, "image_keys", expectation, describe(keys), TypeError)
    if keys.ndim != 1:
        fail(where, "image_keys", expectation, keys)
    if len(keys) and not 0 <= int(keys.min()) <= int(keys.max()) < _KEYS:
        fail(where, "image_keys", expectation, f"values in [{int(keys.min())}, {int(keys.max())}]")


class TensorNoise:
    """Noise from a tensor; whatever the tensor does not hold comes from Philox.

    Args:
        noise: float32 ``[N, *shape]`` (initial states only) or ``[N, K, *shape]``: entry 0 the initial state, entry
            k + 1 the noise of step k (the last step needs none; where a schedule gives it noise, there are K + 1).
        seed: seed of the rest.
        backend: as in :class:`PhiloxNoise`.
        first_image: as in :class:`PhiloxNoise`, for the rest; entry 0 of ``noise`` belongs to this image.
        covers_steps: whether ``noise`` has a dimension of steps; None: where it has five, as images ``[C, H, W]`` have.

    Raises:
        ValueError, TypeError: another shape or dtype, or a value that is not finite.
    """

    def __init__(
        self,
        noise: Tensor,
        seed: int,
        backend: str = "auto",
        first_image: int = 0,
        covers_steps: bool | None = None,
    ) -> None:
        if not isinstance(noise, Tensor) or noise.dtype != torch.float32:
            fail("TensorNoise", "noise", "float32", noise, TypeError)
        if covers_steps is None and noise.ndim not in (4, 5):
            fail("TensorNoise", "noise", "[N, C, H, W] or [N, K, C, H, W] where covers_steps is None", noise)
        if not bool(noise.isfinite().all()):
            fail("TensorNoise", "noise", "finite", "a non-finite value")
        self.covers_steps = noise.ndim == 5 if covers_steps is None else covers_steps
        self.noise = noise if self.covers_steps else noise.unsqueeze(1)
        self.rest = PhiloxNoise(seed, first_image, backend)

    def normal(
        self, images: Tensor, steps: Tensor, purpose: int, shape: tuple[int, ...], rounds: Tensor | None = None
    ) -> Tensor:
        """Standard normals ``[M, *shape]``; the tensor's own do not depend on ``rounds``."""
        if purpose == Purpose.INITIAL:
            return self.noise[images, 0]
        if purpose == Purpose.STEP and self.covers_steps:
            # Entries past the end belong to the last step, which multiplies them by zero.
            return self.noise[images, (steps + 1).clamp(max=self.noise.shape[1] - 1)]
        return self.rest.normal(images, steps, purpose, shape, rounds)

    def uniform(self, images: Tensor, steps: Tensor, purpose: int, rounds: Tensor | None = None) -> Tensor:
        """Uniforms in (0, 1], ``[M]``."""
        return self.rest.uniform(images, steps, purpose, rounds)


def as_noise_source(
    where: str, noise: object, seed: int, shapes: tuple[tuple[int, ...], ...], device: torch.device, backend: str
) -> NoiseSource:
    """Turn a sampler's ``noise`` and ``seed`` arguments into a source.

    Args:
        where: the public function.
        noise: the argument.
        seed: the argument, checked.
        shapes: those that a tensor may have, without and with the noise of the steps.
        device: where the tensor is needed.
        backend: of the random ops.

    Raises:
        ValueError, TypeError: the tensor's shape or dtype is wrong, or the object is neither tensor nor source.
    """
    if noise is None:
        return PhiloxNoise(seed, backend=backend)
    held = noise
    if isinstance(noise, TensorNoise):
        held = noise.noise if noise.covers_steps else noise.noise[:, 0]
    if isinstance(held, Tensor):
        expectation = "float32 " + " or ".join(str(list(shape)) for shape in shapes)
        if held.dtype != torch.float32:
            fail(where, "noise", expectation, held, TypeError)
        if tuple(held.shape) not in shapes:
            fail(where, "noise", expectation, held)
        if not bool(held.isfinite().all()):
            fail(where, "noise", "finite", "a non-finite value")
        covers_steps = held.ndim == len(shapes[1])
        return noise if isinstance(noise, TensorNoise) else TensorNoise(held.to(device), seed, backend, 0, covers_steps)
    is_source = callable(getattr(noise, "normal", None)) and callable(getattr(noise, "uniform", None))
    if is_source and not isinstance(noise, type):
        keys, count = getattr(noise, "image_keys", None), shapes[0][0]
        if isinstance(noise, PhiloxNoise) and keys is not None and len(keys) < noise.first_image + count:
            wanted = f"keys of {noise.first_image + count} images, {noise.first_image} of them before the first"
            fail(where, "noise.image_keys", wanted, keys)
        if isinstance(noise, PhiloxNoise) and keys is None and noise.first_image + count > _KEYS:
            fail(where, "noise.first_image", f"at most 2**32 - {count} for {count} images", noise.first_image)
        return noise  # type: ignore[return-value]
    fail(where, "noise", "None, a tensor or a NoiseSource", noise, TypeError)
