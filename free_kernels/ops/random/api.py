"""Counter-based random numbers: each depends on its key only, never on the batch, the slot or the device."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from free_kernels.extension import raise_from_op, use_extension, when_loaded
from free_kernels.ops.random import reference
from free_kernels.ops.triton_runtime import use_triton
from free_kernels.validation import check_choice, check_int, fail

BACKENDS = ("auto", "reference", "extension", "triton")


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


def signed_seed(seed: int) -> int:
    """The int64 of the same 64 bits, which is what an op's schema can carry."""
    return seed - 2**64 if seed >= 2**63 else seed


def _fill_reference(
    seed: int, images: Tensor, steps: Tensor, purpose: int, numel: int, rounds: Tensor | None, normal: bool
) -> Tensor:
    draw = reference.philox_normal if normal else reference.philox_uniform
    return draw(seed, images, steps, purpose, numel, rounds)


def _fill_triton(*arguments: object) -> Tensor:
    return importlib.import_module("free_kernels.ops.random.triton_launch").philox_fill(*arguments)


def _fake(
    seed: int,
    images: Tensor,
    steps: Tensor,
    purpose: int,
    numel: int,
    rounds: Tensor | None = None,
    normal: bool = False,
) -> Tensor:
    return images.new_empty((images.shape[0], numel), dtype=torch.float32)


# The Triton kernel is an op of its own, so that it needs no extension.
_LIBRARY = torch.library.Library("free_kernels", "FRAGMENT")
_LIBRARY.define(
    "philox_fill(int seed, Tensor images, Tensor steps, int purpose, int numel, Tensor? rounds, bool normal) -> Tensor"
)
_LIBRARY.impl("philox_fill", _fill_reference, "CPU")
_LIBRARY.impl("philox_fill", _fill_triton, "CUDA")
torch.library.register_fake("free_kernels::philox_fill", _fake, lib=_LIBRARY)


@when_loaded
def _register_fakes() -> None:
    torch.library.register_fake("free_kernels::philox_uniform", _fake)
    torch.library.register_fake("free_kernels::philox_normal", _fake)


def _draw(
    op: str, seed: int, images: Tensor, steps: Tensor, purpose: int, numel: int, rounds: Tensor | None, backend: str
) -> Tensor:
    check_choice(op, "backend", backend, BACKENDS)
    _check(op, seed, images, steps, purpose, numel, rounds)
    normal = op == "philox_normal"
    if use_triton(op, "random", images.device, backend):
        # The op's CPU implementation is the reference; Triton's interpreter is called for itself.
        fill = _fill_triton if images.is_cpu else torch.ops.free_kernels.philox_fill
        return fill(signed_seed(seed), images, steps, purpose, numel, rounds, normal)
    if not use_extension(op, images.device.type, backend):
        return _fill_reference(seed, images, steps, purpose, numel, rounds, normal)
    compiled = torch.ops.free_kernels.philox_normal if normal else torch.ops.free_kernels.philox_uniform
    try:
        return compiled(signed_seed(seed), images, steps, purpose, numel, rounds)
    except RuntimeError as error:
        raise_from_op(op, error)


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
        backend: ``"auto"`` (Triton on a GPU, else the extension if it is there), ``"reference"``, ``"extension"`` or
            ``"triton"``.

    Returns:
        float32 ``[M, numel]``.

    Raises:
        ValueError, TypeError: a wrong argument.
        RuntimeError: ``backend="extension"`` or ``"triton"`` cannot be used; the message says why.
    """
    return _draw("philox_uniform", seed, images, steps, purpose, numel, rounds, backend)


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
        backend: ``"auto"`` (Triton on a GPU, else the extension if it is there), ``"reference"``, ``"extension"`` or
            ``"triton"``.

    Returns:
        float32 ``[M, numel]``; backends agree to about 1e-6 (their logarithms and sines may round differently).

    Raises:
        ValueError, TypeError: a wrong argument.
        RuntimeError: ``backend="extension"`` or ``"triton"`` cannot be used; the message says why.
    """
    return _draw("philox_normal", seed, images, steps, purpose, numel, rounds, backend)
