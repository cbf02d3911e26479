"""``table_rows``: the rows that indexing gives, and errors for timesteps and labels that have none."""

from __future__ import annotations

import pytest
import torch
from test_drafting import BACKENDS, normals, on

from free_kernels.ops.tables import TableArguments, table_rows


def given(dtype: torch.dtype = torch.float32, width: int = 37) -> TableArguments:
    """Three timesteps, of the first seven, and two labels, of five."""
    of_timestep, of_label = torch.tensor([0, 0, 2, 0, 0, 4, 0]), torch.tensor([0, 0, 0, 1, 0])
    t, y = torch.tensor([2, 5, 0, 5]), torch.tensor([3, 3, 0, 1])
    return TableArguments(normals(6, 3, width, seed=0).to(dtype), of_timestep, of_label, t, y)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [37, 1024])
def test_rows(width, dtype, backend):
    a = given(dtype, width)
    found = table_rows(on(a, backend[1]), backend[0]).cpu()
    assert found.dtype == dtype
    assert torch.equal(found, a.rows[[3, 5, 0, 4]])


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend):
    a = on(given(), backend[1])
    assert table_rows(a._replace(t=a.t[:0], y=a.y[:0]), backend[0]).shape == (0, 3, 37)


@pytest.mark.parametrize("backend", BACKENDS[:2])
@pytest.mark.parametrize(("name", "value", "size"), [("t", 7, 7), ("t", -1, 7), ("y", 5, 5)])
def test_pairs_without_a_row(name, value, size, backend):
    a = given()
    getattr(a, name)[1] = value
    with pytest.raises((ValueError, RuntimeError), match=rf"table_rows: {name} must be in \[0, {size}\), got {value}"):
        table_rows(a, backend[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_wrong_arguments(backend):
    a = on(given(), backend[1])
    with pytest.raises(TypeError, match=r"^table_rows: t must be int64 \[R\]"):
        table_rows(a._replace(t=a.t.float()), backend[0])
    with pytest.raises(ValueError, match=r"^table_rows: y must be int64 \[R\] = \[4\]"):
        table_rows(a._replace(y=a.y[:2].contiguous()), backend[0])
    with pytest.raises(ValueError, match=r"^table_rows: rows must be a contiguous tensor"):
        table_rows(a._replace(rows=a.rows.transpose(1, 2)), backend[0])
