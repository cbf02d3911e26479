"""Declarations of the coupling ops, the checks of their arguments, and noise made from keys."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from free_kernels.constants import Purpose, TransitionColumn
from free_kernels.extension import use_extension
from free_kernels.ops.coupling import reference
from free_kernels.ops.coupling import reference_block as block
from free_kernels.ops.coupling.arguments import Coupling, CouplingArguments, KeyedCouplingArguments
from free_kernels.ops.declaration import Op, with_gradient
from free_kernels.ops.random import philox_normal, philox_uniform
from free_kernels.ops.shapes import as_images
from free_kernels.validation import check_choice, check_int, fail

BACKENDS = ("auto", "reference", "extension", "triton")
_NUMBERS = (float, int, numbers.Real, torch.SymFloat, torch.SymInt)
_MOST = torch.finfo(torch.float32).max
_EXPECTATIONS = "a finite number", f"a number above 0 and at most {_MOST:g}, or infinity"
_OPTIONAL = ("slack_noise", "relaxation", "rounds")
_STATES = ("draft_states", "draft_mean", "draft_std", "noise", "slack_noise")
_INTEGERS = ("images", "steps", "rounds", "row_offsets")


def check_round(op: str, arguments: CouplingArguments | KeyedCouplingArguments) -> None:
    """Shapes, dtypes and devices; of ``output`` the shape."""
    states, output = arguments.draft_states, arguments.output
    wrong_kind = not isinstance(states, Tensor) or states.dtype != torch.float32
    if wrong_kind or states.ndim != 5:
        fail(op, "draft_states", "float32 [S, L, C, H, W]", states, TypeError if wrong_kind else ValueError)
    device = states.device
    slots, length, channels, height, width = states.shape
    if length < 1:
        fail(op, "draft_states", "float32 [S, L, C, H, W] with L >= 1", states)
    rows, draft = (slots, length), (slots, length - 1, channels, height, width)
    shapes = dict.fromkeys(("uniform", "steps", "relaxation"), rows) | dict.fromkeys(("draft_mean", "draft_std"), draft)
    shapes |= dict.fromkeys(("noise", "slack_noise"), (slots, length, channels, height, width))
    shapes |= dict.fromkeys(("images", "rounds"), (slots,))
    shapes |= {"row_offsets": (slots + 1,), "columns": (slots, length, len(TransitionColumn))}
    for name, tensor in zip(arguments._fields, arguments, strict=True):
        if name not in shapes or (tensor is None and name in _OPTIONAL):
            continue
        dtype = torch.int64 if name in _INTEGERS else torch.float32
        wrong_kind = not isinstance(tensor, Tensor) or tensor.dtype != dtype
        if wrong_kind or tensor.shape != shapes[name]:
            expectation = f"{'int64' if name in _INTEGERS else 'float32'} {list(shapes[name])}"
            fail(op, name, expectation, tensor, TypeError if wrong_kind else ValueError)
        if tensor.device != device:
            fail(op, name, f"on {device} like draft_states", f"a tensor on {tensor.device}")
    if not isinstance(output, Tensor) or not output.is_floating_point():
        fail(op, "output", f"floating point [B R, {channels} or {2 * channels}, H, W]", output, TypeError)
    # Symbolic sizes are put into a text where it is needed only: a comparison behind that goes wrong in a trace.
    rows_fit = output.ndim == 4 and output.shape[0] > 0
    rows_fit = rows_fit and output.shape[0] % (1 if arguments.guidance_scale == 1.0 else 2) == 0
    if not rows_fit or output.shape[1] not in (channels, 2 * channels) or list(output.shape[2:]) != [height, width]:
        fail(op, "output", f"[B R, {channels} or {2 * channels}, {height}, {width}]", output)
    if arguments.guidance_scale != 1.0 and arguments.guidance_channels is not None:
        check_int(op, "guidance_channels", arguments.guidance_channels, 0, channels)
    if isinstance(arguments, CouplingArguments):
        # A comparison of two truths would not be traced where sizes are symbols.
        learned, slack_noise = output.shape[1] == 2 * channels, arguments.slack_noise
        if (learned and length > 1) if slack_noise is None else not learned:
            given = "none" if learned else slack_noise
            fail(op, "slack_noise", "given exactly where output has 2 C channels, so that variances are learned", given)


def check_settings(op: str, guidance_scale: float, clip: float) -> None:
    """Both are numbers. By comparisons alone, which are traced where the numbers are symbols."""
    pairs = zip(("guidance_scale", "clip"), (guidance_scale, clip), _EXPECTATIONS, strict=True)
    for name, value, expectation in pairs:
        if isinstance(value, bool) or not isinstance(value, _NUMBERS):
            fail(op, name, expectation, value, TypeError)
    if not -math.inf < guidance_scale < math.inf:
        fail(op, "guidance_scale", _EXPECTATIONS[0], guidance_scale)
    # A larger one would be infinite in float32, and clip nothing.
    if not (0.0 < clip <= _MOST or clip == math.inf):
        fail(op, "clip", _EXPECTATIONS[1], clip)


def draw_noise(arguments: KeyedCouplingArguments, backend: str = "auto") -> CouplingArguments:
    """The same round with the numbers of the random ops, of that ``backend``, in the place of their keys."""
    slots, length, channels, height, width = arguments.draft_states.shape
    images, rounds = (
        None if key is None else key.unsqueeze(1).repeat(1, length).view(-1)
        for key in (arguments.images, arguments.rounds)
    )
    steps = arguments.steps.contiguous().view(-1)

    def draw(op: Callable[..., Tensor], purpose: int, *shape: int) -> Tensor:
        numbers = op(arguments.seed % 2**64, images, steps, purpose, math.prod(shape), rounds, backend)
        return numbers.view(slots, length, *shape)

    learned = arguments.output.shape[1] == 2 * channels
    drawn = {
        "noise": draw(philox_normal, Purpose.STEP, channels, height, width),
        "slack_noise": draw(philox_normal, Purpose.SLACK, channels, height, width) if learned else None,
        "uniform": draw(philox_uniform, Purpose.ACCEPT, 1).squeeze(2),
    }
    shared = {name: value for name, value in arguments._asdict().items() if name in CouplingArguments._fields}
    return CouplingArguments(**shared, **drawn)


def _fake(arguments: CouplingArguments | KeyedCouplingArguments) -> Coupling:
    states = arguments.draft_states
    slots, length, *latent = states.shape
    committed = states.new_empty(slots, dtype=torch.int64)
    return Coupling(states.new_empty(slots, *latent), committed, states.new_empty(slots, length - 1))


def _declare(name: str, arguments: type, run: Callable[[Any], Coupling], launch: str) -> Op:
    return Op(name, arguments, run, _fake, f"coupling.{launch}", "(Tensor, Tensor, Tensor)")


def _compiled(name: str, run: Callable[[Any], Coupling]) -> Op:
    """The extension's op for CPU tensors, of a function ``name``."""

    def check(arguments: CouplingArguments) -> None:
        check_round(name, arguments)

    def fake(arguments: CouplingArguments) -> Coupling:
        # Also what runs where one of several tensors has no data, so that the op's own checks do not.
        check(arguments)
        return _fake(arguments)

    return Op(f"{name}_cpu", CouplingArguments, run, fake, check=check, public=name)


