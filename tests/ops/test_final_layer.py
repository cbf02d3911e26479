"""``final_layer`` against its reference in float64, and against what the reference rounds."""

from __future__ import annotations

import math

import pytest
import torch
from test_drafting import needs_extension, normals
from test_network import error
from torch import Tensor

from free_kernels.ops.final_layer import FinalLayerArguments, api, final_layer

BACKENDS = ["reference", pytest.param("extension", marks=needs_extension)]
# Rows, grid, patch, channels, width: the bundled digits; DiT-XL/2; odd and oblong; a single value; a policy.
SHAPES = [
    (1, (4, 4), (2, 2), 2, 64),
    (6, (8, 8), (2, 2), 8, 1152),
    (3, (3, 5), (2, 3), 3, 37),
    (2, (1, 1), (1, 1), 1, 1),
    (4, (7, 1), (1, 6), 1, 48),
]


def given(
    rows: int,
    grid: tuple[int, int],
    patch: tuple[int, int],
    channels: int,
    width: int,
    *,
    turned: bool = False,
    bias: bool = True,
) -> FinalLayerArguments:
    """A layer of unit gain; three timesteps, of the first seven, and two labels, of five."""
    values = math.prod(patch) * channels
    weight = normals(values, width, seed=0) / math.sqrt(width)
    table = 1 + normals(6, 2, 1, width, seed=1) / 2
    of_timestep, of_label = torch.tensor([0, 0, 2, 0, 0, 4, 0]), torch.tensor([0, 0, 0, 1, 0])
    t, y = torch.tensor([2, 5, 0])[torch.arange(rows) % 3], torch.tensor([3, 0])[torch.arange(rows) % 2]
    layer = weight.mT.contiguous().mT if turned else weight, normals(values, seed=2) if bias else None
    h = normals(rows, math.prod(grid), width, seed=3)
    return FinalLayerArguments(h, table, of_timestep, of_label, t, y, *layer, 1e-6, grid[0], *patch)


def wide(a: FinalLayerArguments) -> Tensor:
    """The reference in float64."""
    parts = {name: getattr(a, name).double() for name in ("h", "rows", "weight")}
    return api.reference.final_layer(a._replace(**parts, bias=None if a.bias is None else a.bias.double()))


