"""``feature_attention``: the reference against float64 and brute force, the kernel in the interpreter and compiled."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding import attention_rounding
from torch import Tensor

from free_kernels.ops.attention import api as attention
from free_kernels.ops.attention import append_features, feature_attention, rewind_features
from free_kernels.ops.attention.reference import valid_slots

WORKER = Path(__file__).parents[1].joinpath("workers", "attention_worker.py")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OP = torch.ops.free_kernels.feature_attention


def make(
    seed: int, rows: int, tokens: int, heads: int, head_dim: int, capacity: int, dtype: torch.dtype = torch.float64
) -> dict[str, Any]:
    """A fused qkv and a ring with ragged lengths at any position; slots out of use hold NaN."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(rows, tokens, 3, heads, head_dim, generator=g, dtype=torch.float64).to(dtype).unbind(2)
    arguments = {"q": q, "k": k, "v": v}
    if capacity:
        cache = torch.randn(2, rows, capacity, tokens, heads, head_dim, generator=g, dtype=torch.float64).to(dtype)
        length = torch.randint(0, capacity + 1, (rows,), generator=g)
        length[0], length[-1] = capacity, 0
        position = torch.randint(0, capacity, (rows,), generator=g)
        cache[:, ~valid_slots(length, position, capacity)] = torch.nan
        arguments |= {"cache_k": cache[0], "cache_v": cache[1], "cache_length": length, "cache_position": position}
    return arguments


def naive(a: dict[str, Any], scale: float | None = None, window: int | None = None) -> Tensor:
    """Row by row, head by head and slot by slot, in float64."""
    q, k, v = (a[name].double() for name in "qkv")
    out = torch.empty_like(q)
    for r in range(q.shape[0]):
        keys, values = [k[r]], [v[r]]
        if "cache_k" in a:
            capacity, length = a["cache_k"].shape[1], int(a["cache_length"][r])
            for age in range(min(length, capacity if window is None else window - 1)):
                slot = (int(a["cache_position"][r]) - age) % capacity
                keys.append(a["cache_k"][r, slot].double())
                values.append(a["cache_v"][r, slot].double())
        for h in range(q.shape[2]):
            scores = q[r, :, h] @ torch.cat(keys)[:, h].T * (q.shape[3] ** -0.5 if scale is None else scale)
            weights = (scores - scores.max(dim=1, keepdim=True).values).exp()
            out[r, :, h] = weights / weights.sum(1, keepdim=True) @ torch.cat(values)[:, h]
    return out


