"""``couple`` against closed forms: acceptance, marginals, limits; each statistic with a control that must fail."""

from __future__ import annotations

import math

import pytest
import scipy.stats
import slack_by_matrices
import torch
from analytic import DETECTED, FALSE_ALARM
from coupling_calls import ON_CPU, PLAIN, call

from free_kernels.constants import TransitionColumn
from free_kernels.ops.coupling import couple, gaussian_transition, reference
from free_kernels.ops.coupling.arguments import CouplingArguments
from free_kernels.ops.coupling.reference import compare_variances

LATENT = (1, 4, 4)
ELEMENTS = math.prod(LATENT)
on_cpu = pytest.mark.parametrize("backend", ON_CPU)


def columns_for(std: float, rows: int, length: int) -> torch.Tensor:
    """Transitions with mean ``e`` (the output itself) and deviation ``std exp(v)``."""
    columns = torch.zeros(rows, length, len(TransitionColumn))
    columns[..., TransitionColumn.MEAN_FROM_OUTPUT] = 1.0
    columns[..., TransitionColumn.LOG_STD] = math.log(std)
    columns[..., TransitionColumn.LOG_STD_SLOPE] = 1.0
    return columns


def one_row(
    mean_p: torch.Tensor,
    mean_q: torch.Tensor,
    std_p: torch.Tensor,
    std_q: torch.Tensor,
    count: int,
    learned: bool,
    seed: int = 0,
    relaxation: float | None = None,
    backend: str = "auto",
):
    """``count`` independent trials of one drafted row (L = 2: a drafted row and a last row without draft)."""
    generator = torch.Generator().manual_seed(seed)
    noise, slack_noise = (torch.randn(count, 2, *LATENT, generator=generator) for _ in range(2))
    uniform = 1 - torch.rand(count, 2, generator=generator)
    expand = lambda value: value.view(1, 1, *LATENT).expand(count, 1, *LATENT).contiguous()  # noqa: E731
    draft = expand(mean_p) + expand(std_p) * noise[:, :1]
    states = torch.cat([torch.zeros_like(draft), draft], dim=1)
    output = torch.cat([mean_q.view(1, *LATENT), std_q.log().view(1, *LATENT)], dim=1)
    output = output.expand(2 * count, 2 * LATENT[0], *LATENT[1:]).contiguous()
    columns = columns_for(1.0, count, 2)
    if not learned:
        output = output[:, : LATENT[0]]
        columns[..., TransitionColumn.LOG_STD] = std_q.log().mean()
    outcome = couple(
        states,
        expand(mean_p),
        expand(std_p),
        noise,
        slack_noise if learned else None,
        uniform,
        output,
        torch.arange(count + 1) * 2,
        columns,
        relaxation=None if relaxation is None else torch.full((count, 2), relaxation),
        backend=backend,
    )
    accepted = outcome.committed == 2
    # A slot whose draft was accepted goes on to its last row; what the drafted row committed is then the draft.
    committed = torch.where(accepted.view(-1, 1, 1, 1), draft[:, 0], outcome.next_states)
    return outcome, accepted, committed.flatten(1)


def means(gap: float, std: float = 1.0):
    direction = torch.linspace(-1, 1, ELEMENTS)
    direction /= direction.norm()
    return torch.zeros(ELEMENTS), gap * std * direction, direction


def marginal_p_value(committed: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, direction: torch.Tensor) -> float:
    """Bonferroni over KS along the gap, KS of a fixed orthogonal direction, and chi-square of the whitened norm."""
    whitened = ((committed - mean) / std).double()
    other = torch.ones(ELEMENTS, dtype=torch.float64) - (direction.double().sum()) * direction.double()
    values = [
        scipy.stats.kstest((whitened @ axis / axis.norm()).numpy(), "norm").pvalue
        for axis in (direction.double() / std, other)
    ]
    total = float(whitened.square().sum())
    freedom = whitened.numel()
    values.append(2 * min(scipy.stats.chi2.sf(total, freedom), scipy.stats.chi2.cdf(total, freedom)))
    return min(1.0, len(values) * min(values))


