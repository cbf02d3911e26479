"""Cases of ``couple`` and ``couple_block`` for their Triton kernels, and their run in the interpreter.

``TRITON_INTERPRET=1 python triton_worker_coupling.py`` prints one line of JSON: by case a list of what is wrong (empty
where all is well). The variable is read while Triton is imported, hence a process of its own.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from coupling_calls import call
from rounding import largest_normal
from torch import Tensor

from free_kernels.constants import Purpose
from free_kernels.ops.coupling import couple, couple_block, couple_block_philox, couple_philox, reference
from free_kernels.ops.coupling import reference_block as block
from free_kernels.ops.coupling.arguments import Coupling, CouplingArguments, KeyedCouplingArguments
from free_kernels.ops.random import philox_normal, philox_uniform

PADDING_ROWS = 2
PHILOX_SEEDS = (0, 1, 2**40 + 16, 2**64 - 1)
TOLERANCE = 2e-4


@dataclass(frozen=True)
class Case:
    """One round; ``gap`` is the distance of each draft's mean from the target's, in deviations."""

    name: str
    lengths: tuple[int, ...] = (3, 0, 4, 1)
    latent: tuple[int, int, int] = (3, 3, 5)
    learned: bool = False
    guidance: tuple[float, int] | None = None
    clip: float = math.inf
    relaxed: bool = False
    gap: float = 1.0
    # Relative spread of the draft's deviation around the target's.
    spread: float = 0.003
    output: torch.dtype = torch.float32
    # Elements of a program, and blocks that a program of the row pass goes through; None leaves it to the kernels.
    division: tuple[int, int] | None = None
    special: str = ""
    # Whether the keys of the noise have rounds.
    rounds: bool = False
    seed: int = 0

    @property
    def longest(self) -> int:
        return max(self.lengths)


_FULL = {"learned": True, "guidance": (4.0, 2), "clip": 1.0, "relaxed": True, "rounds": True}
CASES = [
    Case("fixed", gap=0.5),
    Case("fixed-far-apart", gap=4.0),
    Case("fixed-guided", guidance=(1.5, 3), rounds=True, seed=1),
    Case("fixed-weakly-guided", guidance=(0.3, 3), seed=2),
    Case("fixed-partly-guided-clipped", guidance=(4.0, 2), clip=0.5, seed=3),
    Case("fixed-relaxed", relaxed=True, gap=2.0, seed=4),
    Case("fixed-wider-output", special="narrowed", seed=5),
    Case("learned-equal-variances", learned=True, spread=0.0, seed=6),
    Case("learned", learned=True, seed=7),
    Case("learned-guided", learned=True, guidance=(4.0, 3), seed=8),
    Case("learned-partly-guided", learned=True, guidance=(1.5, 2), seed=9),
    Case("learned-everything", **_FULL, seed=10),
    Case("learned-everything-bf16", **_FULL, output=torch.bfloat16, seed=11),
    Case("learned-everything-f16", **_FULL, output=torch.float16, seed=12),
    Case("digits", lengths=(6, 2, 6, 0, 1), latent=(1, 8, 8), learned=True, gap=0.7, seed=13),
    Case("one-element", latent=(1, 1, 1), learned=True, seed=14),
    Case("many-splits", lengths=(3, 0, 2, 1), latent=(3, 7, 9), division=(64, 1), **_FULL, seed=15),
    Case("many-splits-in-chunks", lengths=(3, 0, 2), latent=(3, 11, 11), division=(64, 2), **_FULL, gap=0.5, seed=16),
    Case("no-drafts", lengths=(1, 1, 0), learned=True, seed=17),
    Case("all-idle", lengths=(0, 0), latent=(1, 2, 2), special="longer", seed=18),
    Case("infeasible", learned=True, gap=0.1, special="infeasible", seed=19),
    Case("far-off", learned=True, special="far", seed=20),
    Case("far-off-fixed", special="far", seed=21),
    Case("not-finite", learned=True, clip=1.0, special="nan", seed=22),
]
# Apart, for the gap's own figure is not compared: float32 holds it by one way of computing it and not by the other.
OVERFLOW = Case("far-off-in-products", lengths=(3,) * 12, learned=True, special="overflow", seed=23)
BY_NAME = {case.name: case for case in CASES}
# Enough rows that errors against float64 have a stable size: single figures are exact or far off by luck.
_ROWS = {"lengths": (6,) * 12 + (3, 1), "latent": (4, 8, 8), "gap": 0.5}
PRECISION = [
    Case(f"{name}-{str(dtype).removeprefix('torch.')}", **_ROWS, **settings, output=dtype, seed=100 + 10 * i + j)
    for i, (name, settings) in enumerate(
        {
            "fixed": {},
            "fixed-guided-clipped": {"guidance": (4.0, 3), "clip": 0.5},
            "learned-other-variances": {"learned": True, "spread": 0.1, "guidance": (0.3, 4)},
            "learned-guided": {"learned": True, "guidance": (4.0, 3)},
            "learned-everything": _FULL,
        }.items()
    )
    for j, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16))
]
# The noise knows nothing of the output's dtype, and a block reads the output as tokens do: the narrow dtypes of the
# first and the last case are enough.
PRECISION_PHILOX = PRECISION[::3]
VARIANTS = {
    "tensors": [*PRECISION[:3], *PRECISION[3:-3:3], *PRECISION[-3:]],
    "philox": PRECISION_PHILOX,
    "block": [*PRECISION[::3], *PRECISION[-2:]],
    "block-philox": PRECISION_PHILOX[::2],
}
PRECISION_NAMES = [f"{case.name}-{variant}" for variant, cases in VARIANTS.items() for case in cases]


@dataclass
class Round:
    """Arguments of ``couple``, with the keys of its noise."""

    given: CouplingArguments
    lengths: Tensor
    seed: int
    # Images, steps and rounds.
    keys: tuple[Tensor, Tensor, Tensor | None]

    def to(self, device: str) -> Round:
        moved, keys = (
            [x.to(device) if isinstance(x, Tensor) else x for x in group] for group in (self.given, self.keys)
        )
        return Round(CouplingArguments(*moved), self.lengths.to(device), self.seed, tuple(keys))

    def changed(self, **fields: Any) -> Round:
        """With other arguments."""
        return replace(self, given=self.given._replace(**fields))

    def by_keys(self) -> KeyedCouplingArguments:
        """Arguments of ``couple_philox``."""
        images, steps, rounds = self.keys
        shared = {name: value for name, value in self.given._asdict().items() if name in KeyedCouplingArguments._fields}
        return KeyedCouplingArguments(**shared, seed=self.seed, images=images, steps=steps, rounds=rounds)

    def flat_keys(self) -> tuple[int, Tensor, Tensor, Tensor | None]:
        """Seed, images, steps and rounds of every row, as the random ops take them."""
        images, steps, rounds = self.keys
        wide = [
            None if key is None else key.unsqueeze(1).expand_as(steps).flatten().contiguous()
            for key in (images, rounds)
        ]
        return self.seed, wide[0], steps.reshape(-1), wide[1]


def draws(op: Callable[..., Tensor], made: Round, purpose: Purpose, numel: int) -> Tensor:
    """``[S L, numel]`` numbers of a purpose."""
    seed, images, steps, rounds = made.flat_keys()
    return op(seed, images, steps, int(purpose), numel, rounds)


def exact_normals(made: Round, purpose: Purpose, numel: int) -> Tensor:
    """Box-Muller in float64 of the float32 uniforms."""
    u = draws(philox_uniform, made, purpose, -(-numel // 4) * 4).double()
    radius, angle = (-2 * u[:, 0::2].log()).sqrt(), 2 * math.pi * u[:, 1::2]
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1).flatten(1)[:, :numel]


def make(case: Case) -> Round:
    """Draft means at a stated distance from the target's, so that rows are accepted and refused by chance."""
    g = torch.Generator().manual_seed(case.seed)
    slots, length = len(case.lengths), case.longest + (case.special == "longer")
    length, channels = max(length, 1), case.latent[0]
    lengths = torch.tensor(case.lengths)
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    rows, branches = int(lengths.sum()) + PADDING_ROWS, 1 if case.guidance is None else 2
    outputs = channels * (2 if case.learned else 1)
    output = torch.randn(branches * rows, outputs + (case.special == "narrowed"), *case.latent[1:], generator=g)
    output = (0.5 * output).to(case.output)[:, :outputs]
    if case.special == "nan":
        output[1, 0, 0, 0] = math.nan

    seed = PHILOX_SEEDS[case.seed % len(PHILOX_SEEDS)]
    images = torch.randint(0, 2**40, (slots,), generator=g).where(lengths > 0, -1)
    steps = torch.randint(0, 250, (slots, 1), generator=g) + torch.arange(length)
    rounds = torch.randint(0, 2**24, (slots,), generator=g) if case.rounds else None
    made = Round(CouplingArguments(*[None] * 13), lengths, seed, (images, steps, rounds))
    numel = math.prod(case.latent)
    noise, slack_noise = (
        draws(philox_normal, made, purpose, numel).view(slots, length, *case.latent)
        for purpose in (Purpose.STEP, Purpose.SLACK)
    )
    uniform = draws(philox_uniform, made, Purpose.ACCEPT, 1).view(slots, length)

    states = torch.randn(slots, length, *case.latent, generator=g)
    columns = 0.1 * torch.randn(slots, length, 8, generator=g)
    columns[..., [0, 4]] += 1.0
    columns[..., 2] -= 2.0
    scale, guided = (1.0, channels) if case.guidance is None else case.guidance
    options = {"guidance_scale": scale, "guidance_channels": guided, "clip": case.clip}
    mean, std = reference.gaussian_transition(
        states.flatten(0, 1),
        reference.unpack_rows(output, offsets, branches, slots, length),
        columns.flatten(0, 1),
        **options,
    )
    mean, std = (x.reshape(slots, length, *case.latent)[:, :-1].nan_to_num(1.0) for x in (mean, std))
    std = std * (1 + case.spread * torch.randn(std.shape, generator=g))
    mean = mean + case.gap / math.sqrt(numel) * std * torch.randn(mean.shape, generator=g)
    if case.special == "infeasible":
        std[0, 1, -1, -1, -1] *= 2.0
        std[2, 0, 0, 0, 0] *= 2.0
    if case.special == "overflow":
        # The squares of gap and error of the variance fit, that of their product does not.
        std[:, 1, 0, 0, 0] *= math.exp(-16)
        mean[:, 1] += 1.4e14 * std[:, 1]
    if case.special == "far":
        mean[0, 1] += 1e16
        mean[2, 0] += 1e30
    relaxation = torch.rand(slots, length, generator=g) if case.relaxed else None
    given = slack_noise if case.learned else None
    drafts, drawn = (states, mean, std), (noise, given, uniform)
    return replace(made, given=CouplingArguments(*drafts, *drawn, output, offsets, columns, relaxation, **options))