def run_worker(mode: str) -> Any:
    """Triton in a process of its own: whether it interprets is settled while it is imported."""
    result = subprocess.run([sys.executable, str(WORKER), mode], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 4),
    tokens=st.integers(1, 6),
    heads=st.integers(1, 3),
    head_dim=st.sampled_from([4, 8, 72]),
    capacity=st.integers(0, 4),
    scale=st.sampled_from([None, 0.3]),
    window=st.sampled_from([None, 1, 2, 9]),
)
def test_reference_equals_brute_force(
    seed: int,
    rows: int,
    tokens: int,
    heads: int,
    head_dim: int,
    capacity: int,
    scale: float | None,
    window: int | None,
) -> None:
    a = make(seed, rows, tokens, heads, head_dim, capacity)
    torch.testing.assert_close(
        feature_attention(**a, scale=scale, window=window), naive(a, scale, window), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_a_cache_it_is_plain_attention(dtype: torch.dtype) -> None:
    a = make(0, 3, 17, 2, 32, 0, dtype)
    want = F.scaled_dot_product_attention(*(a[name].transpose(1, 2) for name in "qkv")).transpose(1, 2)
    got = feature_attention(**a)
    assert got.is_contiguous()
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_error_against_float64(dtype: torch.dtype) -> None:
    a = make(1, 3, 33, 2, 72, 3, dtype)
    # Values are about 1: two roundings in 16 bits. In float32 the exponents, of up to 40, round too.
    bound = (32 if dtype == torch.float32 else 4) * torch.finfo(dtype).eps
    assert (feature_attention(**a).double() - naive(a)).abs().max() < bound


def test_every_step_of_a_trajectory_sees_its_window() -> None:
    """Appending and rewinding over a whole ragged history against lists of what each row holds."""
    g = torch.Generator().manual_seed(2)
    rows, tokens, heads, head_dim, capacity, window = 3, 2, 1, 4, 4, 3
    shape = (rows, tokens, heads, head_dim)
    cache_k, cache_v = torch.full((2, rows, capacity, *shape[1:]), torch.nan, dtype=torch.float64)
    length, position = torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, dtype=torch.int64)
    ring = (cache_k, cache_v)
    history: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(rows)]
    for step in range(25):
        q, k, v = torch.randn(3, *shape, generator=g, dtype=torch.float64)
        got = feature_attention(q, k, v, *ring, length, position, window=window)
        for r in range(rows):
            seen = [(k[r], v[r]), *history[r][::-1][: window - 1]]
            keys, values = (torch.stack([pair[i] for pair in seen]).flatten(0, 1)[:, 0] for i in (0, 1))
            weights = (q[r, :, 0] @ keys.T / math.sqrt(head_dim)).softmax(-1)
            torch.testing.assert_close(got[r, :, 0], weights @ values)
        append_features(*ring, k, v, length, position)
        for r in range(rows):
            history[r] = [*history[r], (k[r], v[r])][-capacity:]
        if step % 4 == 3:
            refused = torch.randint(0, 4 if step % 8 == 3 else 6, (rows,), generator=g)
            rewind_features(length, position, refused, capacity)
            for r in range(rows):
                history[r] = history[r][: max(len(history[r]) - int(refused[r]), 0)]
        assert length.tolist() == [len(steps) for steps in history]


def test_rewound_steps_are_never_read() -> None:
    a = make(3, 2, 3, 2, 8, 4)
    a["cache_length"].fill_(4)
    a["cache_k"].normal_(), a["cache_v"].normal_()
    rewind_features(a["cache_length"], a["cache_position"], 2, 4)
    before = feature_attention(**a)
    for name in ("cache_k", "cache_v"):
        a[name][~valid_slots(a["cache_length"], a["cache_position"], 4)] = torch.nan
    assert torch.equal(feature_attention(**a), before)
    rewind_features(a["cache_length"], a["cache_position"], torch.tensor([9, 0]), 4)
    assert a["cache_length"].tolist() == [0, 2]


def test_gradients() -> None:
    a = make(4, 3, 3, 2, 8, 2)
    a["cache_k"], a["cache_v"] = a["cache_k"].nan_to_num(1.0), a["cache_v"].nan_to_num(1.0)
    counters = (a["cache_length"], a["cache_position"])
    floats = tuple(a[name].clone().requires_grad_() for name in ("q", "k", "v", "cache_k", "cache_v"))
    for window in (None, 2, 1):
        # The reference by autograd, and the op (whose backward is what the kernel uses) by closed form.
        for function in (
            lambda *x, window=window: feature_attention(*x, *counters, window=window),
            lambda *x, window=window: OP(*x, *counters, 0.3, window),
        ):
            assert torch.autograd.gradcheck(function, floats, fast_mode=True)
    assert torch.autograd.gradcheck(lambda *x: OP(*x, None, None, None, None, None, None), floats[:3])


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("capacity", [0, 2])
def test_opcheck(capacity: int, gradient: bool) -> None:
    a = make(5, 3, 4, 2, 8, capacity, torch.float32)
    values = [*a.values(), None, None, None, None][:7]
    values = [v.clone().requires_grad_(gradient) if v is not None and v.is_floating_point() else v for v in values]
    torch.library.opcheck(OP.default, (*values, 0.25, 2 if capacity else None))


