"""What ``torch.compile`` is told about a function, without the start of the compiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Function = TypeVar("Function", bound=Callable[..., object])


def assume_constant_result(function: Function) -> Function:
    """``torch.compiler.assume_constant_result``: a trace takes what the function returns and does not look inside.

    PyTorch's own imports ``torch._dynamo`` to set this attribute, which takes longer than importing torch (2.13); here
    nothing is imported before something is compiled. A test compares the two.
    """
    function._dynamo_marked_constant = True
    return function
