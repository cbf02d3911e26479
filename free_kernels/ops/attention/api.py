"""Attention of a draft step to its own tokens and to the features of earlier steps in a ring cache."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from free_kernels.ops.attention import reference
from free_kernels.ops.attention.arguments import AttentionArguments
from free_kernels.ops.checks import FLOATS, INT64, Layouts
from free_kernels.ops.declaration import LIBRARY, Op
from free_kernels.ops.triton_runtime import why_no_runtime
from free_kernels.validation import check_choice, check_int, describe, fail

BACKENDS = ("auto", "reference", "triton")
# float64 is for gradcheck and for oracles: the reference takes it, the kernel does not.
_REFERENCE_FLOATS = (*FLOATS, torch.float64)


def _refuse_strides(op: str, name: str, value: Tensor, layout: str) -> None:
    fail(op, name, layout, f"{describe(value)} with strides {list(value.stride())}")


def _check_features(op: str, names: tuple[str, ...], values: tuple[object, ...]) -> None:
    """Tensors ``[R, T, H, Dh]`` of one shape, float dtype and device, with unit stride in the last dimension."""
    first = values[0]
    layout = "[R, T, H, Dh]"
    if not isinstance(first, Tensor):
        fail(op, names[0], f"a float tensor {layout}", type(first).__name__, TypeError)
    if first.dtype not in _REFERENCE_FLOATS:
        fail(op, names[0], f"float32, float16, bfloat16 or float64 {layout}", first, TypeError)
    if first.ndim != 4 or 0 in first.shape:
        fail(op, names[0], f"{layout} with no empty dimension", first)
    layouts = Layouts(op, first.device, dict(zip(("R", "T", "H", "Dh"), first.shape, strict=True)))
    for name, value in zip(names, values, strict=True):
        layouts.check(name, value, (first.dtype,), layout, contiguous=False)
        if value.stride(3) != 1:
            _refuse_strides(op, name, value, f"{layout} with unit stride in the last dimension")


def _plain(q: object, k: object, v: object) -> bool:
    """Whether :func:`_check_features` would accept these CPU tensors; a quick test, because a call may take 20 us."""
    if not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)):
        return False
    shape, dtype = q.shape, q.dtype
    return (
        len(shape) == 4
        and k.shape == shape
        and v.shape == shape
        and dtype in _REFERENCE_FLOATS
        and k.dtype is dtype
        and v.dtype is dtype
        and q.is_cpu
        and k.is_cpu
        and v.is_cpu
        and q.stride(3) == k.stride(3) == v.stride(3) == 1
        and 0 not in shape
    )


def _check_cache(op: str, own: Tensor, cache_k: object, cache_v: object, length: object, position: object) -> None:
    """Ring buffers ``[R, C, T, H, Dh]`` contiguous, counters int64 ``[R]``; on the CPU their values too."""
    capacity = cache_k.shape[1] if isinstance(cache_k, Tensor) and cache_k.ndim == 5 else 1
    sizes = dict(zip(("R", "C", "T", "H", "Dh"), (own.shape[0], capacity, *own.shape[1:]), strict=True))
    layouts = Layouts(op, own.device, sizes)
    for name, value in (("cache_k", cache_k), ("cache_v", cache_v)):
        layouts.check(name, value, (own.dtype,), "[R, C, T, H, Dh]", contiguous=False)
        if capacity < 1 or not value.is_contiguous():
            _refuse_strides(op, name, value, "[R, C, T, H, Dh] contiguous with C >= 1")
    for name, value in (("cache_length", length), ("cache_position", position)):
        layouts.check(name, value, INT64, "[R]", contiguous=False)
    if own.is_cpu and not torch.compiler.is_compiling():
        for row, (count, slot) in enumerate(zip(length.tolist(), position.tolist(), strict=True)):
            if not 0 <= count <= capacity:
                fail(op, f"cache_length[{row}]", f"in [0, {capacity}]", str(count))
            if not 0 <= slot < capacity:
                fail(op, f"cache_position[{row}]", f"in [0, {capacity})", str(slot))


def why_no_triton(q: Tensor) -> str | None:
    """Why the Triton kernel cannot take queries like ``q [R, T, H, Dh]``, or None if it can."""
    if q.dtype not in FLOATS:
        return f"it takes float32, float16 and bfloat16, got {str(q.dtype).removeprefix('torch.')}"
    if q.shape[-1] % 8 or not 16 <= q.shape[-1] <= 128:
        return f"it takes head dimensions that are multiples of 8 in [16, 128], got {q.shape[-1]}"
    return why_no_runtime("attention", q.device.type, q.device.index)


def _use_triton(op: str, q: Tensor, backend: str, needs_gradient: bool = False) -> bool:
    if backend == "auto":
        return not q.is_cpu and not needs_gradient and why_no_triton(q) is None
    if check_choice(op, "backend", backend, BACKENDS) == "reference":
        return False
    reason = why_no_triton(q)
    if reason is not None:
        raise RuntimeError(f"{op}: backend 'triton' cannot be used: {reason}")
    return True


def feature_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache_k: Tensor | None = None,
    cache_v: Tensor | None = None,
    cache_length: Tensor | None = None,
    cache_position: Tensor | None = None,
    *,
    scale: float | None = None,
    window: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of a draft step's queries to its own tokens and to those of earlier steps in a ring cache.

    Step-causal: a step's tokens see each other and every token of the earlier steps that are in use. Without a cache
    it is equivalent to ``F.scaled_dot_product_attention`` with tokens and heads swapped.

    Args:
        q: ``[R, T, H, Dh]`` float32, float16 or bfloat16 (float64 with the reference) with unit stride in the last
            dimension: slices of a fused ``[R, T, 3, H, Dh]`` need no copy.
        k: keys of the same step, like ``q``.
        v: values of the same step, like ``q``.
        cache_k: ``[R, C, T, H, Dh]`` contiguous, keys of earlier steps in a ring of C slots; None for no cache.
        cache_v: their values.
        cache_length: ``[R]`` int64 in ``[0, C]``, earlier steps in use.
        cache_position: ``[R]`` int64 in ``[0, C)``, slot of the latest step; the step before it is one slot below,
            modulo C. Slots that are not in use are never read and may hold any values.
        scale: factor of the products, positive; ``Dh ** -0.5`` if None.
        window: W >= 1, steps that a query sees, its own included; C + 1 if None. A ring with more than W - 1 slots
            still has W - 1 steps after :func:`rewind_features`.
        backend: ``"auto"``, ``"reference"`` or ``"triton"``. ``"auto"`` takes the kernel for CUDA tensors that need
            no gradient, and the reference otherwise (then autograd goes through
            ``F.scaled_dot_product_attention``). Gradients of ``"triton"`` are computed in PyTorch by their closed form,
            with the whole matrix of weights in memory.

    Returns:
        ``[R, T, H, Dh]`` contiguous, of the dtype of ``q``; sums and softmax are in float32 at least.

    Raises:
        ValueError, TypeError: a wrong argument; values of counters are checked on the CPU only (elsewhere they are
            brought into range).
        RuntimeError: ``backend="triton"`` cannot be used; :func:`why_no_triton` says why.
    """
    op = "feature_attention"
    if not _plain(q, k, v):
        _check_features(op, ("q", "k", "v"), (q, k, v))
    if cache_k is not None or cache_v is not None or cache_length is not None or cache_position is not None:
        _check_cache(op, q, cache_k, cache_v, cache_length, cache_position)
    if scale is not None and not (isinstance(scale, (int, float)) and 0 < scale < math.inf):
        fail(op, "scale", "a finite number > 0 or None", scale)
    if window is not None:
        check_int(op, "window", window, 1)
    needs_gradient = torch.is_grad_enabled() and (
        q.requires_grad
        or k.requires_grad
        or v.requires_grad
        or (cache_k is not None and (cache_k.requires_grad or cache_v.requires_grad))
    )
    arguments = AttentionArguments(q, k, v, cache_k, cache_v, cache_length, cache_position, scale, window)
    if not _use_triton(op, q, backend, needs_gradient):
        return reference.feature_attention(arguments)
    if q.is_cpu and needs_gradient:
        raise RuntimeError(f"{op}: backend 'triton' cannot be used: the interpreter computes no gradients")
    return OP.launch(arguments, q)


