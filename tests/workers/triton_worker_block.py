"""Run by test_triton_block.py: the parts of ``free_kernels.ops.coupling.triton_block`` against SciPy and the reference.

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

from free_kernels.ops.coupling import reference_block as reference
from free_kernels.ops.coupling.triton_block import decide_jointly, draw_residual, mass_beyond, upper_tail

# Rows of a slot, and slots; a GPU's scans go over several warps from 64 rows on.
SIZES = ((2, 50), (8, 400), (64, 40), (256, 20))
LARGEST_USUAL_GAP = 20.0


@triton.jit
def tail_kernel(p_t, p_out, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_out + o, upper_tail(tl.load(p_t + o)))


@triton.jit
def draw_kernel(p_a, p_delta, p_low, p_uniform, p_out):
    i = tl.program_id(0)
    a, delta, low = tl.load(p_a + i), tl.load(p_delta + i), tl.load(p_low + i)
    level = tl.load(p_uniform + i) * mass_beyond(a, delta, low)
    tl.store(p_out + i, draw_residual(a, delta, low, level))


@triton.jit
def decide_kernel(p_gap_sq, p_along, p_uniform, p_tested, p_stop, p_residual, p_ahead, LENGTH: tl.constexpr):
    o_l = tl.arange(0, LENGTH)
    o = tl.program_id(0) * LENGTH + o_l
    b_gap_sq, b_along, b_uniform = tl.load(p_gap_sq + o), tl.load(p_along + o), tl.load(p_uniform + o)
    tested = tl.load(p_tested + o) != 0
    stop, residual, ahead = decide_jointly(b_gap_sq, b_along, b_uniform, tested, o_l, LENGTH)
    tl.store(p_stop + tl.program_id(0), stop)
    tl.store(p_residual + tl.program_id(0), residual.to(tl.int32))
    tl.store(p_ahead + tl.program_id(0), ahead)


def tail_errors(count: int, device: str = "cpu", planted: float = 0.0) -> dict[str, float]:
    """Largest error of the upper tail at ``count`` places: relative above 0, by its conditioning, absolute below.

    ``planted`` is a relative error of what the kernel gives.
    """
    wide = {"dtype": torch.float64, "device": device}
    t = torch.cat([torch.linspace(-12, 26, count, **wide), torch.logspace(-300, 300, 128, **wide)])
    got = torch.empty_like(t)
    tail_kernel[(len(t) // 64,)](t, got, BLOCK=64)
    t, got = t.cpu(), got.cpu() * (1 + planted)
    exact = torch.from_numpy(scipy.special.ndtr(-t.numpy()))
    # Smaller ones are not normal numbers any more.
    known = (t >= 0) & (exact > 1e-300)
    relative = ((got - exact) / exact / (1 + t.square() / 2))[known].abs().max()
    beyond = got[t > 40].abs().max()
    return {"above": float(relative), "below": float((got - exact)[t < 0].abs().max()), "beyond": float(beyond)}


def draw_error(device: str = "cpu") -> float:
    """Largest error of a residual's draw, in deviations, over weights, gaps and uniforms of every size."""
    numbers = ([1.0, 0.5, 1e-6], [1e-3, 1.0, 12.0, 30.0, 1e3, 1e7], [1.0, 0.5, 1e-3, 2.0**-33])
    a, delta, uniform = torch.cartesian_prod(*(torch.tensor(x, dtype=torch.float64) for x in numbers)).unbind(1)
    low = reference.lower_end(a.log(), delta)
    # A residual that hardly has any mass is never drawn from.
    known = reference.mass_beyond(a, delta, low) > 1e-12
    a, delta, uniform, low = (x[known] for x in (a, delta, uniform, low))
    got = torch.empty_like(a).to(device)
    draw_kernel[(len(a),)](*(x.contiguous().to(device) for x in (a, delta, low, uniform)), got)
    return float((got.cpu() - reference.draw_residual(a.log(), delta, uniform)).abs().max())


