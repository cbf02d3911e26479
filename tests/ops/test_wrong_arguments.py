"""Every public op names the argument that is of a wrong kind."""

from __future__ import annotations

import inspect
import re
from typing import Any

import numpy as np
import pytest
import torch
from public_ops import CASES

WRONG = {
    "None": None,
    "a list": [1.0],
    "an array": np.zeros(3, dtype=np.float32),
    "a string": "x",
    "a truth": True,
    "a complex tensor": torch.zeros(3, dtype=torch.complex64),
    "a tensor of no dimension": torch.tensor(1.0),
}
# What these stand for in an argument that they fit.
FITTING = {("couple_philox", "rounds", "None")}


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_kind_is_named(name: str):
    op, make = CASES[name]
    parameters = inspect.signature(op).parameters
    for argument in parameters:
        for kind, value in WRONG.items():
            given, names = make(3)
            bound = inspect.signature(op).bind(*given, **names)
            if argument not in bound.arguments or (op.__name__, argument, kind) in FITTING:
                continue
            if value is bound.arguments[argument] is None:
                continue
            bound.arguments[argument] = value
            # Of a ring, which is whole or not there, any part may be named.
            part = "cache_" if argument.startswith("cache_") else argument
            with pytest.raises((TypeError, ValueError), match=f"^{op.__name__}: .*{part}") as error:
                op(*bound.args, **bound.kwargs)
            assert error.type in (TypeError, ValueError)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", [name for name in CASES if name.startswith(("couple", "gaussian"))])
def test_a_guidance_scale_is_finite(name: str, value: float):
    _check_setting(name, "guidance_scale", value)


# A clip beyond float32 would be an infinity there, and clip nothing.
@pytest.mark.parametrize("value", [float("nan"), 0.0, -1.0, 1e39])
@pytest.mark.parametrize("name", [name for name in CASES if name.startswith(("couple", "gaussian"))])
def test_a_clip_is_positive(name: str, value: float):
    _check_setting(name, "clip", value)


def _check_setting(name: str, setting: str, value: Any) -> None:
    op, make = CASES[name]
    given, names = make(3)
    with pytest.raises(ValueError, match=f"^{op.__name__}: {setting} must be a .*, got {re.escape(str(value))}"):
        op(*given, **names | {setting: value})
