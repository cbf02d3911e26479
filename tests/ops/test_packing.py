"""``pack_drafts`` and ``commit_drafts``: the reference against a model in plain Python, the extension against it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packing_inputs import make_commit, make_pack
from torch import Tensor

from free_kernels import extension
from free_kernels.ops.packing import commit_drafts, pack_drafts
from free_kernels.ops.packing.arguments import CommitArguments, PackArguments

needs_extension = pytest.mark.skipif(
    not extension.has_extension(), reason=f"no compiled extension: {extension.why_no_extension()}"
)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BACKENDS = ["reference", pytest.param("extension", marks=needs_extension)]
WRITTEN = ("state", "previous", "parent", "steps", "images", "labels", "samples", "queue")


def offset_copy(tensor: Tensor, offset: int) -> Tensor:
    """An equal contiguous tensor that starts ``offset`` elements into its storage."""
    storage = torch.empty(tensor.numel() + offset, dtype=tensor.dtype)
    result = storage[offset:].view(tensor.shape)
    result.copy_(tensor)
    return result


def model_pack(arguments: PackArguments) -> tuple[list[Tensor], list[int], list[int], list[int]]:
    states, lengths, steps, labels, timesteps, num_rows, null_label = arguments
    x, t, y, offsets = [], [], [], [0]
    for s, length in enumerate(lengths.tolist()):
        for j in range(length):
            x.append(states[s, j])
            t.append(int(timesteps[int(steps[s]) + j]))
            y.append(int(labels[s]))
        offsets.append(len(x))
    while len(x) < num_rows:
        x.append(torch.zeros_like(states[0, 0]))
        t.append(int(timesteps[-1]))
        y.append(0)
    if null_label is not None:
        x, t, y = x + x, t + t, y + [null_label] * num_rows
    return x, t, y, offsets


def model_commit(a: dict[str, Any]) -> dict[str, Any]:
    a = copy.deepcopy(a)
    rows = a["features"].shape[0] // a["parent"].shape[0]
    for s, c in enumerate(a["committed"].tolist()):
        image = int(a["images"][s])
        if image < 0 or c == 0:
            continue
        a["previous"][s] = a["draft_states"][s, c - 1]
        for b in range(a["parent"].shape[0]):
            a["parent"][b, s] = a["features"][b * rows + int(a["row_offsets"][s]) + c - 1]
        a["state"][s] = a["next_states"][s]
        a["steps"][s] += c
        if a["steps"][s] == a["num_steps"]:
            a["samples"][image] = a["next_states"][s]
            waiting = int(a["queue"])
            if waiting < len(a["samples"]):
                a["queue"] += 1
                a["images"][s] = waiting
                a["labels"][s] = a["all_labels"][waiting]
                a["state"][s] = a["samples"][waiting]
                a["steps"][s] = 0
            else:
                a["images"][s] = -1
    return a


sizes = {
    "seed": st.integers(0, 2**31),
    "slots": st.integers(1, 5),
    "draft_length": st.integers(1, 4),
    "latent": st.sampled_from([(1, 2, 2), (3, 1, 3), (4, 2, 4)]),
}


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=60, deadline=None)
@given(**sizes, padding=st.integers(0, 3), null_label=st.sampled_from([None, 10]))
def test_pack_equals_model(
    backend: str,
    seed: int,
    slots: int,
    draft_length: int,
    latent: tuple[int, ...],
    padding: int,
    null_label: int | None,
) -> None:
    a = make_pack(seed, slots, draft_length, latent, padding)
    x, t, y, row_offsets = pack_drafts(**a, null_label=null_label, backend=backend)
    want_x, want_t, want_y, want_offsets = model_pack(PackArguments(**a, null_label=null_label))
    assert x.shape == (len(want_x), *latent)
    assert all(torch.equal(row, want) for row, want in zip(x, want_x, strict=True))
    assert (t.tolist(), y.tolist(), row_offsets.tolist()) == (want_t, want_y, want_offsets)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=100, deadline=None)
@given(**sizes, branches=st.integers(1, 2))
def test_commit_equals_model(
    backend: str, seed: int, slots: int, draft_length: int, latent: tuple[int, ...], branches: int
) -> None:
    a = make_commit(seed, slots, draft_length, latent, branches)
    want = model_commit(a)
    commit_drafts(**a, backend=backend)
    for name, value in a.items():
        assert value == want[name] if name == "num_steps" else torch.equal(value, want[name]), name


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 1])
def test_extension_equals_reference_on_unaligned_storage(dtype: torch.dtype, offset: int) -> None:
    for latent in [(1, 3, 5), (4, 4, 4)]:
        a = make_pack(1, 5, 4, latent, 2)
        a["states"] = offset_copy(a["states"].to(dtype), offset)
        packed = [pack_drafts(**a, null_label=10, backend=backend) for backend in ("reference", "extension")]
        assert all(torch.equal(one, other) for one, other in zip(*packed, strict=True))

        results = []
        for backend in ("reference", "extension"):
            b = make_commit(3, 7, 4, latent, 2)
            for name, value in b.items():
                if name != "num_steps" and value.is_floating_point():
                    # Features of another dtype than the latents are allowed.
                    own = torch.bfloat16 if name in ("features", "parent") else dtype
                    b[name] = offset_copy(value.to(own), offset)
            commit_drafts(**b, backend=backend)
            results.append(b)
        assert all(torch.equal(results[0][name], results[1][name]) for name in WRITTEN)


def test_not_a_number_is_copied_not_computed_with() -> None:
    a = make_pack(0, 3, 2, (1, 2, 2), 3)
    a["states"][:] = torch.nan
    x = pack_drafts(**a)[0]
    used = int(a["lengths"].sum())
    assert x[:used].isnan().all()
    assert torch.equal(x[used:], torch.zeros_like(x[used:]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": [5, 1]}, r"pack_drafts: lengths\[0\] must be in \[0, 4\], got 5"),
        ({"lengths": [2, -1]}, r"pack_drafts: lengths\[1\] must be in \[0, 4\], got -1"),
        ({"steps": [0, 6]}, r"pack_drafts: steps\[1\] must be in \[0, 5\] for a draft of 2 rows, got 6"),
        ({"steps": [-1, 0]}, r"pack_drafts: steps\[0\] must be in \[0, 4\]"),
        ({"num_rows": 4}, "pack_drafts: num_rows must be at least the sum of lengths, 5, got 4"),
    ],
)
def test_pack_refuses_values_out_of_range(backend: str, change: dict[str, Any], message: str) -> None:
    a = {**make_pack(0, 2, 4, (1, 2, 2), 0), "lengths": torch.tensor([3, 2]), "steps": torch.tensor([0, 0])}
    a["num_rows"] = 9
    a.update({name: torch.tensor(value) if isinstance(value, list) else value for name, value in change.items()})
    with pytest.raises(ValueError, match=f"^{message}"):
        pack_drafts(**a, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("committed", 5, r"committed\[1\] must be in \[0, 4\], got 5"),
        ("images", 99, r"images\[1\] must be in \[-1, "),
        ("steps", 7, r"steps\[1\] must be in \[0, 5\] to commit 2 steps, got 7"),
        ("row_offsets", 30, "row_offsets must "),
        ("queue", -1, "queue must be at least 0, got -1"),
    ],
)
def test_commit_refuses_values_out_of_range(backend: str, name: str, value: int, message: str) -> None:
    a = make_commit(0, 3, 4, (1, 2, 2), 1)
    a["images"], a["steps"], a["committed"] = torch.arange(3), torch.zeros(3, dtype=torch.int64), torch.full((3,), 2)
    a["row_offsets"] = torch.arange(4) * 2
    a["features"] = torch.randn(6, 3, 5)
    a[name][-1 if name == "queue" else 1] = value
    before = copy.deepcopy(a)
    with pytest.raises(ValueError, match=f"^commit_drafts: {message}"):
        commit_drafts(**a, backend=backend)
    assert all(torch.equal(a[written], before[written]) for written in WRITTEN)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("lengths", torch.zeros(3), TypeError, r"lengths must be int64 \[S\] = \[3\], got float32 \[3\]"),
        ("lengths", torch.zeros(2, dtype=torch.int64), ValueError, r"lengths must be int64 \[S\] = \[3\], got int64"),
        ("states", [1.0], TypeError, "states must be float32 or float16 or bfloat16 .* got list"),
        ("states", torch.zeros(3, 2), ValueError, r"states must be .*\[S, L, C, H, W\], got float32 \[3"),
        ("states", torch.zeros(2, 3, 1, 2, 2).mT.transpose(0, 1), ValueError, "contiguous"),
        ("labels", None, TypeError, r"labels must be int64 \[S\] = \[3\], got NoneType"),
        ("timesteps", torch.zeros(0, dtype=torch.int64), ValueError, "timesteps must be .* with K >= 1"),
        ("num_rows", 2.5, TypeError, r"num_rows must be an int in \[0, \d+\], got 2.5"),
        ("num_rows", -1, ValueError, r"num_rows must be an int in \[0, \d+\], got -1"),
        ("null_label", "none", TypeError, "null_label must be an int or None"),
    ],
)
def test_pack_refuses_wrong_arguments(
    backend: str, name: str, value: object, error: type[Exception], message: str
) -> None:
    a = make_pack(0, 3, 2, (1, 2, 2), 0)
    with pytest.raises(error, match=f"^pack_drafts: .*{message}"):
        pack_drafts(**{**a, name: value}, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_commit_refuses_wrong_arguments(backend: str) -> None:
    for name in (*WRITTEN, "committed", "next_states", "draft_states", "features", "row_offsets", "all_labels"):
        a = make_commit(0, 3, 4, (1, 2, 2), 2)
        a[name] = a[name].double()
        with pytest.raises(TypeError, match=rf"^commit_drafts: {name} must be .*, got float64"):
            commit_drafts(**a, backend=backend)
        a[name] = torch.zeros(97, dtype=make_commit(0, 3, 4, (1, 2, 2), 2)[name].dtype).view(1, 97)
        with pytest.raises(ValueError, match=r"^commit_drafts: \w+ must be .*, got "):
            commit_drafts(**a, backend=backend)


def test_backend_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    a = make_pack(0, 3, 2, (1, 2, 2), 0)
    with pytest.raises(ValueError, match=r"^pack_drafts: backend must be one of 'auto', 'reference', 'extension'"):
        pack_drafts(**a, backend="triton")
    monkeypatch.setattr(extension, "_kernels", {("pack_drafts", "cpu"): "it was not built"})
    with pytest.raises(RuntimeError, match=r"^pack_drafts: backend 'extension' cannot be used: it was not built"):
        pack_drafts(**a, backend="extension")
    assert torch.equal(pack_drafts(**a)[0], pack_drafts(**a, backend="reference")[0])


@needs_extension
@pytest.mark.parametrize("null_label", [None, 10])
def test_opcheck(null_label: int | None) -> None:
    op = torch.ops.free_kernels
    a = make_pack(2, 4, 3, (1, 3, 3), 1)
    torch.library.opcheck(op.pack_drafts.default, PackArguments(**a, null_label=null_label))
    torch.library.opcheck(op.commit_drafts.default, CommitArguments(**make_commit(2, 4, 3, (1, 3, 3), 2)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_traces_without_graph_breaks(backend: str) -> None:
    a, b = make_pack(2, 4, 3, (1, 2, 2), 1), make_commit(2, 4, 3, (1, 2, 2), 1)
    want = model_commit(b)
    pack = torch.compile(pack_drafts, fullgraph=True, backend="eager")
    commit = torch.compile(commit_drafts, fullgraph=True, backend="eager")
    packed = pack(**a, backend=backend)
    assert all(torch.equal(one, other) for one, other in zip(packed, pack_drafts(**a), strict=True))
    commit(**b, backend=backend)
    assert all(torch.equal(b[name], want[name]) for name in WRITTEN)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_equals_model(dtype: torch.dtype) -> None:
    for seed in range(20):
        for slots, latent in [(1, (4, 4, 4)), (7, (1, 3, 5)), (70, (4, 32, 32))]:
            a = make_pack(seed, slots, 6, latent, 3)
            a["states"] = a["states"].to(dtype)
            want = pack_drafts(**a, null_label=10, backend="reference")
            on_gpu = {name: value.cuda() if isinstance(value, Tensor) else value for name, value in a.items()}
            got = pack_drafts(**on_gpu, null_label=10, backend="extension")
            assert all(torch.equal(one.cpu(), other) for one, other in zip(got, want, strict=True))

            b = make_commit(seed, slots, 6, latent, 2)
            b = {n: v.to(dtype) if n != "num_steps" and v.is_floating_point() else v for n, v in b.items()}
            want_commit = model_commit(b)
            on_gpu = {name: value.cuda() if isinstance(value, Tensor) else value for name, value in b.items()}
            commit_drafts(**on_gpu, backend="extension")
            assert all(torch.equal(on_gpu[name].cpu(), want_commit[name]) for name in WRITTEN)