def oracle(arguments: Round, variant: str) -> Coupling:
    """The reference, in the dtype of the arguments."""
    return block.couple_block(arguments.given) if variant.startswith("block") else reference.couple(arguments.given)


def in_float64(arguments: Round, variant: str) -> Coupling:
    """The reference in float64 throughout: it raises to float32 by ``float()``, which here means double.

    Where a variant makes its noise, the normals too are float64 functions of their uniforms.
    """
    fields = {
        name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in arguments.given._asdict().items()
    }
    if variant.endswith("philox"):
        for name, purpose in (("noise", Purpose.STEP), ("slack_noise", Purpose.SLACK)):
            if fields[name] is not None:
                numel = fields[name][0, 0].numel()
                fields[name] = exact_normals(arguments, purpose, numel).view_as(fields[name])
    with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
        return oracle(arguments.changed(**fields), variant)


def relevant(outcome: tuple[Tensor | None, ...], lengths: Tensor) -> dict[str, Tensor]:
    """The parts with a meaning: states of live slots, gaps of drafted rows."""
    next_states, _, gap_sq = outcome
    drafted = torch.arange(gap_sq.shape[1], device=lengths.device) < lengths.unsqueeze(1) - 1
    parts = {"next_states": next_states[lengths > 0], "gap_sq": gap_sq[drafted]}
    return {name: part for name, part in parts.items() if part.numel()}