@on_cpu
@pytest.mark.parametrize("gap", [0.05, 0.5, 1.0, 2.5])
def test_acceptance_is_the_largest_possible(gap, backend):
    # The control lies 5 % off: 13 deviations of a share or more, and 10 of the rarest with four times as many trials.
    count = 40_000 if gap < 2 else 160_000
    mean_p, mean_q, _ = means(gap)
    ones = torch.ones(ELEMENTS)
    _, accepted, _ = one_row(mean_p, mean_q, ones, ones, count, False, backend=backend)
    expected = 2 * scipy.stats.norm.cdf(-gap / 2)
    assert scipy.stats.binomtest(int(accepted.sum()), count, expected).pvalue > FALSE_ALARM
    assert scipy.stats.binomtest(int(accepted.sum()), count, expected * 0.95).pvalue < DETECTED


@on_cpu
@pytest.mark.parametrize("std", [1.0, 0.01])
@pytest.mark.parametrize("gap", [0.3, 1.5])
def test_marginal_with_equal_covariance(gap, std, backend):
    mean_p, mean_q, direction = means(gap, std)
    deviation = torch.full((ELEMENTS,), std)
    _, accepted, committed = one_row(mean_p, mean_q, deviation, deviation, 20_000, False, backend=backend)
    assert marginal_p_value(committed, mean_q, deviation, direction) > FALSE_ALARM
    assert marginal_p_value(committed, mean_p, deviation, direction) < DETECTED, "the draft's law is not the target's"
    unconditional = torch.where(accepted[:, None], committed, mean_q + deviation * torch.randn_like(committed))
    assert marginal_p_value(unconditional, mean_q, deviation, direction) < DETECTED, (
        "a fresh sample is not a reflection"
    )


@on_cpu
@pytest.mark.parametrize("gap", [0.0, 0.7, 2.0])
@pytest.mark.parametrize("ratios", [(0.75, 1.3), (0.55, 3.0), (0.97, 1.05), (1.3, 1.31), (0.7, 0.71), (0.4, 1.3)])
def test_marginal_with_different_covariances(ratios, gap, backend):
    """Variance ratios target / draft within the given bounds; the last ones leave no shared slack."""
    generator = torch.Generator().manual_seed(7)
    mean_p, mean_q, direction = means(gap)
    std_p = torch.exp(0.3 * torch.randn(ELEMENTS, generator=generator))
    ratio = ratios[0] + (ratios[1] - ratios[0]) * torch.rand(ELEMENTS, generator=generator)
    std_q = std_p * ratio.sqrt()
    _, accepted, committed = one_row(mean_p, mean_q, std_p, std_q, 30_000, True, backend=backend)
    assert bool(accepted.any()) == (ratios[0] >= 0.5)
    assert marginal_p_value(committed, mean_q, std_q, direction) > FALSE_ALARM
    if max(ratios[1], 1 / ratios[0]) > 1.1:
        assert marginal_p_value(committed, mean_q, std_p, direction) < DETECTED, "the draft's variance"


@pytest.mark.parametrize("bug", ["", *slack_by_matrices.BUGS])
def test_bugs_of_shared_slack_are_found(bug, monkeypatch):
    monkeypatch.setattr(reference, "compare_variances", lambda *args: slack_by_matrices.dense(*args, bug))
    mean_p, mean_q, direction = means(2.0)
    std_q = torch.linspace(1.05, 2.0, ELEMENTS)
    _, _, committed = one_row(mean_p, mean_q, torch.ones(ELEMENTS), std_q, 30_000, True, backend="reference")
    p_value = marginal_p_value(committed, mean_q, std_q, direction)
    assert p_value < DETECTED if bug else p_value > FALSE_ALARM


@pytest.mark.parametrize("gap", [0.0, 1e-3, 0.5, 3.0])
@pytest.mark.parametrize("spread", [0.0, 0.01, 0.2])
def test_shared_slack_is_that_of_dense_matrices(gap, spread):
    generator = torch.Generator().manual_seed(2)
    direction, error = torch.randn(2, 50, 3, 24, generator=generator).double()
    ratio, z, z_slack = (1 + spread * error).clamp(min=0.52), *torch.randn(2, 50, 3, 24, generator=generator).double()
    ratio[0, 0, 5] = 0.4
    mean = gap * direction / direction.norm(dim=-1, keepdim=True)
    found = compare_variances(mean, ratio, z, z_slack)
    assert found.infeasible.nonzero().tolist() == [[0, 0]]
    expected = slack_by_matrices.dense(mean, ratio, z, z_slack)
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got[~found.infeasible], wanted[~found.infeasible], rtol=1e-8, atol=1e-9)