def append_features(
    cache_k: Tensor,
    cache_v: Tensor,
    k: Tensor,
    v: Tensor,
    cache_length: Tensor,
    cache_position: Tensor,
) -> None:
    """Add one step of every row to its ring, in place: the slot after the latest one is overwritten.

    ``cache_position`` advances by one modulo C and ``cache_length`` by one up to C; rows may have different positions.

    Args:
        cache_k: ``[R, C, T, H, Dh]`` contiguous, written.
        cache_v: likewise.
        k: ``[R, T, H, Dh]``, the step's keys, unit stride in the last dimension.
        v: the step's values.
        cache_length: ``[R]`` int64 in ``[0, C]``, written.
        cache_position: ``[R]`` int64 in ``[0, C)``, written.

    Raises:
        ValueError, TypeError: a wrong argument; values of counters are checked on the CPU only.
    """
    _check_features("append_features", ("k", "v"), (k, v))
    _check_cache("append_features", k, cache_k, cache_v, cache_length, cache_position)
    reference.append_features(cache_k, cache_v, k, v, cache_length, cache_position)


def rewind_features(cache_length: Tensor, cache_position: Tensor, steps: Tensor | int, capacity: int) -> None:
    """Forget the latest ``steps`` steps of every row, in place; nothing in the ring is touched.

    After a rejection no later query may see the drafts after it: their slots are no longer valid, and later steps
    overwrite them. Steps that these drafts had pushed out of the ring do not come back, so a row then has fewer than C
    steps until later ones refill it. To keep all W - 1 steps after a rejection among L drafts, give the ring
    C = W - 1 + L - 1 slots and ``feature_attention`` its ``window``. ``steps`` at or above the length empties a row,
    which is what a slot needs when another trajectory takes it.

    Args:
        cache_length: ``[R]`` int64 in ``[0, C]``, written.
        cache_position: ``[R]`` int64 in ``[0, C)``, written.
        steps: ``[R]`` int64 >= 0, or one int >= 0 for every row.
        capacity: C >= 1.

    Raises:
        ValueError, TypeError: a wrong argument; values of tensors are checked on the CPU only.
    """
    op = "rewind_features"
    check_int(op, "capacity", capacity, 1, 2**62)
    counts = isinstance(cache_length, Tensor) and cache_length.ndim == 1
    layouts = Layouts(op, getattr(cache_length, "device", None), {"R": cache_length.shape[0] if counts else 1})
    layouts.check("cache_length", cache_length, INT64, "[R]", contiguous=False)
    layouts.check("cache_position", cache_position, INT64, "[R]", contiguous=False)
    if isinstance(steps, Tensor):
        layouts.check("steps", steps, INT64, "[R]", contiguous=False)
        if steps.is_cpu and not torch.compiler.is_compiling() and steps.numel() and int(steps.min()) < 0:
            fail(op, "steps", "at least 0", str(int(steps.min())))
    else:
        check_int(op, "steps", steps, 0, 2**62)
    cache_length.sub_(steps).clamp_(min=0)
    cache_position.sub_(steps).remainder_(capacity)


def _fake(arguments: AttentionArguments) -> Tensor:
    return torch.empty(arguments.q.shape, dtype=arguments.q.dtype, device=arguments.q.device)


OP = Op("feature_attention", AttentionArguments, reference.feature_attention, _fake, "attention.feature_attention")


def _save_inputs(ctx: object, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.scale, ctx.window = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: object, grad: Tensor) -> tuple:
    arguments = AttentionArguments(*ctx.saved_tensors, ctx.scale, ctx.window)
    # The counters, scale and window have no gradients.
    return *reference.feature_attention_backward(grad, arguments), None, None, None, None


torch.library.register_autograd(OP.overload, _backward, setup_context=_save_inputs, lib=LIBRARY)
