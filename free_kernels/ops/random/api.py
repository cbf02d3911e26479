"""Counter-based random numbers: each depends on its key only, never on the batch, the slot or the device."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from free_kernels.constants import Purpose
from free_kernels.ops.checks import INT64, Layouts
from free_kernels.ops.declaration import Op
from free_kernels.ops.random import reference
from free_kernels.ops.random.arguments import FillArguments, PhiloxArguments, RoundArguments
from free_kernels.ops.triton_runtime import use_triton
from free_kernels.validation import check_choice, check_int, fail

BACKENDS = ("auto", "reference", "extension", "triton")


def signed_seed(op: str, seed: int) -> int:
    """The int64 with the 64 bits of a seed in ``[0, 2**64)``: what an op's schema can carry."""
    seed = check_int(op, "seed", seed, 0, 2**64 - 1)
    return seed - 2**64 if seed >= 2**63 else seed


def _check(op: str, arguments: PhiloxArguments) -> None:
    images = arguments.images
    for name, value in (("images", images), ("steps", arguments.steps), ("rounds", arguments.rounds)):
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
    check_int(op, "purpose", arguments.purpose, 0, 255)
    # More numbers need more blocks than the 32-bit block index can count.
    check_int(op, "numel", arguments.numel, 0, 2**34)


def _fake(arguments: PhiloxArguments | FillArguments) -> Tensor:
    return arguments.images.new_empty((arguments.images.shape[0], arguments.numel), dtype=torch.float32)


def _fill(arguments: FillArguments) -> Tensor:
    *keys, normal = arguments
    return (reference.philox_normal if normal else reference.philox_uniform)(PhiloxArguments(*keys))


def _check_round(a: RoundArguments) -> None:
    op = "philox_round"
    Layouts(op, None, {}).check("steps", a.steps, INT64, "[S, L]")
    layouts = Layouts(op, a.steps.device, {"S": a.steps.shape[0]})
    for name, value in (("images", a.images), ("rounds", a.rounds)):
        if value is not None or name == "images":
            layouts.check(name, value, INT64, "[S]")
    check_int(op, "numel", a.numel, 0, 2**34)


def _round(a: RoundArguments) -> tuple[Tensor, Tensor, Tensor]:
    slots, length = a.steps.shape
    images, rounds = (None if key is None else key.repeat_interleave(length) for key in (a.images, a.rounds))

    def draw(call: Callable[[PhiloxArguments], Tensor], purpose: Purpose, *shape: int) -> Tensor:
        keys = a.seed, images, a.steps.flatten(), int(purpose), math.prod(shape), rounds
        return call(PhiloxArguments(*keys)).view(slots, length, *shape)

    return (
        draw(reference.philox_normal, Purpose.STEP, a.numel),
        draw(reference.philox_normal, Purpose.SLACK, a.numel if a.slack else 0),
        draw(reference.philox_uniform, Purpose.ACCEPT, 1).view(slots, length),
    )


def _fake_round(a: RoundArguments) -> tuple[Tensor, Tensor, Tensor]:
    new = torch.empty_like(a.steps, dtype=torch.float32).new_empty
    return new(*a.steps.shape, a.numel), new(*a.steps.shape, a.numel if a.slack else 0), new(a.steps.shape)


# The extension's ops; Triton's is an op of its own, which exists without the extension.
UNIFORM = Op("philox_uniform", PhiloxArguments, reference.philox_uniform, _fake)
NORMAL = Op("philox_normal", PhiloxArguments, reference.philox_normal, _fake)
ROUND = Op("philox_round", RoundArguments, _round, _fake_round, check=_check_round)
FILL = Op("philox_fill", FillArguments, _fill, _fake, triton="random.philox_fill")


def _draw(op: Op, arguments: PhiloxArguments, backend: str) -> Tensor:
    check_choice(op.name, "backend", backend, BACKENDS)
    _check(op.name, arguments)
    images = arguments.images
    if use_triton(op.name, "random", images.device, backend):
        return FILL.launch(FillArguments(*arguments, normal=op is NORMAL), images)
    # The extension reads keys one after the other.
    images, steps, rounds = (
        None if keys is None else keys.contiguous() for keys in (images, arguments.steps, arguments.rounds)
    )
    return op(arguments._replace(images=images, steps=steps, rounds=rounds), images, backend)


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
    given = (signed_seed("philox_uniform", seed), images, steps, purpose, numel, rounds)
    return _draw(UNIFORM, PhiloxArguments(*given), backend)


def philox_normal(
    seed: int,
    images: Tensor,
    steps: Tensor,
    purpose: int,
    numel: int,
    rounds: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Standard normals with the keys of :func:`philox_uniform`, by the Box-Muller method.

    Of each block the uniforms ``(u0, u1)`` give ``r cos(a)`` and ``r sin(a)``, ``r = sqrt(-2 log u0)``,
    ``a = 2 pi u1``, and ``(u2, u3)`` likewise.

    Args:
        seed, images, steps, purpose, numel, rounds, backend: as in :func:`philox_uniform`.

    Returns:
        float32 ``[M, numel]``; backends agree to about 1e-6 (their logarithms and sines may round differently).

    Raises:
        ValueError, TypeError: a wrong argument.
        RuntimeError: ``backend="extension"`` or ``"triton"`` cannot be used; the message says why.
    """
    given = (signed_seed("philox_normal", seed), images, steps, purpose, numel, rounds)
    return _draw(NORMAL, PhiloxArguments(*given), backend)


def philox_round(
    seed: int,
    images: Tensor,
    steps: Tensor,
    numel: int,
    slack: bool = False,
    rounds: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """All random numbers of a round of L rows for S images, in one call; keys as in :func:`philox_uniform`.

    Args:
        seed: in ``[0, 2**64)``.
        images: int64 ``[S]``.
        steps: int64 ``[S, L]``, step of each row.
        numel: elements of a state.
        slack: whether variances are learned, so that slack noise is needed.
        rounds: int64 ``[S]`` in ``[0, 2**24)``, or None for round 0.
        backend: ``"auto"`` (the extension if it is there), ``"reference"`` or ``"extension"``.

    Returns:
        Standard normals with the purposes step and slack, float32 ``[S, L, numel]`` each, the second ``[S, L, 0]``
        without ``slack``; uniforms in (0, 1] with the purpose accept, float32 ``[S, L]``.

    Raises:
        ValueError, TypeError: a wrong argument.
        RuntimeError: ``backend="extension"`` cannot be used; the message says why.
    """
    given = (signed_seed("philox_round", seed), images, steps, numel, slack, rounds)
    return ROUND(RoundArguments(*given), steps, backend)
