"""``adaptive_norm`` against a plain float64 formula, and against what the reference rounds."""

from __future__ import annotations

import math

import pytest
import torch
from test_drafting import BACKENDS, EXTENSION, INTERPRETED, normals, on
from torch import Tensor

from free_kernels.ops.norms import NormArguments, adaptive_norm, api

EPS = 1e-6
# Below, at and above a vector, a block of the sums and the largest block of a program.
WIDTHS = (1, 5, 8, 96, 1029, 4101)
KINDS = {
    "bare": (-1, -1, False),
    "update": (-1, -1, True),
    "gated": (2, -1, True),
    "gated with skip": (4, 0, True),
}


def given(
    kind: str,
    width: int,
    dtype: torch.dtype = torch.float32,
    *,
    rows: int = 3,
    tokens: int = 2,
    shared: bool = False,
    modulated: torch.dtype | None = None,
) -> NormArguments:
    gate_at, gain_at, updated = KINDS[kind]
    return NormArguments(
        # An offset and a size of its own for every token.
        (normals(rows, tokens, width, seed=0) * torch.tensor([0.3, 20.0])[:tokens, None] + 3.0).to(dtype),
        normals(1 if shared else rows, tokens, width, seed=1).to(dtype) if updated else None,
        normals(rows, 5, width, seed=2).to(modulated or dtype),
        normals(rows, tokens, width, seed=3).to(dtype) if gain_at >= 0 else None,
        *(gate_at, 1, 3, gain_at, EPS),
    )


def formula(a: NormArguments) -> tuple[Tensor, Tensor]:
    """The same in float64, a token at a time."""
    sums, results = torch.empty(a.x.shape, dtype=torch.float64), torch.empty(a.x.shape, dtype=torch.float64)
    for row in range(a.x.shape[0]):
        modulations = a.modulations[row].double()
        for token in range(a.x.shape[1]):
            x = a.x[row, token].double()
            if a.update is not None:
                update = a.update[0 if len(a.update) == 1 else row, token].double()
                x = x + (update if a.gate_at < 0 else modulations[a.gate_at] * update)
            size = math.sqrt(float((x - x.mean()).square().mean()) + a.eps)
            y = modulations[a.shift_at] + modulations[a.scale_at] * (x - x.mean()) / size
            if a.gain_at >= 0:
                y = y + modulations[a.gain_at] * a.skip[row, token].double()
            sums[row, token], results[row, token] = x, y
    return sums, results


def errors(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> list[float]:
    return [float((got.cpu().double() - want).abs().max()) for got, want in zip(found, wanted, strict=True)]


def rounding(a: NormArguments) -> list[float]:
    """How far a correct computation in a dtype may be off, by its spacing.

    The sum: a product and a sum are rounded, half a spacing of each. A normalised value, which is sqrt(D) at most: the
    sum's error and those of mean and centring (each at most a spacing of the largest value, the mean's for sums of up
    to 2^12 terms in lanes or trees) over the size of what is normalised, once in the value itself and once, times
    the value, in that size; a spacing each of the product with the inverse and of the root. Then three products and two
    sums.
    """
    spacing = torch.finfo(a.x.dtype).eps
    sums = formula(a)[0]
    update = 0.0 if a.update is None else float(a.update.abs().max())
    modulation = float(a.modulations.abs().max())
    largest = float(a.x.abs().max()) + max(1.0, modulation) * update
    size = (sums.var(-1, unbiased=False) + a.eps).sqrt()
    normalised = float(((sums - sums.mean(-1, keepdim=True)) / size[..., None]).abs().max())
    value = 3 * spacing * largest / float(size.min()) * (1 + normalised) + 2 * spacing * normalised
    skipped = 0.0 if a.skip is None else modulation * float(a.skip.abs().max())
    terms = modulation * (1 + normalised) + skipped
    return [spacing * largest, modulation * value + 2 * spacing * terms]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shared", [False, True], ids=["", "one update"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", WIDTHS)
def test_it_is_that_of_the_formula(width, kind, shared, backend):
    a = given(kind, width, shared=shared)
    found = adaptive_norm(on(a, backend[1]), backend[0])
    for error, bound in zip(errors(found, formula(a)), rounding(a), strict=True):
        assert error <= bound
    assert all(part.dtype == a.x.dtype and part.shape == a.x.shape for part in found)


