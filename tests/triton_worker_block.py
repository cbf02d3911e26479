"""Run by test_triton_block.py: the parts of ``free_kernels.triton.block_math`` against SciPy and the reference.

``TRITON_INTERPRET=1 python triton_worker_block.py`` prints one line of JSON with the largest errors. On a GPU the
functions are called with ``device="cuda"``.
"""

from __future__ import annotations

import json

import scipy.special
import torch
import triton
import triton.language as tl
from torch import Tensor

from free_kernels.reference import block as reference
from free_kernels.triton.block_math import decide_jointly, upper_tail

LENGTH, SLOTS = 8, 400


@triton.jit
def tail_kernel(p_t, p_out, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_out + o, upper_tail(tl.load(p_t + o)))


@triton.jit
def decide_kernel(p_gap_sq, p_along, p_uniform, p_tested, p_stop, p_residual, p_ahead, LENGTH: tl.constexpr):
    o_l = tl.arange(0, LENGTH)
    o = tl.program_id(0) * LENGTH + o_l
    b_numbers = tl.load(p_gap_sq + o), tl.load(p_along + o), tl.load(p_uniform + o)
    stop, residual, ahead = decide_jointly(
        b_numbers[0], b_numbers[1], b_numbers[2], tl.load(p_tested + o) != 0, o_l, LENGTH
    )
    tl.store(p_stop + tl.program_id(0), stop)
    tl.store(p_residual + tl.program_id(0), residual.to(tl.int32))
    tl.store(p_ahead + tl.program_id(0), ahead)


def tail_errors(device: str = "cpu") -> dict[str, float]:
    """Largest error of the upper tail: relative to it above 0, by its conditioning, absolute below."""
    wide = {"dtype": torch.float64, "device": device}
    t = torch.cat([torch.linspace(-12, 26, 1920, **wide), torch.logspace(-300, 300, 128, **wide)])
    got = torch.empty_like(t)
    tail_kernel[(len(t) // 64,)](t, got, BLOCK=64)
    t, got = t.cpu(), got.cpu()
    exact = torch.from_numpy(scipy.special.ndtr(-t.numpy()))
    # Below, numbers are not normal any more.
    known = (t >= 0) & (exact > 1e-300)
    relative = ((got - exact) / exact / (1 + t.square() / 2))[known].abs().max()
    assert bool((got[t > 40] == 0).all())
    return {"above": float(relative), "below": float((got - exact)[t < 0].abs().max())}


def rounds() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Squared gaps, noise along, uniforms and which rows are tested, of slots with drafts from perfect to hopeless."""
    g = torch.Generator().manual_seed(8)
    delta = 10 ** (torch.rand(SLOTS, LENGTH, generator=g) * 4.5 - 3.5)
    z = torch.randn(SLOTS, LENGTH, generator=g)
    # A third of the slots meets drafts that are unlikelier than any by chance, or likelier.
    z[::3] *= 4
    tested = torch.rand(SLOTS, LENGTH, generator=g) < 0.9
    tested[:, -1] = False
    uniform = 1 - torch.rand(SLOTS, LENGTH, generator=g)
    uniform[1::3] **= 6
    return delta.square(), delta * z, uniform, tested


def expected(gap_sq: Tensor, along: Tensor, uniform: Tensor, tested: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Stop, whether in a residual, and how many leads ahead, by the reference's functions."""
    direct = (~tested).cumsum(1) > 0
    along, delta = along.double(), gap_sq.double().sqrt().masked_fill(direct, 1.0)
    score = (along - gap_sq.double() / 2).masked_fill(direct, -torch.inf)
    log_weight = reference.log_weights(score[:, :-1])
    bounded = log_weight.clamp(min=reference.LOWEST_LOG_WEIGHT)
    mass = torch.where(direct, log_weight.exp(), reference.residual_mass(bounded, delta))
    threshold = torch.where(log_weight == 0, 1.0, mass / (mass - log_weight.expm1()))
    stop = torch.where(uniform <= threshold, torch.arange(LENGTH), 0).amax(1)
    rows = torch.arange(len(stop))
    at = delta[rows, stop]
    drawn = reference.draw_residual(bounded[rows, stop], at, uniform[:, 0].double())
    return stop, ~direct[rows, stop], (drawn - along[rows, stop] / at) / at


def decision_errors(device: str = "cpu", planted: float = 0.0) -> dict[str, float]:
    """Slots decided otherwise, and how far residuals are off, in deviations.

    ``planted`` is a relative error of the gaps that the reference is given.
    """
    arguments = rounds()
    stop, residual, ahead = expected(arguments[0] * (1 + planted), *arguments[1:])
    got = [torch.empty(SLOTS, dtype=dtype, device=device) for dtype in (torch.int32, torch.int32, torch.float32)]
    gap_sq, along, uniform, tested = (x.to(device) for x in arguments)
    decide_kernel[(SLOTS,)](gap_sq, along, uniform, tested.to(torch.int8), *got, LENGTH=LENGTH)
    others = (got[0].cpu() != stop) | (got[1].cpu().bool() != residual)
    delta = arguments[0].sqrt().double()[torch.arange(SLOTS), stop]
    off = ((got[2].cpu().double() - ahead) * delta)[residual & ~others].abs()
    return {
        "otherwise": int(others.sum()),
        "residuals": int(residual.sum()),
        "direct": int((~residual & (stop > 0)).sum()),
        "off": float(off.max()),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = {"tail": tail_errors(), "decisions": decision_errors(), "control": decision_errors(planted=1e-4)}
    print(json.dumps(found))