_TOKEN, _BLOCK = reference.couple, block.couple_block
OPS = {
    "couple": _declare("couple", CouplingArguments, _TOKEN, "couple"),
    "couple_block": _declare("couple_block", CouplingArguments, _BLOCK, "couple_block"),
    "couple_philox": _declare("couple_philox", KeyedCouplingArguments, lambda a: _TOKEN(draw_noise(a)), "couple"),
    "couple_block_philox": _declare(
        "couple_block_philox", KeyedCouplingArguments, lambda a: _BLOCK(draw_noise(a)), "couple_block"
    ),
}
COMPILED = {"couple": _compiled("couple", _TOKEN), "couple_block": _compiled("couple_block", _BLOCK)}


def decide(op: str, arguments: CouplingArguments | KeyedCouplingArguments, backend: str) -> Coupling:
    """Check the arguments of an op and run it. All channels are guided if ``guidance_channels`` is None.

    Raises:
        ValueError, TypeError: a shape or dtype does not fit, or the backend is unknown.
        RuntimeError: ``backend="extension"`` or ``"triton"`` cannot be used; the message says why.
    """
    check_choice(op, "backend", backend, BACKENDS)
    check_settings(op, arguments.guidance_scale, arguments.clip)
    shape = getattr(arguments.draft_states, "shape", ())[2:]
    if len(shape) not in (0, 3) and getattr(arguments.draft_mean, "ndim", 0) == 2 + len(shape):
        # States of another shape than images; noise made from keys has the drafts' in any case.
        rows = {name: as_images(getattr(arguments, name, None), 2) for name in _STATES if hasattr(arguments, name)}
        decided = decide(op, arguments._replace(output=as_images(arguments.output, 1), **rows), backend)
        return decided._replace(next_states=decided.next_states.view(-1, *shape))
    states, keyed = arguments.draft_states, isinstance(arguments, KeyedCouplingArguments)
    backend = with_gradient(op, arguments, backend)
    compiled = COMPILED[op.removesuffix("_philox")] if keyed else COMPILED[op]
    in_cpp = _runs_compiled(op, compiled, states, backend)
    # The compiled op makes the same checks in less time. What makes noise from keys, or traces, must not come before.
    if keyed or not in_cpp or torch.compiler.is_compiling() or states.ndim != 5:
        check_round(op, arguments)
    if arguments.guidance_channels is None:
        arguments = arguments._replace(guidance_channels=states.shape[2])
    if keyed and not OPS[op].runs_triton(states, backend):
        # Done here and not in the op's reference, which cannot pass the caller's backend on to the random ops.
        op, arguments = op.removesuffix("_philox"), draw_noise(arguments, backend)
    if in_cpp:
        return Coupling(*compiled.run_compiled(arguments))
    return Coupling(*OPS[op](arguments, states, backend))


def _runs_compiled(op: str, compiled: Op, states: object, backend: str) -> bool:
    """Whether a backend means the extension for these states; a wrong kind of them is found by the checks."""
    if backend in ("reference", "triton") or not isinstance(states, Tensor):
        return False
    # Asking a tensor for its device takes longer.
    return use_extension(compiled.name, "cpu" if states.is_cpu else states.device.type, backend, op)