@pytest.mark.parametrize("capacity", [0, 2])
def test_traces_without_graph_breaks(capacity: int) -> None:
    a = make(6, 3, 4, 2, 8, capacity, torch.float32)
    compiled = torch.compile(feature_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**a), feature_attention(**a))
    if not capacity:
        return
    eager = {name: value.clone() for name, value in a.items()}
    push = torch.compile(append_features, fullgraph=True, backend="aot_eager")
    back = torch.compile(rewind_features, fullgraph=True, backend="aot_eager")
    for b, append, rewind in ((a, push, back), (eager, append_features, rewind_features)):
        counters = (b["cache_length"], b["cache_position"])
        append(b["cache_k"], b["cache_v"], b["k"], b["v"], *counters)
        rewind(*counters, torch.tensor([1, 0, 2]), capacity)
    assert all(torch.equal(a[name].nan_to_num(7.0), eager[name].nan_to_num(7.0)) for name in a)


INT = torch.int64


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": [1.0]}, TypeError, r"q must be a float tensor \[R, T, H, Dh\], got list"),
        ({"q": torch.zeros(2, 3, 2, 8, dtype=INT)}, TypeError, "q must be float32, .*, got int64"),
        ({"q": torch.zeros(2, 6, 8)}, ValueError, r"q must be \[R, T, H, Dh\] .* got float32 \[2, 6, 8\]"),
        (
            {"k": torch.zeros(2, 3, 2, 4)},
            ValueError,
            r"k must be float32 .* = \[2, 3, 2, 8\], got float32 \[2, 3, 2, 4",
        ),
        ({"k": torch.zeros(2, 3, 2, 8).half()}, TypeError, "k must be float32 .* got float16"),
        ({"v": torch.zeros(2, 3, 8, 2).mT}, ValueError, "v must be .* unit stride in the last dimension, got .*1, 2"),
        ({"v": torch.zeros(2, 3, 2, 8, device="meta")}, ValueError, "v must be on cpu"),
        ({"cache_v": None}, TypeError, r"cache_v must be float32 \[R, C, T, H, Dh\] = \[2, 3, 3, 2, 8\], got NoneType"),
        ({"cache_k": torch.zeros(2, 3, 3, 2, 4)}, ValueError, "cache_k must be"),
        ({"cache_k": torch.zeros(3, 2, 3, 2, 8).transpose(0, 1)}, ValueError, "cache_k must be .* contiguous"),
        ({"cache_length": torch.zeros(2)}, TypeError, r"cache_length must be int64 \[R\] = \[2\], got float32"),
        ({"cache_length": torch.tensor([4, 0])}, ValueError, r"cache_length\[0\] must be in \[0, 3\], got 4"),
        ({"cache_position": torch.tensor([0, -1])}, ValueError, r"cache_position\[1\] must be in \[0, 3\), got -1"),
        ({"scale": 0.0}, ValueError, "scale must be a finite number > 0"),
        ({"window": 0}, ValueError, "window must be an int in"),
        ({"backend": "cuda"}, ValueError, "backend must be one of 'auto', 'reference', 'triton', got 'cuda'"),
    ],
)
def test_refuses_wrong_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    a = make(7, 2, 3, 2, 8, 3, torch.float32)
    with pytest.raises(error, match=f"^feature_attention: {message}"):
        feature_attention(**{**a, **change})


def test_in_place_functions_refuse_before_writing() -> None:
    a = make(8, 2, 3, 2, 8, 3, torch.float32)
    counters = (a["cache_length"], a["cache_position"])
    with pytest.raises(ValueError, match=r"^append_features: v must be"):
        append_features(a["cache_k"], a["cache_v"], a["k"], a["v"][:, :2], *counters)
    with pytest.raises(ValueError, match=r"^rewind_features: steps must be at least 0, got -1"):
        rewind_features(*counters, torch.tensor([1, -1]), 3)
    with pytest.raises(TypeError, match=r"^rewind_features: cache_length must be int64"):
        rewind_features(None, counters[1], 1, 3)
    assert counters[0].tolist() == [3, 0]


def test_an_explicit_backend_never_falls_back() -> None:
    a = make(9, 2, 3, 2, 32, 0, torch.float32)
    start = "^feature_attention: backend 'triton' cannot be used: "
    with pytest.raises(RuntimeError, match=start + "(it needs CUDA tensors|importing Triton failed)"):
        feature_attention(**a, backend="triton")
    with pytest.raises(RuntimeError, match=start + "it takes head dimensions .* got 4"):
        feature_attention(*(a[name][..., :4] for name in "qkv"), backend="triton")
    with pytest.raises(RuntimeError, match=start + "it takes float32, .* got float64"):
        feature_attention(*(a[name].double() for name in "qkv"), backend="triton")
    assert attention.why_no_triton(a["q"]) is not None


