"""``drafter_network`` against its reference in float64, and against what the reference rounds."""

from __future__ import annotations

import math

import pytest
import torch
from test_drafting import needs_extension, normals
from torch import Tensor

from free_kernels import FeatureDrafter
from free_kernels.drafters import DrafterConfig
from free_kernels.ops.network import NetworkArguments, api, drafter_network
from free_kernels.ops.network.arguments import BLOCK_ROWS, LAST_ROWS

EPS = 1e-6
# Rows, tokens, width, heads, blocks: the bundled drafter; odd sizes below and above vectors; several blocks; one token;
# more tokens than our own products take.
SHAPES = [
    *((1, 16, 96, 3, 1), (4, 5, 30, 3, 2), (3, 19, 21, 7, 1), (2, 64, 32, 1, 3), (2, 1, 8, 8, 1), (2, 67, 48, 2, 1)),
    (9, 16, 24, 2, 1),
]
FEATURES, INPUTS = 13, 22


def given(
    rows: int, tokens: int, width: int, heads: int, blocks: int, *, skips: bool = True, turned: bool = False
) -> NetworkArguments:
    """Layers of unit gain; modulations about those of a trained drafter, a scale and a gate near 1."""
    seeds = iter(range(100))

    def layer(outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
        weight = normals(outputs, inputs, seed=next(seeds)) / math.sqrt(inputs)
        return weight.mT.contiguous().mT if turned else weight, normals(outputs, seed=next(seeds))

    weights = [layer(width, INPUTS)[0], normals(1, tokens, width, seed=next(seeds))]
    for _ in range(blocks):
        for outputs, inputs in ((3 * width, width), (width, width), (4 * width, width), (width, 4 * width)):
            weights += layer(outputs, inputs)
    weights += layer(FEATURES, width)
    count = BLOCK_ROWS * blocks + LAST_ROWS + skips
    modulations = 1 + normals(rows, count, width, seed=next(seeds)) / 2
    parts = normals(rows, tokens, FEATURES, seed=next(seeds)), normals(rows, tokens, INPUTS, seed=next(seeds))
    return NetworkArguments(*parts, modulations, weights, heads, EPS)


def wide(a: NetworkArguments) -> Tensor:
    """The reference in float64."""
    parts = (part.double() for part in a[:3])
    return api.reference.drafter_network(NetworkArguments(*parts, [w.double() for w in a.weights], a.heads, a.eps))


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).square().mean().sqrt())