def test_one_deviation_on_both_sides_is_not_exact():
    """Negative control of the shared slack: reflecting as if the draft had the target's deviation is found."""
    mean_p, mean_q, direction = means(0.7)
    std_p = torch.full((ELEMENTS,), 1.1)
    std_q = torch.ones(ELEMENTS)
    generator = torch.Generator().manual_seed(0)
    draft = mean_p + std_p * torch.randn(30_000, ELEMENTS, generator=generator)
    z = (draft - mean_p) / std_q
    delta = (mean_q - mean_p) / std_q
    along = z @ delta
    keep = (1 - torch.rand(len(z), generator=generator)).log() <= along - delta.square().sum() / 2
    mirrored = mean_q + std_q * (z - 2 * along[:, None] * delta / delta.square().sum())
    committed = torch.where(keep[:, None], draft, mirrored)
    assert marginal_p_value(committed, mean_q, std_q, direction) < DETECTED


def acceptance_of_unequal(count: int, elements: int, gap: float, error: float, backend: str) -> float:
    """Share of drafts accepted: means ``gap`` apart, ratios of variances spread by ``error``."""
    shape = (1, 1, elements)
    generator = torch.Generator().manual_seed(1)
    mean = torch.randn(elements, generator=generator)
    mean *= gap / mean.norm()
    ratio = 1 + error * torch.randn(elements, generator=generator)
    noise, slack_noise = (torch.randn(count, 2, *shape, generator=generator) for _ in range(2))
    output = torch.cat([mean.view(1, *shape), ratio.log().view(1, *shape) / 2], 1)
    states = torch.cat([torch.zeros_like(noise[:, :1]), noise[:, :1]], 1)
    outcome = couple(
        states,
        torch.zeros(count, 1, *shape),
        torch.ones(count, 1, *shape),
        noise,
        slack_noise,
        1 - torch.rand(count, 2, generator=generator),
        output.expand(2 * count, 2, *shape[1:]),
        torch.arange(count + 1) * 2,
        columns_for(1.0, count, 2),
        backend=backend,
    )
    return float((outcome.committed == 2).float().mean())


@on_cpu
@pytest.mark.parametrize(
    ("count", "elements", "gap", "error"),
    [(20_000, 64, 0.587, 0.0219), (20_000, 64, 0.19, 0.005), (2000, 4096, 0.3, 0.003), (2000, 4096, 0.3, 0.01)],
)
def test_acceptance_with_unequal_variances(count, elements, gap, error, backend):
    """Gap and error of the digits' last four steps, of the five before, and DESIGN 3.3's two points.

    As if ``delta^2 = m^2 + D r^2``, where no coupling does better than about ``m^2 + D r^2 / 2``. One share for all
    directions has ``(sqrt(m^2 + D r^2 / 4) + sqrt(D) r / 2)^2`` at best, which the first point tells apart.
    """
    rate, variance_sq = acceptance_of_unequal(count, elements, gap, error, backend), elements * error**2
    accepted = lambda gap_sq: 2 * scipy.stats.norm.cdf(-math.sqrt(gap_sq) / 2)  # noqa: E731
    noise = scipy.stats.norm.isf(FALSE_ALARM / 2) * math.sqrt(rate * (1 - rate) / count)
    assert accepted(gap**2 + variance_sq) - noise < rate < accepted(gap**2 + variance_sq / 2) + noise
    if error > 0.02:
        assert rate - noise > accepted((math.sqrt(gap**2 + variance_sq / 4) + math.sqrt(variance_sq) / 2) ** 2)


@on_cpu
def test_reflection_is_an_involution_and_keeps_the_norm(backend):
    mean_p, mean_q, _ = means(2.0)
    ones = torch.ones(ELEMENTS)
    _, accepted, committed = one_row(mean_p, mean_q, ones, ones, 4000, False, backend=backend)
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(4000, 2, *LATENT, generator=generator)[:, 0].flatten(1)
    mirrored = (committed - mean_q)[~accepted]
    torch.testing.assert_close(mirrored.norm(dim=1), z[~accepted].norm(dim=1), rtol=1e-5, atol=1e-5)
    axis = (mean_q - mean_p) / (mean_q - mean_p).norm()
    again = mirrored - 2 * (mirrored @ axis)[:, None] * axis
    torch.testing.assert_close(again, z[~accepted], rtol=1e-4, atol=1e-5)