def test_kernel_in_the_interpreter() -> None:
    """Odd token counts, ragged and wrapped rings, NaN in every slot out of use and in the output beforehand."""
    pytest.importorskip("triton")
    found = run_worker("interpret")
    for case, error, eager, allowed, well_formed in found["cases"]:
        # Eager's error may be small by luck: both may be off by what rounding allows.
        assert error <= 2 * eager + allowed, case
        assert well_formed, case
    error, eager, allowed = found["control"]
    assert error > 2 * eager + allowed, "queries that are off by 2^-16 are found"


# Shared memory that a block may have: consumer sm_86/89 run sm_80 code with 99 KiB; H100 has 227 KiB.
SHARED_LIMIT = {"sm_80": 99 * 1024, "sm_90": 227 * 1024}


@pytest.mark.slow
def test_kernel_compiles_without_spills() -> None:
    """For the head dimensions of DiT; the other configurations are compiled with every other kernel's."""
    pytest.importorskip("triton")
    reports = run_worker("aot")
    assert len(reports) >= 10
    for report in reports:
        print(report)
    for report in reports:
        assert report["spilled"] == report["stack"] == 0, report
        assert report["shared"] <= SHARED_LIMIT[report["device"]], report


def on_gpu(a: dict[str, Any]) -> dict[str, Any]:
    return {name: value.cuda() for name, value in a.items()}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [32, 64, 72, 96, 128])
def test_cuda_against_float64(head_dim: int, dtype: torch.dtype) -> None:
    for tokens, capacity in ((16, 2), (25, 3), (256, 2), (300, 1), (1024, 0)):
        a = on_gpu(make(tokens, 3, tokens, 4, head_dim, capacity, dtype))
        exact = feature_attention(**{n: x.double() if x.is_floating_point() else x for n, x in a.items()})
        error, eager = (
            (feature_attention(**a, backend=name).double() - exact).abs().max() for name in ("triton", "reference")
        )
        allowed = attention_rounding(a["q"], a["k"], a["v"], head_dim**-0.5, a.get("cache_k"), a.get("cache_v"))
        assert error <= 2 * eager + allowed, (tokens, float(error), float(eager))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gradients_and_compilation() -> None:
    a = on_gpu(make(1, 2, 40, 2, 32, 2, torch.float32))
    a = {name: value.nan_to_num(1.0) if value.is_floating_point() else value for name, value in a.items()}
    compiled = torch.compile(feature_attention, fullgraph=True)
    torch.testing.assert_close(compiled(**a, backend="triton"), feature_attention(**a, backend="reference"))
    torch.library.opcheck(OP.default, (*a.values(), 0.25, 2))
    gradients = []
    for backend in ("triton", "reference"):
        b = {n: x.clone().requires_grad_(x.is_floating_point()) for n, x in a.items()}
        feature_attention(**b, backend=backend).square().sum().backward()
        gradients.append([x.grad for x in b.values() if x.requires_grad])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_graph_follows_ragged_lengths() -> None:
    a = on_gpu(make(2, 3, 64, 2, 64, 3, torch.bfloat16))
    ring = (a["cache_k"].nan_to_num_(1.0), a["cache_v"].nan_to_num_(1.0))
    counters = (a["cache_length"], a["cache_position"])

    def step() -> Tensor:
        append_features(*ring, a["k"], a["v"], *counters)
        return feature_attention(**a, backend="triton")

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for length in ([0, 1, 2], [2, 0, 3]):
        counters[0].copy_(torch.tensor(length))
        b = {name: value.clone() for name, value in a.items()}
        append_features(*(b[n] for n in ("cache_k", "cache_v", "k", "v", "cache_length", "cache_position")))
        graph.replay()
        assert torch.equal(out, feature_attention(**b, backend="triton"))
