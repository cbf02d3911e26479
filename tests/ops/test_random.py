"""Philox against its published vectors, the laws of the numbers, and the independence of their keys."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from free_kernels import extension
from free_kernels.constants import Purpose
from free_kernels.ops.random import philox_normal, philox_round, philox_uniform, reference

needs_extension = pytest.mark.skipif(
    not extension.has_extension(), reason=f"no compiled extension: {extension.why_no_extension()}"
)
BACKENDS = ["reference", pytest.param("extension", marks=needs_extension)]
FALSE_ALARM = 1e-6
# Philox4x32-10: counter, key, output (known-answer vectors published with Salmon et al. 2011).
VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def keys(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    index = torch.arange(count)
    return index // 10, index % 10


@pytest.mark.parametrize(("counter", "key", "output"), VECTORS)
def test_known_answers_of_the_reference(
    counter: tuple[int, ...], key: tuple[int, int], output: tuple[int, ...]
) -> None:
    words = reference.philox(tuple(torch.tensor([word]) for word in counter), key[0] | key[1] << 32)
    assert tuple(int(word) for word in words) == output


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("counter", "key", "output"), [VECTORS[0]])
def test_known_answer_through_the_op(
    backend: str, counter: tuple[int, ...], key: tuple[int, int], output: tuple[int, ...]
) -> None:
    zero = torch.zeros(1, dtype=torch.int64)
    values = philox_uniform(key[0] | key[1] << 32, zero, zero, 0, 4, backend=backend)[0]
    want = [math.ldexp(word + 0.5, -32) for word in output]
    torch.testing.assert_close(values, torch.tensor(want), rtol=2**-23, atol=0)


@needs_extension
@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63, 2**64 - 1])
@pytest.mark.parametrize("numel", [0, 1, 3, 4, 63, 257, 1030])
@pytest.mark.parametrize("with_rounds", [False, True])
def test_extension_equals_reference(seed: int, numel: int, with_rounds: bool) -> None:
    images = torch.tensor([0, 1, 2**31, 2**32 - 1, -1])
    steps = torch.tensor([5, 0, 249, 2**32 - 1, -3])
    rounds = torch.tensor([0, 1, 2, 1000, 2**24 - 1]) if with_rounds else None
    draws = [
        [op(seed, images, steps, 255, numel, rounds, backend=backend) for backend in ("reference", "extension")]
        for op in (philox_uniform, philox_normal)
    ]
    assert draws[0][0].shape == (5, numel)
    assert draws[0][0].is_contiguous()
    assert torch.equal(*draws[0])
    torch.testing.assert_close(*draws[1], rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_part_of_the_key_counts(backend: str) -> None:
    def draw(seed: int = 1, image: int = 2, step: int = 3, purpose: int = 4, round_: int = 5) -> tuple[float, ...]:
        image_, step_, rounds = torch.tensor([image]), torch.tensor([step]), torch.tensor([round_])
        return tuple(philox_normal(seed, image_, step_, purpose, 8, rounds, backend=backend)[0].tolist())

    changed = [draw(seed=2), draw(seed=1 + 2**32), draw(seed=1 + 2**63), draw(image=3), draw(step=4)]
    changed += [draw(purpose=5), draw(round_=6), draw(image=3, step=2)]
    assert len({draw(), *changed}) == len(changed) + 1
    assert draw() == draw()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_number_depends_on_its_key_alone(backend: str) -> None:
    images, steps = keys(30)
    whole = philox_normal(7, images, steps, 1, 50, backend=backend)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    assert torch.equal(philox_normal(7, images[order], steps[order], 1, 50, backend=backend), whole[order])
    assert torch.equal(philox_normal(7, images[3:4], steps[3:4], 1, 17, backend=backend), whole[3:4, :17])
    # Keys may lie anywhere.
    assert torch.equal(philox_normal(7, images[::2], steps[::2], 1, 50, backend=backend), whole[::2])
    rounds = torch.zeros_like(images)
    assert torch.equal(philox_normal(7, images, steps, 1, 50, rounds, backend=backend), whole)


@pytest.mark.parametrize("backend", BACKENDS)
def test_laws(backend: str) -> None:
    images, steps = keys(400)
    uniform = philox_uniform(11, images, steps, 0, 250, backend=backend)
    normal = philox_normal(11, images, steps, 1, 250, backend=backend)
    assert float(uniform.min()) > 0
    assert float(uniform.max()) <= 1
    assert stats.kstest(uniform.flatten().numpy(), "uniform").pvalue > FALSE_ALARM
    assert stats.kstest(normal.flatten().numpy(), "norm").pvalue > FALSE_ALARM
    # Negative control: the test sees a scale that is off by 3 %.
    assert stats.kstest(1.03 * normal.flatten().numpy(), "norm").pvalue < FALSE_ALARM

    flat, bound = normal.double().flatten(), stats.norm.isf(FALSE_ALARM / 2)
    for power, mean, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        assert abs(float((flat**power).mean()) - mean) < bound * math.sqrt(variance / flat.numel()), power


@pytest.mark.parametrize("backend", BACKENDS)
def test_neighbouring_keys_and_elements_are_uncorrelated(backend: str) -> None:
    images, steps = keys(4000)
    n = 4000 * 16
    base = philox_normal(3, images, steps, 0, 16, backend=backend).double()
    others = {
        "seed": philox_normal(4, images, steps, 0, 16, backend=backend),
        "image": philox_normal(3, images + 400, steps, 0, 16, backend=backend),
        "step": philox_normal(3, images, steps + 10, 0, 16, backend=backend),
        "purpose": philox_normal(3, images, steps, 1, 16, backend=backend),
        "round": philox_normal(3, images, steps, 0, 16, torch.ones_like(images), backend=backend),
        "element": base.roll(1, dims=1),
        "pair": base.roll(2, dims=1),
    }
    bound = stats.norm.isf(FALSE_ALARM / 2 / len(others)) / math.sqrt(n)
    for name, other in others.items():
        for one, two in [(base, other), (base**2 - 1, other**2 - 1)]:
            correlation = float((one * two).mean() / (one.std() * two.std()))
            assert abs(correlation) < bound, name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"seed": -1}, ValueError, "seed must be an int in"),
        ({"seed": 2**64}, ValueError, "seed must be an int in"),
        ({"seed": 1.5}, TypeError, "seed must be an int in"),
        ({"purpose": 256}, ValueError, "purpose must be an int in"),
        ({"numel": -1}, ValueError, "numel must be an int in"),
        ({"images": [1]}, TypeError, r"images must be int64 \[M\], got list"),
        ({"images": torch.zeros(2)}, TypeError, r"images must be int64 \[M\], got float32 \[2\]"),
        ({"steps": torch.zeros(3, dtype=torch.int64)}, ValueError, r"steps must be int64 \[M\] = \[2\], got int64"),
        ({"rounds": torch.zeros(2)}, TypeError, r"rounds must be int64 \[M\], got float32"),
    ],
)
def test_refuses_wrong_arguments(backend: str, change: dict, error: type[Exception], message: str) -> None:
    arguments = {"seed": 0, "images": torch.arange(2), "steps": torch.arange(2), "purpose": 0, "numel": 4}
    for op in (philox_uniform, philox_normal):
        with pytest.raises(error, match=f"^{op.__name__}: {message}"):
            op(**{**arguments, **change}, backend=backend)


@needs_extension
@pytest.mark.parametrize("rounds", [None, torch.arange(6)])
def test_opcheck(rounds: torch.Tensor | None) -> None:
    images, steps = keys(6)
    for op in (torch.ops.free_kernels.philox_uniform.default, torch.ops.free_kernels.philox_normal.default):
        torch.library.opcheck(op, (-5, images, steps, 3, 10, rounds))


@pytest.mark.parametrize("backend", BACKENDS)
def test_traces_without_graph_breaks(backend: str) -> None:
    images, steps = keys(6)
    compiled = torch.compile(philox_normal, fullgraph=True, backend="eager")
    want = philox_normal(2**63 + 1, images, steps, 3, 10, backend=backend)
    assert torch.equal(compiled(2**63 + 1, images, steps, 3, 10, backend=backend), want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("slack", [False, True])
@pytest.mark.parametrize("rounds", [None, torch.tensor([5, 0, 2**24 - 1])])
def test_a_rounds_numbers_are_those_of_its_keys(backend: str, slack: bool, rounds: torch.Tensor | None) -> None:
    images, steps, numel = torch.tensor([7, 2**31, 0]), torch.arange(12).view(3, 4) * 3, 70
    flat = [None if key is None else key.repeat_interleave(4) for key in (images, rounds)]
    noise, slack_noise, uniform = philox_round(2**63 + 9, images, steps, numel, slack, rounds, backend)
    for purpose, got in ((Purpose.STEP, noise), (Purpose.SLACK, slack_noise)):
        want = philox_normal(2**63 + 9, flat[0], steps.flatten(), purpose, got.shape[2], flat[1], backend)
        assert torch.equal(got.view(12, -1), want.view(12, -1))
    assert slack_noise.shape == (3, 4, numel if slack else 0)
    want = philox_uniform(2**63 + 9, flat[0], steps.flatten(), Purpose.ACCEPT, 1, flat[1], backend)
    assert torch.equal(uniform.flatten(), want.flatten())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_round_refuses_wrong_arguments(backend: str) -> None:
    images, steps = torch.arange(3), torch.zeros(3, 4, dtype=torch.int64)
    for change, message in (
        ({"images": images.float()}, r"images must be int64 \[S\]"),
        ({"steps": images}, r"steps must be int64 \[S, L\]"),
        ({"rounds": torch.arange(4)}, r"rounds must be int64 \[S\] = \[3\]"),
        ({"numel": -1}, r"numel must be an int in"),
        ({"seed": -1}, r"seed must be an int in"),
    ):
        given = {"seed": 0, "images": images, "steps": steps, "numel": 5, "rounds": None} | change
        with pytest.raises((ValueError, TypeError), match=f"^philox_round: {message}"):
            philox_round(**given, backend=backend)
