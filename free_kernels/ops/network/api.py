"""Public op of the learned drafter's network."""

from __future__ import annotations

import torch
from torch import Tensor

from free_kernels.ops.attention import feature_attention
from free_kernels.ops.checks import Layouts
from free_kernels.ops.declaration import Op
from free_kernels.ops.network import reference
from free_kernels.ops.network.arguments import (
    BLOCK_ROWS,
    BLOCK_WEIGHTS,
    FIRST_WEIGHTS,
    LAST_ROWS,
    LAST_WEIGHTS,
)
from free_kernels.ops.network.arguments import NetworkArguments as NetworkArguments
from free_kernels.ops.norms import adaptive_norm
from free_kernels.validation import check_choice, check_int, fail

BACKENDS = ("auto", "reference", "extension")
_NAME = "drafter_network"
_FLOAT32 = (torch.float32,)
# Tokens of a row and values of all beyond which arithmetic takes longer than calls, and PyTorch's attention is better.
MOST_TOKENS, MOST_VALUES = 64, 1 << 14


def _check(a: NetworkArguments) -> None:
    given = len(a.weights) if isinstance(a.weights, (list, tuple)) else 0
    depth, rest = divmod(given - FIRST_WEIGHTS - LAST_WEIGHTS, BLOCK_WEIGHTS)
    if depth < 1 or rest or not all(isinstance(part, Tensor) for part in a.weights):
        fail(_NAME, "weights", "tensors, 4 and 8 for each block", f"{given} of them")
    Layouts(_NAME, None, {}).check("feature", a.feature, _FLOAT32, "[R, T, D]")
    sizes = dict(zip("RTD", a.feature.shape, strict=True))
    Layouts(_NAME, a.feature.device, sizes).check("tokens", a.tokens, _FLOAT32, "[R, T, I]")
    Layouts(_NAME, a.feature.device, sizes).check("modulations", a.modulations, _FLOAT32, "[R, K, W]")
    sizes |= {"I": a.tokens.shape[2], "W": a.modulations.shape[2], "3 W": 3 * a.modulations.shape[2], "1": 1}
    least = BLOCK_ROWS * depth + LAST_ROWS
    if a.modulations.shape[1] not in (least, least + 1):
        fail(_NAME, "modulations", f"[R, K, W] with K {least} or {least + 1}", a.modulations)
    check_int(_NAME, "heads", a.heads, 1)
    if a.modulations.shape[2] % a.heads:
        fail(_NAME, "heads", f"a divisor of the width {a.modulations.shape[2]}", a.heads)
    if not a.eps > 0:
        fail(_NAME, "eps", "above 0", a.eps)
    names = ["[W, I]", "[1, T, W]"]
    for block in range(depth):
        hidden = a.weights[FIRST_WEIGHTS + BLOCK_WEIGHTS * block + 4]
        sizes[f"F{block}"] = hidden.shape[0] if hidden.ndim == 2 else -1
        names += ["[3 W, W]", "[3 W]", "[W, W]", "[W]", f"[F{block}, W]", f"[F{block}]", f"[W, F{block}]", "[W]"]
    names += ["[D, W]", "[D]"]
    layouts = Layouts(_NAME, a.feature.device, sizes)
    for index, (weight, layout) in enumerate(zip(a.weights, names, strict=True)):
        layouts.check(f"weights[{index}]", weight, _FLOAT32, layout, contiguous=weight.ndim != 2)


def _fake(a: NetworkArguments) -> Tensor:
    return a.feature.new_empty(a.feature.shape)


OP = Op("drafter_network_cpu", NetworkArguments, reference.drafter_network, _fake, check=_check, public=_NAME)


def _compiled(a: NetworkArguments) -> bool:
    """Whether the compiled op is the fastest for these arguments, if it is there."""
    feature = a.feature
    rows, tokens, _ = feature.shape
    return (
        feature.is_cpu
        and tokens <= MOST_TOKENS
        and rows * tokens * a.modulations.shape[2] <= MOST_VALUES
        and feature.dtype == a.tokens.dtype == a.modulations.dtype == a.weights[0].dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
    )


def _attend(_block: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return feature_attention(q, k, v)


def network_in_parts(
    arguments: NetworkArguments,
    attend: reference.Attend = _attend,
    normalize: reference.Normalize = adaptive_norm,
) -> Tensor:
    """:func:`drafter_network` made of ops of its own parts, which the caller may replace.

    Args:
        arguments: as there, of any floating-point dtype that the parts take.
        attend: mixes queries, keys and values ``[R, T, H, Dh]`` of a block, whose number it is given.
        normalize: in the place of :func:`~free_kernels.ops.norms.adaptive_norm`.
    """
    return reference.composed(arguments, attend, normalize)


def drafter_network(arguments: NetworkArguments, backend: str = "auto") -> Tensor:
    """The drafted feature ``[R, T, D]``: the parent feature plus what a shallow transformer says of its change.

    ``x = tokens enter^T + positions``; each block adds attention among a row's tokens and an MLP with exact GELU, both
    of layer-normalised, modulated tokens and gated; what leaves the last block is normalised and modulated again. Of a
    row's modulations a block has six: shift and scale, gate of attention, shift and scale, gate of the MLP; then come
    shift and scale of the last norm and, where there is one row more, the gain with which the embedding ``x`` is added
    behind it. Scales and gates are taken as they stand: a 1 to be added is in them.

    Source: blocks and modulation are adaLN-Zero of DiT (arXiv 2212.09748); the skip is ours.

    Args:
        arguments: ``feature [R, T, D]``; ``tokens [R, T, I]``; ``modulations [R, 6 N + 2 or 3, W]``; ``weights``:
            enter ``[W, I]``, positions ``[1, T, W]``; of each of N blocks weight and bias of queries, keys and values
            ``[3 W, W]``, of the projection ``[W, W]``, and of the MLP ``[F, W]`` and ``[W, F]``; weight ``[D, W]`` and
            bias of what leaves; ``heads``, a divisor of W; ``eps``, which is added to variances.
        backend: ``"auto"``, ``"reference"`` or ``"extension"``, one call on the CPU, float32 and without gradient.
            ``"auto"`` takes that where a row has at most 64 tokens, R T W is at most 16,384 and autocast is off; else
            the network is made of
            :func:`~free_kernels.ops.attention.feature_attention` and :func:`~free_kernels.ops.norms.adaptive_norm`.

    Raises:
        ValueError, TypeError: a wrong argument.
        RuntimeError: the backend cannot be used; the message says why.
    """
    if check_choice(_NAME, "backend", backend, BACKENDS) == "auto" and not _compiled(arguments):
        return network_in_parts(arguments)
    return OP(arguments, arguments.feature, backend)