@needs_extension
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("turned", [False, True], ids=["", "columns"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_errors_are_at_most_twice_the_references(shape, turned, bias):
    a = given(*shape, turned=turned, bias=bias)
    wanted, found = wide(a), final_layer(a, "extension")
    assert found.shape == wanted.shape
    assert found.is_contiguous()
    assert error(found, wanted) <= 2 * error(final_layer(a, "reference"), wanted)


@needs_extension
@pytest.mark.parametrize("turned", [False, True], ids=["", "columns"])
def test_layers_that_are_parts_of_one_vector(turned):
    """As flattened parameters are: before, in between and at its end."""
    a = given(3, (3, 5), (2, 3), 3, 37, turned=turned)
    vector = torch.cat([normals(1000, seed=5), a.weight.mT.flatten() if turned else a.weight.flatten(), a.bias])
    values, width = a.weight.shape
    weight = vector[1000 : 1000 + values * width].view(*((width, values) if turned else (values, width)))
    b = a._replace(weight=weight.mT if turned else weight, bias=vector[-values:])
    wanted = wide(a)
    # Vectors that begin elsewhere may be added in another order.
    assert error(final_layer(b, "extension"), wanted) <= 2 * error(final_layer(a, "reference"), wanted)


@pytest.mark.parametrize("part", ["h", "rows", "t", "y", "weight", "bias", "eps", "grid_rows", "patch_rows"])
def test_a_part_read_wrongly_exceeds_the_bound(part):
    """The control: a bias is seen where it is off by 1e-4 of itself, eps where it is by 1e-4."""
    a = given(4, (3, 5), (2, 3), 3, 37)
    wrong = {
        "bias": {"bias": a.bias * (1 + 1e-4)},
        "eps": {"eps": 1e-4},
        "grid_rows": {"grid_rows": 5},
        "patch_rows": {"patch_rows": 3, "patch_columns": 2},
    }.get(part) or {part: getattr(a, part).flip(0)}
    found, wanted = final_layer(a._replace(**wrong), "reference"), wide(a)
    assert error(found.reshape(wanted.shape), wanted) > 4 * error(final_layer(a, "reference"), wanted)


def test_a_patch_is_where_its_token_stands():
    """A token of ones lights its own patch, in its channels' order."""
    a = given(1, (3, 5), (2, 3), 2, 16)
    grid = torch.zeros(1, 15, 12)
    grid[0, 7] = torch.arange(12.0) + 1
    image = api.reference.unpatchify(grid, 3, 2, 3)
    assert image.shape == final_layer(a, "reference").shape == (1, 2, 6, 15)
    patch = image[0, :, 2:4, 6:9]
    assert torch.equal(patch.permute(1, 2, 0).flatten(), torch.arange(12.0) + 1)
    assert int((image != 0).sum()) == 12


@needs_extension
def test_what_is_not_finite_stays_in_its_row():
    a = given(3, (4, 4), (2, 2), 2, 64)
    a.h[1, 3, 2] = math.nan
    assert final_layer(a, "extension").isfinite().flatten(1).all(1).tolist() == [True, False, True]


@needs_extension
@pytest.mark.parametrize("rows", [1, 40])
def test_threads_change_rounding_only(rows):
    a, threads = given(rows, (8, 8), (2, 2), 8, 384), torch.get_num_threads()
    bound = 2 * error(final_layer(a, "reference"), wide(a))
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert error(final_layer(a, "extension"), wide(a)) <= bound
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_no_rows(backend):
    assert final_layer(given(0, (4, 4), (2, 2), 2, 8), backend).shape == (0, 2, 8, 8)


def test_fakes_and_schemas():
    if api.OP.overload is not None:
        torch.library.opcheck(api.OP.overload, tuple(given(3, (3, 5), (2, 3), 3, 37)))


@needs_extension
@pytest.mark.parametrize(("name", "value", "size"), [("t", 7, 7), ("t", -1, 7), ("y", 5, 5)])
def test_pairs_without_a_row(name, value, size):
    a = given(3, (4, 4), (2, 2), 2, 8)
    getattr(a, name)[1] = value
    with pytest.raises(ValueError, match=rf"^final_layer: {name} must be in \[0, {size}\), got {value}"):
        final_layer(a, "extension")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"h": torch.zeros(16, 8)}, "h must"),
        ({"h": torch.zeros(3, 16, 9)}, "rows must"),
        ({"h": torch.zeros(3, 16, 8, dtype=torch.float64)}, "h must"),
        ({"h": torch.zeros(2, 16, 8)}, "t must"),
        ({"rows": torch.zeros(6, 3, 1, 8)}, "rows must"),
        ({"row_of_timestep": torch.zeros(7)}, "row_of_timestep must"),
        ({"t": torch.zeros(3)}, "t must"),
        ({"y": torch.zeros(2, dtype=torch.int64)}, "y must"),
        ({"weight": torch.zeros(8)}, "weight must"),
        ({"weight": torch.zeros(8, 7)}, "weight must"),
        ({"weight": torch.zeros(0, 8), "bias": None}, "weight must"),
        ({"h": torch.zeros(3, 0, 8), "grid_rows": 2**62}, "h must"),
        ({"bias": torch.zeros(7)}, "bias must"),
        ({"eps": 0.0}, "eps must be above 0, got 0"),
        ({"grid_rows": 3}, "grid_rows must be a divisor of 16 tokens, got 3"),
        ({"patch_rows": 0}, "patch_rows must"),
        ({"patch_columns": 3}, "patch_columns must be such that patches divide 8 values, got 3"),
        ({"patch_rows": 2**32, "patch_columns": 2**32}, "patch_columns must be such that patches divide 8 values"),
    ],
)
def test_wrong_arguments(change, message, backend):
    a = given(3, (4, 4), (2, 2), 2, 8)._replace(**change)
    with pytest.raises((ValueError, TypeError), match=f"^final_layer: {message}"):
        final_layer(a, backend)


def test_unknown_backend():
    with pytest.raises(ValueError, match="final_layer: backend must"):
        final_layer(given(1, (4, 4), (2, 2), 2, 8), "triton")
