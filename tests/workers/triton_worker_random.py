"""Cases of the random ops for their Triton kernel, and their run in the interpreter.

``TRITON_INTERPRET=1 python triton_worker_random.py`` prints one line of JSON: what is wrong (nothing where all is
well), errors over eager's, and whether planted faults are found. The variable is read while Triton is imported, hence
a process of its own.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from unittest import mock

import torch
from rounding import largest_normal
from torch import Tensor

from free_kernels.ops.random import philox_normal, philox_uniform

SEEDS = (0, 2**32, 2**63 + 5, 2**64 - 1)
NUMELS = (0, 1, 3, 4, 63, 257)
KEYS = (
    torch.tensor([0, 1, 2**31, 2**32 - 1, -1]),
    torch.tensor([5, 0, 249, 2**32 - 1, -3]),
    torch.tensor([0, 1, 2, 1000, 2**24 - 1]),
)


def compare(seed: int, numel: int, with_rounds: bool, device: str = "cpu", fault: int = 0) -> list[str]:
    """What is wrong with one call of both ops; ``fault`` is added to the purpose that the kernel is given."""
    images, steps, rounds = (key.to(device) for key in KEYS)
    rounds = rounds if with_rounds else None
    wrong, name = [], f"seed {seed}, numel {numel}, {'rounds' if with_rounds else 'no rounds'}"
    for op in (philox_uniform, philox_normal):
        got = op(seed, images, steps, 254 + fault, numel, rounds, backend="triton")
        want = op(seed, images, steps, 254, numel, rounds, backend="reference")
        if got.shape != want.shape or got.dtype != want.dtype or not got.is_contiguous():
            wrong.append(f"{op.__name__}: {name}: {got.dtype} {list(got.shape)}")
        # Uniforms are the same bits; logarithms and sines of two libraries are not.
        elif not (torch.equal(got, want) if op is philox_uniform else torch.allclose(got, want, rtol=1e-6, atol=2e-6)):
            wrong.append(f"{op.__name__}: {name}: off by {float((got - want).abs().max()):.1e}")
    return wrong


def single_keys(device: str = "cpu") -> list[str]:
    """Keys with strides and in another order, and programs of every shape, give the same bits."""
    images, steps = torch.arange(24, device=device).view(2, 12)
    whole = philox_normal(7, images, steps, 1, 130, backend="triton")
    wrong = []
    if not torch.equal(philox_normal(7, images[1::3], steps[1::3], 1, 17, backend="triton"), whole[1::3, :17]):
        wrong.append("a number depends on more than its key")
    with mock.patch("free_kernels.ops.random.triton_launch._WANTED_PROGRAMS", 0):
        if not torch.equal(philox_normal(7, images, steps, 1, 130, backend="triton"), whole):
            wrong.append("a number depends on the size of a program")
    return wrong


def exact_normals(seed: int, images: Tensor, steps: Tensor, numel: int) -> Tensor:
    """Box-Muller in float64 of the float32 uniforms; ``numel`` is a multiple of 4."""
    u = philox_uniform(seed, images, steps, 1, numel, backend="reference").double()
    radius, angle = (-2 * u[:, 0::2].log()).sqrt(), 2 * math.pi * u[:, 1::2]
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1).flatten(1)


def precision(device: str = "cpu", planted: float = 0.0) -> tuple[float, float]:
    """Errors of normals against float64 over eager's: root mean square, and largest; ``planted`` is relative.

    Eager's largest error counts as no less than what as many normal errors of its size exceed once in a million.
    """
    images, steps = torch.arange(16, device=device).view(2, 8)
    exact = exact_normals(3, images, steps, 1024)
    errors = [
        (philox_normal(3, images, steps, 1, 1024, backend=name).double() * (1 + extra) - exact).abs()
        for name, extra in (("triton", planted), ("reference", 0.0))
    ]
    mean, largest = zip(*((float(e.square().mean().sqrt()), float(e.max())) for e in errors), strict=True)
    return mean[0] / mean[1], largest[0] / max(largest[1], mean[1] * largest_normal(exact.numel()))


def main() -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise SystemExit("triton_worker_random: set TRITON_INTERPRET=1")
    torch.set_num_threads(1)
    # Fills new tensors with NaN: an element that is never written shows.
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    found = [text for case in itertools.product(SEEDS, NUMELS, (False, True)) for text in compare(*case)]
    controls = {"purpose": bool(compare(1, 8, True, fault=1)), "rounding": precision(planted=2.0**-20)[0] > 2}
    print(json.dumps({"wrong": found + single_keys(), "precision": precision(), "controls": controls}))


if __name__ == "__main__":
    main()
