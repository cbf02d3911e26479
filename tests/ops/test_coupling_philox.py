"""``couple_philox`` is ``couple`` with the numbers of the random ops; its Triton side is in test_triton_coupling.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from coupling_calls import ON_CPU, call

from free_kernels.constants import Purpose, TransitionColumn
from free_kernels.ops import Coupling, couple, couple_philox
from free_kernels.ops.coupling.arguments import CouplingArguments, KeyedCouplingArguments
from free_kernels.sampling.noise import PhiloxNoise

LATENT = (2, 3, 3)
LENGTHS = (4, 0, 1, 3)
SEED = 2**63 + 11


def arguments(learned: bool, with_rounds: bool) -> KeyedCouplingArguments:
    """A round of four slots, guided, with relaxation; every draft is close to the target's transition."""
    g = torch.Generator().manual_seed(3)
    slots, length, rows = len(LENGTHS), max(LENGTHS), sum(LENGTHS)
    columns = torch.zeros(slots, length, len(TransitionColumn))
    columns[..., TransitionColumn.MEAN_FROM_OUTPUT] = 1.0
    columns[..., TransitionColumn.LOG_STD_SLOPE] = 1.0
    return KeyedCouplingArguments(
        draft_states=torch.randn(slots, length, *LATENT, generator=g),
        draft_mean=0.1 * torch.randn(slots, length - 1, *LATENT, generator=g),
        draft_std=torch.full((slots, length - 1, *LATENT), 1.02),
        seed=SEED,
        images=torch.tensor([0, -1, 2**33, 7]),
        steps=torch.randint(0, 250, (slots, length), generator=g),
        output=0.1 * torch.randn(2 * rows, (1 + learned) * LATENT[0], *LATENT[1:], generator=g),
        row_offsets=torch.tensor((0, *LENGTHS)).cumsum(0),
        columns=columns,
        relaxation=0.5 * torch.rand(slots, length, generator=g),
        rounds=torch.tensor([0, 5, 1, 2**24 - 1]) if with_rounds else None,
        guidance_scale=1.5,
        guidance_channels=LATENT[0],
        clip=math.inf,
    )


def with_tensors(
    given: KeyedCouplingArguments, first_image: int = 0, op: Callable[..., Coupling] = couple, backend: str = "auto"
) -> Coupling:
    """The same round by ``couple`` or another op, its numbers drawn by the noise source that the sampler uses."""
    source, shape = PhiloxNoise(given.seed, first_image), given.steps.shape
    images, rounds = (
        None if key is None else key[:, None].repeat(1, shape[1]).flatten() for key in (given.images, given.rounds)
    )
    keys = (images, given.steps.flatten())
    noise, slack_noise = (
        source.normal(*keys, purpose, LATENT, rounds).view(*shape, *LATENT) for purpose in (Purpose.STEP, Purpose.SLACK)
    )
    uniform = source.uniform(*keys, Purpose.ACCEPT, rounds).view(shape)
    learned = given.output.shape[1] == 2 * LATENT[0]
    drawn = {"noise": noise, "slack_noise": slack_noise if learned else None, "uniform": uniform}
    shared = {name: value for name, value in given._asdict().items() if name in CouplingArguments._fields}
    return call(op, CouplingArguments(**shared, **drawn), backend=backend)


def assert_same(one: Any, other: Any) -> None:
    live = torch.tensor(LENGTHS) > 0
    assert torch.equal(one.committed, other.committed)
    torch.testing.assert_close(one.next_states[live], other.next_states[live])
    torch.testing.assert_close(one.gap_sq, other.gap_sq)


@pytest.mark.parametrize("backend", ["auto", *ON_CPU])
@pytest.mark.parametrize("with_rounds", [False, True])
@pytest.mark.parametrize("learned", [False, True])
def test_equals_couple_with_the_same_numbers(learned, with_rounds, backend):
    given = arguments(learned, with_rounds)
    outcome = call(couple_philox, given, backend=backend)
    assert_same(outcome, with_tensors(given, backend=backend))
    live = torch.tensor(LENGTHS) > 0
    for change in ({"seed": SEED + 1}, {"images": given.images + 1}, {"rounds": torch.full((4,), 9)}):
        other = call(couple_philox, given, **change, backend=backend)
        assert not torch.allclose(other.next_states[live], outcome.next_states[live])


def test_the_first_image_of_a_source_is_added_by_the_caller():
    given = arguments(True, True)
    assert_same(call(couple_philox, given, images=given.images + 1000), with_tensors(given, 1000))


def test_no_rounds_are_round_zero():
    given = arguments(True, False)
    assert_same(call(couple_philox, given), call(couple_philox, given, rounds=torch.zeros(4, dtype=torch.int64)))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"seed": -1}, ValueError, "seed must be an int in"),
        ({"seed": 1.5}, TypeError, "seed must be an int in"),
        ({"images": torch.zeros(4)}, TypeError, r"images must be int64 \[4\], got float32 \[4\]"),
        ({"images": None}, TypeError, r"images must be int64 \[4\], got None"),
        ({"images": torch.arange(3)}, ValueError, r"images must be int64 \[4\], got int64 \[3\]"),
        ({"steps": torch.arange(4)}, ValueError, r"steps must be int64 \[4, 4\], got int64 \[4\]"),
        ({"rounds": torch.zeros(4, 4, dtype=torch.int64)}, ValueError, r"rounds must be int64 \[4\]"),
        ({"relaxation": torch.ones(3)}, ValueError, r"relaxation must be float32 \[4, 4\]"),
        ({"output": torch.zeros(7, *LATENT)}, ValueError, "output must be"),
        ({"row_offsets": torch.zeros(5, device="meta", dtype=torch.int64)}, ValueError, "row_offsets must be on cpu"),
        ({"backend": "cuda"}, ValueError, "backend must be one of 'auto', 'reference', 'extension', 'triton'"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    with pytest.raises(error, match=f"^couple_philox: {message}"):
        call(couple_philox, arguments(True, True), **change)


def test_an_explicit_backend_never_falls_back():
    reason = "(it needs CUDA tensors|importing Triton failed)"
    with pytest.raises(RuntimeError, match=f"^couple_philox: backend 'triton' cannot be used: {reason}"):
        call(couple_philox, arguments(True, True), backend="triton")


@pytest.mark.parametrize("with_rounds", [False, True])
@pytest.mark.parametrize("learned", [False, True])
def test_the_op_passes_opcheck(learned, with_rounds):
    given = arguments(learned, with_rounds)._replace(seed=-5, guidance_channels=1)
    torch.library.opcheck(torch.ops.free_kernels.couple_philox.default, given)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_compiles_without_a_graph_break(backend):
    given = arguments(True, True)

    def step(given: KeyedCouplingArguments) -> tuple[torch.Tensor, torch.Tensor]:
        outcome = call(couple_philox, given, backend=backend)
        return outcome.next_states, outcome.committed

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(given), step(given), strict=True):
        torch.testing.assert_close(got, expected)


def test_one_slot():
    """A single slot's keys can look contiguous with a stride of zero."""
    given = arguments(True, True)
    one = KeyedCouplingArguments(*(value[:1] if isinstance(value, torch.Tensor) else value for value in given))
    output = given.output.unflatten(0, (2, -1))[:, :4].flatten(0, 1)
    one = one._replace(output=output, row_offsets=torch.tensor([0, 4]))
    want, got = with_tensors(one), call(couple_philox, one)
    torch.testing.assert_close(got.next_states, want.next_states)
    assert torch.equal(got.committed, want.committed)