@needs_extension
@pytest.mark.parametrize("turned", [False, True], ids=["", "columns"])
@pytest.mark.parametrize("skips", [False, True], ids=["", "skip"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_errors_are_at_most_twice_the_references(shape, skips, turned):
    a = given(*shape, skips=skips, turned=turned)
    wanted = wide(a)
    assert error(drafter_network(a, "extension"), wanted) <= 2 * error(drafter_network(a, "reference"), wanted)


@needs_extension
def test_weights_that_are_parts_of_one_vector():
    """As flattened parameters are; tokens and modulations that begin within a larger tensor."""
    a = given(4, 5, 30, 3, 2)
    vector = torch.cat([normals(1000, seed=5), *(weight.flatten() for weight in a.weights)])
    parts, first = [], 1000
    for weight in a.weights:
        parts.append(vector[first : first + weight.numel()].view(weight.shape))
        first += weight.numel()
    rows = (torch.cat([torch.zeros_like(part[:1]), part])[1:] for part in a[:3])
    found = drafter_network(NetworkArguments(*rows, parts, a.heads, a.eps), "extension")
    wanted = wide(a)
    # Vectors that begin elsewhere may be added in another order.
    assert error(found, wanted) <= 2 * error(drafter_network(a, "reference"), wanted)


def changed(a: NetworkArguments, part: str) -> NetworkArguments:
    """The same with one part of a call read wrongly."""
    weights = list(a.weights)
    if part in ("modulations", "tokens", "feature"):
        return a._replace(**{part: getattr(a, part).flip(0)})
    if part == "heads":
        return a._replace(heads=1)
    if part == "eps":
        return a._replace(eps=1e-4)
    at = int(part.removeprefix("bias "))
    weights[at] = weights[at] * (1 + 1e-4)
    return a._replace(weights=weights)


@pytest.mark.parametrize(
    "part", ["modulations", "tokens", "feature", "heads", "eps", *(f"bias {at}" for at in range(1, 20, 2))]
)
def test_a_part_read_wrongly_exceeds_the_bound(part):
    """The control: a bias is seen where it is off by 1e-4 of itself, eps where it is by 1e-4."""
    a = given(4, 5, 30, 3, 2)
    wanted = wide(a)
    assert error(drafter_network(changed(a, part), "reference"), wanted) > 4 * error(
        drafter_network(a, "reference"), wanted
    )


@needs_extension
def test_attention_of_one_key_alone_is_that_key():
    """Scores so far apart that all but the largest weight vanish, and none overflows."""
    a = given(3, 16, 96, 3, 1)
    weights = list(a.weights)
    weights[2] = weights[2] * 1e3
    a = a._replace(weights=weights)
    found = drafter_network(a, "extension")
    assert found.isfinite().all()
    assert error(found, wide(a)) <= 2 * error(drafter_network(a, "reference"), wide(a))


@needs_extension
def test_what_is_not_finite_stays_in_its_row():
    a = given(3, 16, 96, 3, 1)
    a.tokens[1, 3, 2] = math.nan
    assert drafter_network(a, "extension").isfinite().flatten(1).all(1).tolist() == [True, False, True]


@needs_extension
@pytest.mark.parametrize("rows", [1, 3])
def test_rows_do_not_depend_on_one_another(rows):
    """Within rounding: a matrix product may sum in another order where it has other rows."""
    a = given(8, 16, 96, 3, 1)
    part = NetworkArguments(*(x[:rows].contiguous() for x in a[:3]), *a[3:])
    wanted = wide(part)
    whole = drafter_network(a, "extension")[:rows]
    assert max(error(whole, wanted), error(drafter_network(part, "extension"), wanted)) <= 2 * error(
        drafter_network(part, "reference"), wanted
    )


@needs_extension
@pytest.mark.parametrize("rows", [1, 40])
def test_threads_change_rounding_only(rows):
    a, threads = given(rows, 16, 96, 3, 1), torch.get_num_threads()
    bound = 2 * error(drafter_network(a, "reference"), wide(a))
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert error(drafter_network(a, "extension"), wide(a)) <= bound
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", ["reference", pytest.param("extension", marks=needs_extension), "auto"])
@pytest.mark.parametrize(("rows", "tokens"), [(0, 4), (2, 4)])
def test_shapes(rows, tokens, backend):
    assert drafter_network(given(rows, tokens, 8, 2, 1), backend).shape == (rows, tokens, FEATURES)


def test_fakes_and_schemas():
    if api.OP.overload is not None:
        torch.library.opcheck(api.OP.overload, tuple(given(2, 4, 8, 2, 1)))


@pytest.mark.parametrize(
    ("shape", "dtype", "autocast", "compiled"),
    [
        ((2, 64, 32, 1, 1), torch.float32, False, True),
        ((2, 65, 32, 1, 1), torch.float32, False, False),
        ((8, 64, 32, 1, 1), torch.float32, False, True),
        ((9, 64, 32, 1, 1), torch.float32, False, False),
        ((2, 16, 32, 1, 1), torch.float32, True, False),
        ((2, 16, 32, 1, 1), torch.bfloat16, False, False),
    ],
)
def test_auto_takes_the_compiled_op_where_it_serves(monkeypatch, shape, dtype, autocast, compiled):
    a = given(*shape)
    a = NetworkArguments(*(part.to(dtype) for part in a[:3]), [w.to(dtype) for w in a.weights], a.heads, a.eps)
    calls = []
    monkeypatch.setattr(api, "OP", lambda given, *_: calls.append(given) or given.feature)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = drafter_network(a)
    assert len(calls) == compiled
    if not compiled:
        # Sixteen roundings in a row of a dtype of that spacing, of values of size 1 to 4.
        spacing = torch.finfo(torch.bfloat16 if autocast else dtype).eps
        assert error(found, wide(a)) <= 64 * spacing


@pytest.mark.parametrize(("window", "dtype"), [(1, torch.float32), (1, torch.float64), (3, torch.float32)])
def test_a_drafter_drafts_as_it_was_trained(window, dtype):
    """With gradients the network is its reference; without, whatever is fastest."""
    torch.manual_seed(0)
    drafter = FeatureDrafter((1, 8, 8), (16, 24), 10, DrafterConfig(width=32, head_dim=16, window=window)).to(dtype)
    for parameter in drafter.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    rows = normals(3, 16, 24, seed=0), normals(3, 1, 8, 8, seed=1), normals(3, 1, 8, 8, seed=2)
    rows = (*(row.to(dtype) for row in rows), torch.tensor([5, 600, 999]), torch.tensor([0, 3, 10]))
    trained = drafter(*rows)
    assert trained.requires_grad
    with torch.no_grad():
        drafted = drafter.hoisted(rows[3], rows[4])(*rows)
        wanted = drafter.double()(*(row.double() if row.is_floating_point() else row for row in rows))
    # Float64 has no wider oracle; that a float32 path was not taken shows at its spacing.
    bound = torch.finfo(torch.float32).eps / 1e3 if dtype == torch.float64 else 2 * error(trained.detach(), wanted)
    assert error(drafted, wanted) <= bound


@pytest.mark.parametrize("backend", ["reference", pytest.param("extension", marks=needs_extension)])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"feature": torch.zeros(2, 4)}, "feature must"),
        ({"feature": torch.zeros(2, 4, 12)}, r"weights\[10\] must be float32 \[D, W\]"),
        ({"feature": torch.zeros(2, 4, FEATURES, dtype=torch.float64)}, "feature must"),
        ({"tokens": torch.zeros(2, 5, INPUTS)}, "tokens must"),
        ({"tokens": torch.zeros(2, 4, 7)}, r"weights\[0\] must be float32 \[W, I\]"),
        ({"modulations": torch.zeros(2, 7, 8)}, r"modulations must be \[R, K, W\] with K 8 or 9"),
        ({"modulations": torch.zeros(3, 9, 8)}, "modulations must"),
        ({"heads": 3}, "heads must be a divisor of the width 8, got 3"),
        ({"heads": 0}, "heads must"),
        ({"eps": 0.0}, "eps must be above 0, got 0"),
        ({"weights": []}, "weights must be tensors, 4 and 8 for each block, got 0 of them"),
        ({"weights": [torch.zeros(1)] * 13}, "weights must be tensors, 4 and 8 for each block, got 13 of them"),
    ],
)
def test_wrong_arguments(change, message, backend):
    a = given(2, 4, 8, 2, 1)._replace(**change)
    with pytest.raises((ValueError, TypeError), match=f"^drafter_network: {message}"):
        drafter_network(a, backend)


@pytest.mark.parametrize("backend", ["reference", pytest.param("extension", marks=needs_extension)])
@pytest.mark.parametrize("at", range(12))
def test_a_weight_of_another_shape(at, backend):
    a = given(2, 4, 8, 2, 1)
    weights = list(a.weights)
    weights[at] = torch.zeros(*weights[at].shape[:-1], weights[at].shape[-1] + 1)
    with pytest.raises(ValueError, match=r"^drafter_network: weights\["):
        drafter_network(a._replace(weights=weights), backend)


def test_unknown_backend():
    with pytest.raises(ValueError, match="drafter_network: backend must"):
        drafter_network(given(2, 4, 8, 2, 1), "triton")