def distance(got: Tensor, exact: Tensor) -> float:
    known = exact.isfinite() & (exact.abs() < reference.MAX_GAP_SQ)
    difference = (got.double() - exact)[known]
    return float(difference.norm() / exact[known].norm().clamp(min=1e-300)) if known.any() else 0.0


def compare(got: Coupling, arguments: Round, variant: str = "tensors") -> list[str]:
    """What is wrong with an outcome; numbers are held to a tolerance here and to eager's by ``precision``."""
    eager, exact = oracle(arguments, variant), in_float64(arguments, variant.removesuffix("-philox"))
    wrong = []
    for name, a, b in zip(eager._fields, got, eager, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            wrong.append(f"{name} has another shape or dtype than the reference's")
    if wrong:
        return wrong
    if not torch.equal(got[1], eager.committed):
        wrong.append(f"committed {got[1].tolist()}, not {eager.committed.tolist()}")
    if not got[0][arguments.lengths == 0].isfinite().all():
        wrong.append("an idle slot's state is not finite")
    parts, eager_parts, exact_parts = (relevant(outcome, arguments.lengths) for outcome in (got, eager, exact))
    for name, a in parts.items():
        b, c = eager_parts[name], exact_parts[name]
        # How far beyond the limit a refused figure lies is of no matter.
        kept = b.isfinite() & (b.abs() < reference.MAX_GAP_SQ)
        if not torch.equal(kept, a.isfinite() & (a.abs() < reference.MAX_GAP_SQ)):
            wrong.append(f"{name} is finite elsewhere")
        # Where few elements add up, the difference of two nearly equal variances is known to 1e-5.
        off = distance(a, c)
        if not off <= TOLERANCE:
            wrong.append(f"{name} is off by {off:.2e}, eager by {distance(b, c):.2e}")
    return wrong


def precision(
    case: Case, variant: str, device: str = "cpu", planted: float = 0.0, backend: str = "triton"
) -> dict[str, tuple[float, float]]:
    """Errors against float64 over eager's, of every output: root mean square over the rows, and largest.

    A row's error is relative to the row, since gaps differ in size. A root mean square over sixty rows is known to
    a tenth, but eager's largest error may be small by luck: it counts as no less than what the largest of as many
    normal errors of its size exceeds once in a million.
    ``planted`` is a relative error of the draft's deviations that the kernels are given.
    """
    arguments = make(case).to(device)
    given = arguments.changed(draft_std=arguments.given.draft_std * (1 + planted))
    got, eager, exact = RUNS[variant](given, backend), oracle(arguments, variant), in_float64(arguments, variant)
    assert torch.equal(got.committed, eager.committed)
    assert torch.equal(eager.committed, exact.committed)
    parts = [relevant(outcome, arguments.lengths) for outcome in (got, eager, exact)]
    quotients = {}
    for name, c in parts[2].items():
        c = c.reshape(len(c), -1)
        errors = [(part[name].double().view_as(c) - c).norm(dim=1) / c.norm(dim=1) for part in parts[:2]]
        mean, largest = zip(*((float(e.square().mean().sqrt()), float(e.max())) for e in errors), strict=True)
        expected = max(largest[1], mean[1] * largest_normal(len(c)))
        quotients[name] = (mean[0] / mean[1], largest[0] / expected)
    return quotients


def divided(case: Case, kernels: Any) -> Any:
    """Small programs, so that tiny latents have several of them."""
    if case.division is None:
        return contextlib.nullcontext()
    block, chunks = case.division
    numel = math.prod(case.latent)
    shape = kernels.LaunchShape(block, chunks, -(-numel // (block * chunks)), block)
    return mock.patch.object(kernels, "launch_shape", return_value=shape)


def run_couple(arguments: Round, backend: str = "triton") -> Coupling:
    return call(couple, arguments.given, backend=backend)


def run_philox(arguments: Round, backend: str = "triton") -> Coupling:
    return call(couple_philox, arguments.by_keys(), backend=backend)


def run_block(arguments: Round, backend: str = "triton") -> Coupling:
    return call(couple_block, arguments.given, backend=backend)


def run_block_philox(arguments: Round, backend: str = "triton") -> Coupling:
    given = arguments.by_keys()
    rounds = torch.zeros_like(given.images) if given.rounds is None else given.rounds
    return call(couple_block_philox, given, rounds=rounds, backend=backend)


RUNS = {"tensors": run_couple, "philox": run_philox, "block": run_block, "block-philox": run_block_philox}


def check(case: Case, kernels: Any, device: str = "cpu") -> list[str]:
    """Everything about one case: every variant against the oracle, and on a GPU the same bits twice."""
    arguments, wrong = make(case).to(device), []
    with divided(case, kernels):
        for variant, run in RUNS.items():
            first = run(arguments)
            wrong += [f"{variant}: {text}" for text in compare(first, arguments, variant)]
            # The interpreter runs one program after the other, so that only a GPU could differ from itself.
            if variant.endswith("philox") or device == "cpu":
                continue
            for a, b in zip(first, run(arguments), strict=True):
                if a.numpy(force=True).tobytes() != b.numpy(force=True).tobytes():
                    wrong.append(f"{variant}: two runs differ")
    return wrong


def check_overflow(device: str = "cpu", backend: str = "triton") -> list[str]:
    """Decisions and states where the kernels' products of gap and error of the variance overflow, were they used."""
    arguments, wrong = make(OVERFLOW).to(device), []
    for variant, run in RUNS.items():
        got, eager = run(arguments, backend), oracle(arguments, variant)
        same = torch.equal(got.committed, eager.committed)
        off = distance(got.next_states, eager.next_states.double())
        if not same or not off <= TOLERANCE:
            wrong.append(f"{variant}: committed {got.committed.tolist()}, states off by {off:.2e}")
    return wrong


def controls(backend: str = "triton") -> dict[str, list[str]]:
    """Faults that ``compare`` has to find; each must give a non-empty list."""
    arguments = make(BY_NAME["learned-partly-guided"])
    wrong_channels = arguments.changed(guidance_channels=3)
    with_rounds = make(BY_NAME["fixed-guided"])
    without = replace(with_rounds, keys=(*with_rounds.keys[:2], None))
    rounding = precision(PRECISION[-1], "tensors", planted=2.0**-21, backend=backend)
    digits = make(BY_NAME["digits"])
    uniform = digits.given.uniform
    other_draw = digits.changed(uniform=torch.cat([1 - 0.5 * uniform[:, :1], uniform[:, 1:]], 1))
    return {
        "guidance_channels": compare(run_couple(wrong_channels, backend), arguments),
        "seed": compare(run_philox(replace(arguments, seed=12345), backend), arguments),
        "rounds": compare(run_philox(without, backend), with_rounds),
        "block_rounds": compare(run_block_philox(without, backend), with_rounds, "block-philox"),
        "block_is_not_token": compare(run_couple(digits, backend), digits, "block"),
        "block_draw": compare(run_block(other_draw, backend), digits, "block"),
        "rounding": [f"{name} is {mean:.1f} times off" for name, (mean, _) in rounding.items() if mean > 2],
    }


def check_normals(device: str = "cpu") -> list[str]:
    """A single row with mean 0 and deviation 1 is its noise: odd size, several programs, keys beyond 32 bits."""
    latent, wrong = (1, 11, 13), []
    images, steps = torch.tensor([0, 5, 2**32 + 3, 2**45]), torch.tensor([[0], [249], [7], [2**31]])
    rounds = torch.tensor([0, 3, 2**24 - 1, 2**16])
    zeros, empty = torch.zeros(4, 1, *latent), torch.zeros(4, 0, *latent)
    drawn, rest = (zeros, None, zeros[:, :, 0, 0, 0]), (zeros[:, 0], torch.arange(5), torch.zeros(4, 1, 8), None)
    given = CouplingArguments(
        zeros, empty, empty, *drawn, *rest, guidance_scale=1.0, guidance_channels=1, clip=math.inf
    )
    for seed, key in itertools.product(PHILOX_SEEDS, (None, rounds)):
        arguments = Round(given, torch.ones(4, dtype=torch.int64), seed, (images, steps, key))
        got = run_philox(arguments.to(device)).next_states.flatten(1)
        off = float((got.cpu() - draws(philox_normal, arguments, Purpose.STEP, 143)).abs().max())
        if not off < 3e-6:
            wrong.append(f"seed {seed}: off by {off:.1e}")
    return wrong


def main() -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise SystemExit("triton_worker_coupling: set TRITON_INTERPRET=1")
    torch.set_num_threads(1)
    # Fills new tensors with NaN: an element that is never written shows.
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    assert torch.ones(1).new_empty(1).isnan()
    from free_kernels.ops.coupling import triton_launch as kernels

    found = {case.name: check(case, kernels) for case in CASES}
    rounding = {
        f"{case.name}-{variant}": precision(case, variant) for variant, cases in VARIANTS.items() for case in cases
    }
    found = {"cases": found, "precision": rounding, "overflow": check_overflow()}
    print(json.dumps(found | {"normals": check_normals(), "controls": controls()}))


if __name__ == "__main__":
    main()
