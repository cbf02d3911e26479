"""Schemas, fakes and implementations of the coupling ops, whose public side is :mod:`free_kernels.ops.coupling`."""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable

import torch
from torch import Tensor

from free_kernels.ops.coupling import reference
from free_kernels.ops.coupling import reference_block as block
from free_kernels.ops.random import philox_normal, philox_uniform
from free_kernels.ops.random.reference import PURPOSE_ACCEPT, PURPOSE_SLACK, PURPOSE_STEP
from free_kernels.ops.triton_runtime import use_triton

_SCHEMA = (
    "{name}(Tensor draft_states, Tensor draft_mean, Tensor draft_std, {draws}, Tensor output, Tensor row_offsets, "
    "Tensor columns, {more}float guidance_scale, int guidance_channels, float clip) -> (Tensor, Tensor, Tensor)"
)
# Fields of a Coupling.
Outcome = tuple[Tensor, Tensor, Tensor]


def settings_of(guidance_scale: float, guidance_channels: int, clip: float) -> dict[str, float | int]:
    """The last three arguments of a coupling op by name."""
    return {"guidance_scale": guidance_scale, "guidance_channels": guidance_channels, "clip": clip}


def couple_reference(*arguments: object) -> Outcome:
    """``couple`` in plain PyTorch; positional as in the schema, as all below."""
    return tuple(reference.couple(*arguments[:-3], **settings_of(*arguments[-3:])))


def couple_block_reference(*arguments: object) -> Outcome:
    """``couple_block`` in plain PyTorch."""
    return tuple(block.couple_block(*arguments[:-3], **settings_of(*arguments[-3:])))


def couple_triton(*arguments: object) -> Outcome:
    """``couple`` in Triton."""
    kernels = importlib.import_module("free_kernels.ops.coupling.triton_launch")
    return kernels.couple(*arguments[:-3], **settings_of(*arguments[-3:]))


def couple_block_triton(*arguments: object) -> Outcome:
    """``couple_block`` in Triton."""
    kernels = importlib.import_module("free_kernels.ops.coupling.triton_launch")
    return kernels.couple(*arguments[:-3], None, **settings_of(*arguments[-3:]), joint=True)


def couple_philox_reference(
    draft_states: Tensor,
    draft_mean: Tensor,
    draft_std: Tensor,
    seed: int,
    images: Tensor,
    steps: Tensor,
    output: Tensor,
    row_offsets: Tensor,
    columns: Tensor,
    relaxation: Tensor | None,
    rounds: Tensor | None,
    *settings: float,
    backend: str = "auto",
    joint: bool = False,
) -> Outcome:
    """``couple_philox``: numbers by the random ops (with their ``backend``), then the reference.

    ``joint``: drafts are decided together.
    """
    slots, length, *latent = draft_states.shape
    keys = (
        seed % 2**64,
        images.unsqueeze(1).repeat(1, steps.shape[1]).view(-1),
        steps.contiguous().view(-1),
        None if rounds is None else rounds.unsqueeze(1).repeat(1, steps.shape[1]).view(-1),
    )

    def normal(purpose: int) -> Tensor:
        flat = philox_normal(*keys[:3], purpose, math.prod(latent), keys[3], backend)
        return flat.view(slots, length, *latent)

    learned = output.shape[1] == 2 * latent[0]
    noise, slack_noise = normal(PURPOSE_STEP), normal(PURPOSE_SLACK) if learned else None
    uniform = philox_uniform(*keys[:3], PURPOSE_ACCEPT, 1, keys[3], backend).view(slots, length)
    given = (draft_states, draft_mean, draft_std, noise, slack_noise, uniform, output, row_offsets, columns)
    return couple_block_reference(*given, *settings) if joint else couple_reference(*given, relaxation, *settings)


def couple_block_philox_reference(*arguments: object, backend: str = "auto") -> Outcome:
    """``couple_block_philox``: likewise."""
    *first, rounds = arguments[:-3]
    return couple_philox_reference(*first, None, rounds, *arguments[-3:], backend=backend, joint=True)


def couple_philox_triton(*arguments: object) -> Outcome:
    """``couple_philox`` in Triton."""
    kernels = importlib.import_module("free_kernels.ops.coupling.triton_launch")
    return kernels.couple_philox(*arguments[:-3], **settings_of(*arguments[-3:]))


def couple_block_philox_triton(*arguments: object) -> Outcome:
    """``couple_block_philox`` in Triton."""
    kernels = importlib.import_module("free_kernels.ops.coupling.triton_launch")
    *first, rounds = arguments[:-3]
    return kernels.couple_philox(*first, None, rounds, **settings_of(*arguments[-3:]), joint=True)


def fake_outcome(draft_states: Tensor, draft_mean: Tensor, *arguments: object) -> Outcome:
    """Of all coupling ops, whose outcomes have the same shapes."""
    slots, length = draft_states.shape[:2]
    committed = draft_states.new_empty(slots, dtype=torch.int64)
    next_states = draft_states.new_empty(slots, *draft_states.shape[2:])
    return next_states, committed, draft_states.new_empty(slots, length - 1)


# Reference and Triton of every op.
_IMPLEMENTATIONS = {
    "couple": (couple_reference, couple_triton),
    "couple_philox": (couple_philox_reference, couple_philox_triton),
    "couple_block": (couple_block_reference, couple_block_triton),
    "couple_block_philox": (couple_block_philox_reference, couple_block_philox_triton),
}


def implementation(op: str, device: torch.device, backend: str) -> Callable[..., Outcome]:
    """What runs an op on a device with a backend of its own.

    Raises:
        RuntimeError: ``backend="triton"`` cannot be used; the message says why.
    """
    on_cpu, in_triton = _IMPLEMENTATIONS[op]
    if use_triton(op, "coupling", device, backend):
        # The op's CPU implementation is the reference; Triton's interpreter is called for itself.
        return in_triton if device.type == "cpu" else getattr(torch.ops.free_kernels, op)
    return functools.partial(on_cpu, backend=backend) if op.endswith("philox") else on_cpu


_LIBRARY = torch.library.Library("free_kernels", "FRAGMENT")
_FROM_MEMORY, _BY_KEYS = "Tensor noise, Tensor? slack_noise, Tensor uniform", "int seed, Tensor images, Tensor steps"
for _name, _draws, _more in (
    ("couple", _FROM_MEMORY, "Tensor? relaxation, "),
    ("couple_philox", _BY_KEYS, "Tensor? relaxation, Tensor? rounds, "),
    ("couple_block", _FROM_MEMORY, ""),
    ("couple_block_philox", _BY_KEYS, "Tensor rounds, "),
):
    _LIBRARY.define(_SCHEMA.format(name=_name, draws=_draws, more=_more))
    for _implementation, _key in zip(_IMPLEMENTATIONS[_name], ("CPU", "CUDA"), strict=True):
        _LIBRARY.impl(_name, _implementation, _key)
    torch.library.register_fake(f"free_kernels::{_name}", fake_outcome, lib=_LIBRARY)