@on_cpu
def test_identical_laws_always_accept(backend):
    ones = torch.ones(ELEMENTS)
    for learned in (False, True):
        outcome, accepted, _ = one_row(ones, ones, ones, ones, 2000, learned, backend=backend)
        assert bool(accepted.all())
        assert float(outcome.gap_sq.abs().max()) < 1e-9


@on_cpu
def test_vanishing_noise_refuses_any_gap_and_commits_the_targets_mean(backend):
    mean_p, mean_q, _ = means(1.0)
    tiny = torch.full((ELEMENTS,), 1e-6)
    _, accepted, committed = one_row(mean_p, mean_q, tiny, tiny, 500, False, backend=backend)
    assert not bool(accepted.any())
    torch.testing.assert_close(committed, mean_q.expand_as(committed), rtol=0, atol=1e-4)


@on_cpu
@pytest.mark.parametrize("learned", [False, True])
def test_a_draft_far_off_is_replaced_without_loss(learned, backend):
    """What is committed does not depend on how far away the draft was: no digits are lost to it."""
    ones, committed = torch.ones(ELEMENTS), []
    for gap in (1e3, 1e6, 1e9):
        mean_p, _, _ = means(0.0)
        _, accepted, states = one_row(
            mean_p - gap * means(1.0)[1], mean_p, ones, 1.1 * ones, 500, learned, backend=backend
        )
        assert not bool(accepted.any())
        committed.append(states)
    for states in committed[:2]:
        torch.testing.assert_close(states, committed[2], rtol=0, atol=1e-2 if learned else 1e-5)


@on_cpu
def test_first_refusal_ends_a_ragged_trajectory(backend):
    """Slots of lengths 3, 1, 0, 2: rows before the first refusal are accepted, rows behind it are ignored."""
    lengths = torch.tensor([3, 1, 0, 2])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    slots, length = 4, 3
    noise = torch.randn(slots, length, *LATENT)
    mean_q = torch.zeros(int(lengths.sum()), *LATENT)
    mean_q[1] = 100.0  # the second row of slot 0
    states = torch.cat([torch.zeros(slots, 1, *LATENT), noise[:, :-1]], 1)
    outcome = couple(
        states,
        torch.zeros(slots, 2, *LATENT),
        torch.ones(slots, 2, *LATENT),
        noise,
        None,
        torch.ones(slots, length),
        mean_q,
        offsets,
        columns_for(1.0, slots, length),
        backend=backend,
    )
    assert outcome.committed.tolist() == [2, 1, 0, 2]
    torch.testing.assert_close(outcome.next_states[1], noise[1, 0])
    torch.testing.assert_close(outcome.next_states[3], noise[3, 1])
    along = (outcome.next_states[0] - 100).flatten()
    torch.testing.assert_close(along.norm(), noise[0, 1].norm())


@on_cpu
def test_padding_rows_change_nothing(backend):
    """Packed rows past the last draft, as a call of fixed shape has them, up to and beyond S L rows."""
    lengths = torch.tensor([1, 3])
    offsets = torch.tensor([0, 1, 4])
    noise = torch.randn(2, 3, *LATENT)
    output = 0.1 * torch.randn(4, *LATENT)
    states = torch.cat([torch.zeros(2, 1, *LATENT), noise[:, :-1]], 1)
    outcomes = []
    for rows in (4, 5, 6, 8):
        padded = torch.cat([output, torch.full((rows - 4, *LATENT), 7.0)])
        outcomes.append(
            couple(
                states,
                torch.zeros(2, 2, *LATENT),
                torch.ones(2, 2, *LATENT),
                noise,
                None,
                torch.full((2, 3), 1e-9),
                padded,
                offsets,
                columns_for(1.0, 2, 3),
                backend=backend,
            )
        )
    assert outcomes[0].committed.tolist() == lengths.tolist()
    for outcome in outcomes[1:]:
        assert torch.equal(outcome.next_states, outcomes[0].next_states)
        assert torch.equal(outcome.committed, outcomes[0].committed)


