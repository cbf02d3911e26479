"""``drafter_tokens`` against plain float64 formulas, element by element."""

from __future__ import annotations

import math

import pytest
import torch
from test_drafting import BACKENDS, normals, on

from free_kernels.ops.tokens import TokenArguments, drafter_tokens

ROWS, CHANNELS, HEIGHT, ACROSS, WIDTH, UNIT = 3, 2, 4, 6, 5, 10
PLACES = {"state": (0, -1, -1), "all": (0, 1, 2), "in another order": (2, 0, 1), "changes": (-1, 1, 0)}


def given(places: tuple[int, int, int], patch: tuple[int, int], dtype: torch.dtype = torch.float32) -> TokenArguments:
    latent = CHANNELS, HEIGHT, ACROSS
    tokens = HEIGHT * ACROSS // math.prod(patch)
    state = normals(ROWS, *latent, seed=0)
    previous = state + 0.1 * normals(ROWS, *latent, seed=1)
    # A row that does not change.
    previous[1] = state[1]
    return TokenArguments(
        normals(ROWS, tokens, WIDTH, seed=2).to(dtype),
        previous,
        state,
        torch.tensor([0, 39, 12]),
        normals(4, seed=3).abs() + 0.1 if places[2] >= 0 else None,
        UNIT,
        *patch,
        *places,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("patch", [(1, 1), (2, 2), (1, 6), (4, 3)])
@pytest.mark.parametrize("case", PLACES)
def test_tokens_are_those_of_the_formulas(case, patch, dtype, backend):
    a = given(PLACES[case], patch, dtype)
    found = drafter_tokens(on(a, backend[1]), backend[0]).cpu().double()
    state, change = a.state.double(), (a.state - a.previous).double()
    parts = sum(place >= 0 for place in PLACES[case])
    assert found.shape == (*a.feature.shape[:2], WIDTH + parts * CHANNELS * math.prod(patch))
    assert torch.equal(found[..., :WIDTH], a.feature.double())
    for row in range(ROWS):
        size = math.sqrt(float(change[row].square().mean()) + 1e-12)
        values = [state[row], change[row] / size]
        if a.change_rms is not None:
            values.append(change[row] / float(a.change_rms[int(a.t[row]) // UNIT]))
        for value, place in zip(values, PLACES[case], strict=False):
            if place < 0:
                continue
            for token in range(a.feature.shape[1]):
                down, across = patch
                top, left = token // (ACROSS // across) * down, token % (ACROSS // across) * across
                want = value[:, top : top + down, left : left + across].flatten()
                first = WIDTH + place * len(want)
                # A difference, a quotient or root and a rounding to the dtype; Triton's interpreter cuts bfloat16 off.
                torch.testing.assert_close(
                    found[row, token, first : first + len(want)], want, rtol=2 * torch.finfo(dtype).eps, atol=1e-6
                )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"previous": torch.zeros(ROWS, 1, 4, 6)}, r"previous must be float32 \[R, C, H, W\]"),
        (
            {"patch_height": 3},
            r"patch_height and patch_width must be such that .* 4 x 6 states in 24 tokens, got \(3, 1\)",
        ),
        ({"time_unit": 0}, "time_unit must be at least 1"),
        ({"unit_at": 0}, "state_at, unit_at and scaled_at must be the places"),
        ({"change_rms": None}, "change_rms must be given exactly"),
        ({"t": torch.zeros(ROWS)}, r"t must be int64 \[R\]"),
    ],
)
def test_wrong_arguments(change, message, backend):
    a = on(given(PLACES["all"], (1, 1))._replace(**change), backend[1])
    with pytest.raises((ValueError, TypeError), match=f"^drafter_tokens: {message}"):
        drafter_tokens(a, backend[0])


@pytest.mark.parametrize("backend", BACKENDS[:2])
@pytest.mark.parametrize("t", [-1, 40])
def test_timesteps_beyond_the_scales(t, backend):
    a = given(PLACES["all"], (1, 1))
    a.t[1] = t
    with pytest.raises((ValueError, RuntimeError), match=rf"drafter_tokens: t must be in \[0, 40\), got {t}"):
        drafter_tokens(a, backend[0])
