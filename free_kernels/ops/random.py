"""Counter-based random numbers: each depends on its key only, never on the batch, the slot or the device."""

from __future__ import annotations

import torch
from torch import Tensor

from free_kernels.extension import raise_from_op, use_extension, when_loaded
from free_kernels.reference import random as reference
from free_kernels.validation import check_int, fail


def _check(op: str, seed: int, images: Tensor, steps: Tensor, purpose: int, numel: int, rounds: Tensor | None) -> None:
    for name, value in (("images", images), ("steps", steps), ("rounds", rounds)):
        if value is None and name == "rounds":
            continue
        if not isinstance(value, Tensor):
            fail(op, name, "int64 [M]", type(value).__name__, TypeError)
        if value.dtype != torch.int64:
            fail(op, name, "int64 [M]", value, TypeError)
        if value.ndim != 1 or value.shape != images.shape:
            fail(op, name, "int64 [M]" if name == "images" else f"int64 [M] = {list(images.shape)}", value)
        if value.device != images.device:
            fail(op, name, f"on {images.device} like images", f"a tensor on {value.device}")
    check_int(op, "seed", seed, 0, 2**64 - 1)
    check_int(op, "purpose", purpose, 0, 255)
    # Past this the 32-bit block index would wrap around.
    check_int(op, "numel", numel, 0, 2**34)


def _signed(seed: int) -> int:
    """The int64 of the same 64 bits, which is what an op's schema can carry."""
    return seed - 2**64 if seed >= 2**63 else seed


def philox_uniform(
    seed: int,
    images: Tensor,
    steps: Tensor,
    purpose: int,
    numel: int,
    rounds: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Uniforms in (0, 1] keyed by (seed, image, step, purpose, round), by Philox4x32-10 (Salmon et al. 2011).

    Element ``e`` uses output word ``e % 4`` of the block with key (low, high) 32 bits of ``seed`` and counter
    ``(e // 4, step, image, purpose + 256 * round)``, each word taken modulo 2**32; a word ``w`` gives
    ``(w + 0.5) / 2**32``, rounded to float32.

    Args:
        seed: in ``[0, 2**64)``.
        images: ``[M]`` int64 image indices; the result lies on their device.
        steps: ``[M]`` int64 step indices.
        purpose: in ``[0, 256)``, what the numbers are for.
        numel: numbers of each key, in ``[0, 2**34]``.
        rounds: ``[M]`` int64 in ``[0, 2**24)``, or None for round 0.
        backend: ``"auto"``, ``"reference"`` or ``"extension"``.

    Returns:
        float32 ``[M, numel]``.

    Raises:
        ValueError, TypeError: a wrong argument.
        RuntimeError: ``backend="extension"`` cannot be used.
    """
    _check("philox_uniform", seed, images, steps, purpose, numel, rounds)
    if not use_extension("philox_uniform", images.device.type, backend):
        return reference.philox_uniform(seed, images, steps, purpose, numel, rounds)
    try:
        return torch.ops.free_kernels.philox_uniform(_signed(seed), images, steps, purpose, numel, rounds)
    except RuntimeError as error:
        raise_from_op("philox_uniform", error)


def philox_normal(
    seed: int,
    images: Tensor,
    steps: Tensor,
    purpose: int,
    numel: int,
    rounds: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Standard normals with the keys of :func:`philox_uniform`, by Box-Muller.

    Of each block the uniforms ``(u0, u1)`` give ``r cos(a)`` and ``r sin(a)``, ``r = sqrt(-2 log u0)``,
    ``a = 2 pi u1``, and ``(u2, u3)`` likewise.

    Args:
        seed: in ``[0, 2**64)``.
        images: ``[M]`` int64 image indices; the result lies on their device.
        steps: ``[M]`` int64 step indices.
        purpose: in ``[0, 256)``, what the numbers are for.
        numel: numbers of each key, in ``[0, 2**34]``.
        rounds: ``[M]`` int64 in ``[0, 2**24)``, or None for round 0.
        backend: ``"auto"``, ``"reference"`` or ``"extension"``.

    Returns:
        float32 ``[M, numel]``; backends agree to about 1e-6 (their logarithms and sines may round differently).

    Raises:
        ValueError, TypeError: a wrong argument.
        RuntimeError: ``backend="extension"`` cannot be used.
    """
    _check("philox_normal", seed, images, steps, purpose, numel, rounds)
    if not use_extension("philox_normal", images.device.type, backend):
        return reference.philox_normal(seed, images, steps, purpose, numel, rounds)
    try:
        return torch.ops.free_kernels.philox_normal(_signed(seed), images, steps, purpose, numel, rounds)
    except RuntimeError as error:
        raise_from_op("philox_normal", error)


@when_loaded
def _register_fakes() -> None:
    def fake(
        seed: int, images: Tensor, steps: Tensor, purpose: int, numel: int, rounds: Tensor | None = None
    ) -> Tensor:
        return images.new_empty((images.shape[0], numel), dtype=torch.float32)

    torch.library.register_fake("free_kernels::philox_uniform", fake)
    torch.library.register_fake("free_kernels::philox_normal", fake)