def test_half_precision_outputs_are_reduced_in_float32():
    state = torch.randn(3, *LATENT)
    output = torch.randn(3, *LATENT)
    columns = columns_for(0.5, 1, 1)[0]
    exact, _ = gaussian_transition(state, output.bfloat16().float(), columns)
    half, std = gaussian_transition(state, output.bfloat16(), columns)
    assert half.dtype == std.dtype == torch.float32
    torch.testing.assert_close(half, exact, rtol=0, atol=0)


def test_guidance_mixes_the_leading_channels_only():
    state = torch.zeros(2, 4, 2, 2)
    conditional, unconditional = torch.randn(2, 8, 2, 2), torch.randn(2, 8, 2, 2)
    columns = columns_for(1.0, 1, 1)[0]
    mean, std = gaussian_transition(
        state, torch.cat([conditional, unconditional]), columns, guidance_scale=3.0, guidance_channels=3
    )
    expected = unconditional[:, :3] + 3.0 * (conditional[:, :3] - unconditional[:, :3])
    torch.testing.assert_close(mean[:, :3], expected)
    torch.testing.assert_close(mean[:, 3], conditional[:, 3])
    torch.testing.assert_close(std, conditional[:, 4:].exp())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"draft_states": torch.zeros(2, 2)}, r"draft_states must be float32 \[S, L, C, H, W\], got float32 \[2, 2\]"),
        ({"draft_states": None}, r"draft_states must be float32 \[S, L, C, H, W\], got None"),
        ({"draft_mean": torch.zeros(2, 2, *LATENT)}, "draft_mean must be"),
        ({"uniform": torch.ones(3, 2)}, "uniform must be"),
        ({"row_offsets": torch.zeros(3, dtype=torch.int32)}, "row_offsets must be int64"),
        ({"output": torch.zeros(4, 1, 1, 1)}, "output must be"),
        ({"columns": torch.zeros(2, 2, 7)}, "columns must be"),
        ({"slack_noise": torch.ones(2, 2, *LATENT)}, "slack_noise must be given exactly where output has 2 C channels"),
        ({"output": torch.zeros(4, 2, 4, 4)}, "slack_noise must be given exactly where output has 2 C .* got none"),
        ({"backend": "cuda"}, "backend must be one of"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = CouplingArguments(
        draft_states=torch.zeros(2, 2, *LATENT),
        draft_mean=torch.zeros(2, 1, *LATENT),
        draft_std=torch.ones(2, 1, *LATENT),
        noise=torch.zeros(2, 2, *LATENT),
        slack_noise=None,
        uniform=torch.ones(2, 2),
        output=torch.zeros(4, *LATENT),
        row_offsets=torch.tensor([0, 2, 4]),
        columns=columns_for(1.0, 2, 2),
        **PLAIN,
    )
    with pytest.raises((ValueError, TypeError), match=f"^couple: {message}"):
        call(couple, arguments, **change)


def op_arguments(learned: bool) -> CouplingArguments:
    """A guided round of two slots of lengths 3 and 1."""
    generator = torch.Generator().manual_seed(3)
    noise, slack_noise = torch.randn(2, 2, 3, *LATENT, generator=generator)
    output = torch.randn(8, 2 if learned else 1, 4, 4, generator=generator) * 0.1
    return CouplingArguments(
        draft_states=torch.randn(2, 3, *LATENT, generator=generator),
        draft_mean=torch.randn(2, 2, *LATENT, generator=generator) * 0.1,
        draft_std=torch.full((2, 2, *LATENT), 1.1),
        noise=noise,
        slack_noise=slack_noise if learned else None,
        uniform=torch.rand(2, 3, generator=generator) + 1e-3,
        output=output,
        row_offsets=torch.tensor([0, 3, 4]),
        columns=columns_for(1.0, 2, 3),
        **PLAIN | {"guidance_scale": 2.0},
    )


@pytest.mark.parametrize("learned", [False, True])
def test_the_op_passes_opcheck(learned):
    torch.library.opcheck(torch.ops.free_kernels.couple.default, op_arguments(learned))


def test_couple_compiles_without_a_graph_break():
    arguments = op_arguments(True)

    def step(arguments):
        outcome = call(couple, arguments)
        return outcome.next_states, outcome.committed

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(arguments), step(arguments), strict=True):
        torch.testing.assert_close(got, expected)