@pytest.mark.parametrize(
    "wrong",
    [{"gate_at": 3}, {"shift_at": 3}, {"scale_at": 1}, {"gain_at": 2}, {"eps": 0.1}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_another_modulation_exceeds_the_bound(wrong):
    """The control: what is added to a variance of .09 is seen, too."""
    a = given("gated with skip", 96)
    found = adaptive_norm(a._replace(**wrong), "reference")
    assert errors(found, formula(a))[1] > 10 * rounding(a)[1]


def root_mean_squares(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> list[float]:
    return [float((got.cpu().double() - want).square().mean().sqrt()) for got, want in zip(found, wanted, strict=True)]


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("modulated", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [5, 96, 1029])
def test_errors_are_at_most_twice_the_references(width, kind, dtype, modulated, backend):
    """Of 40 tokens together: a token's error is mostly that of its mean, half a spacing of float32 or luck."""
    a = given(kind, width, dtype, modulated=modulated, rows=20)
    wanted = formula(a)
    mine = root_mean_squares(adaptive_norm(on(a, backend[1]), backend[0]), wanted)
    theirs = root_mean_squares(adaptive_norm(a, "reference"), wanted)
    # Triton's interpreter cuts bfloat16 off, which has twice the error of rounding.
    times = 4 if INTERPRETED and dtype == torch.bfloat16 else 2
    assert all(error <= times * other for error, other in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("rows", "tokens"), [(0, 2), (2, 0)])
def test_nothing_is_nothing(rows, tokens, backend):
    a = given("gated with skip", 8, rows=rows, tokens=tokens)
    for part in adaptive_norm(on(a, backend[1]), backend[0]):
        assert part.shape == (rows, tokens, 8)


@pytest.mark.parametrize("backend", [EXTENSION])
def test_threads_do_not_change_a_bit(backend):
    a, threads = given("gated with skip", 1029, rows=40), torch.get_num_threads()
    found = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(adaptive_norm(a, backend[0]))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_finite_stays_in_its_token(backend):
    a = given("gated", 96)
    a.x[1, 0, 7] = math.nan
    for part in adaptive_norm(on(a, backend[1]), backend[0]):
        finite = part.cpu().isfinite().all(-1)
        assert not finite[1, 0]
        assert int(finite.sum()) == finite.numel() - 1


def test_the_reference_has_gradients():
    a = given("gated with skip", 5)
    wide = NormArguments(*(part.double().requires_grad_() if isinstance(part, Tensor) else part for part in a))
    inputs = wide.x, wide.update, wide.modulations, wide.skip
    assert torch.autograd.gradcheck(
        lambda x, update, modulations, skip: api.reference.adaptive_norm(
            wide._replace(x=x, update=update, modulations=modulations, skip=skip)
        ),
        inputs,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_fakes_and_schemas(kind):
    a = given(kind, 8)
    for op in (api.OP.triton, api.OP.compiled):
        if op.overload is not None:
            torch.library.opcheck(op.overload, tuple(a))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 8)}, "x must"),
        ({"update": torch.zeros(2, 2, 8)}, "update must"),
        ({"update": None}, "update must be given where gate_at is a place"),
        ({"modulations": torch.zeros(3, 5, 7)}, "modulations must"),
        ({"modulations": torch.zeros(3, 8, 5).transpose(1, 2)}, "modulations must"),
        ({"skip": None}, "skip must be given exactly where gain_at is a place"),
        ({"skip": torch.zeros(3, 2, 8, dtype=torch.float16)}, "skip must"),
        ({"gate_at": 5}, r"gate_at must be in \[-1, 5\), got 5"),
        ({"gain_at": -2}, r"gain_at must be in \[-1, 5\), got -2"),
        ({"shift_at": -1}, r"shift_at must be in \[0, 5\), got -1"),
        ({"scale_at": 5}, r"scale_at must be in \[0, 5\), got 5"),
        ({"eps": 0.0}, "eps must be above 0, got 0"),
    ],
)
def test_wrong_arguments(change, message, backend):
    a = on(given("gated with skip", 8)._replace(**change), backend[1])
    with pytest.raises((ValueError, TypeError), match=f"^adaptive_norm: {message}"):
        adaptive_norm(a, backend[0])