def rounds(length: int, slots: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Squared gaps, noise along, uniforms and which rows are tested, of slots with drafts from perfect to hopeless.

    The longer a round, the smaller its gaps, so that stops lie at all depths.
    """
    g = torch.Generator().manual_seed(8)
    delta = 10 ** (torch.rand(slots, length, generator=g) * 4.5 - 3.5) * (8 / length) ** 0.5
    z = torch.randn(slots, length, generator=g)
    # A third of the slots meets drafts that are unlikelier than any by chance, or likelier.
    z[::3] *= 4
    tested = torch.rand(slots, length, generator=g) < 1 - 0.8 / length
    uniform = 1 - torch.rand(slots, length, generator=g)
    uniform[1::3] **= 6
    gap_sq, along = delta.square(), delta * z
    if length >= 8:
        # A draft that is surely not the target's after one that hardly is; perfect drafts, to the end and to a refusal.
        gap_sq[0, :2], along[0, :2], uniform[0, 1] = torch.tensor([4.0, 1e28]), torch.tensor([0.0, -1e14]), 0.5
        gap_sq[3], along[3] = 0.0, 0.0
        gap_sq[6, :4], along[6, :4], along[6, 4] = 0.0, 0.0, -10 * delta[6, 4]
        tested[[0, 3, 6]] = True
        # Stops at huge gaps.
        for slot, size in ((9, 30.0), (10, 1e3), (12, 1e7), (13, 1e15)):
            gap_sq[slot, 0], along[slot, 0] = size**2, size * z[slot, 0]
    tested[:, -1] = False
    return gap_sq, along, uniform, tested


def decided(length: int, slots: int, device: str = "cpu") -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """:func:`rounds`, and the kernel's stops, which of them draw from a residual, and where they lie."""
    given = rounds(length, slots)
    got = [torch.empty(slots, dtype=dtype, device=device) for dtype in (torch.int32, torch.int32, torch.float32)]
    *numbers, tested = (x.to(device) for x in given)
    decide_kernel[(slots,)](*numbers, tested.to(torch.int8), *got, LENGTH=length)
    return given, [x.cpu() for x in got]


def decision_errors(given: tuple[Tensor, ...], got: list[Tensor], planted: float = 0.0) -> dict[str, float]:
    """Slots decided otherwise, and how far residuals are off, in deviations or relative to where they lie.

    The usual ones, of gaps that are not planted, also in deviations alone.

    ``given`` and ``got`` are of :func:`decided`; ``planted`` is a relative error of the gaps that the reference has.
    """
    gap_sq, along, uniform, tested = given
    other_gaps = gap_sq * (1 + planted)
    stop, residual, ahead = reference.decide(other_gaps[:, :-1], along[:, :-1], uniform, tested[:, :-1])
    others = (got[0] != stop) | (got[1].bool() != residual)
    delta = gap_sq.double().sqrt()[torch.arange(len(stop)), stop]
    off = ((got[2].double() - ahead) * delta).abs()
    relative, alike = off / (1 + (ahead * delta).abs()), residual & ~others
    return {
        "otherwise": int(others.sum()),
        "residuals": int(residual.sum()),
        "direct": int((~residual & (stop > 0)).sum()),
        "deepest": int(stop.max()),
        "off": float(relative[alike].max()),
        "off_usual": float(off[alike & (delta <= LARGEST_USUAL_GAP)].max()),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = {"tail": tail_errors(1920), "fine_tail": tail_errors(3968), "draw": draw_error()}
    found["wrong_tail"] = tail_errors(1920, planted=5e-15)
    for length, slots in SIZES:
        outcome = decided(length, slots)
        found[f"decisions-{length}"] = decision_errors(*outcome)
        if length == 8:
            found["control"] = decision_errors(*outcome, planted=1e-4)
    print(json.dumps(found))
