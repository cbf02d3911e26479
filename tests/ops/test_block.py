"""``couple_block`` against closed forms and toy chains; each statistic with controls that must fail."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import scipy.integrate
import scipy.stats
import torch
from analytic import DETECTED, FALSE_ALARM
from coupling_calls import ON_CPU, PLAIN, call, needs_extension
from test_coupling import LATENT, columns_for, op_arguments
from test_coupling_philox import arguments as philox_arguments
from test_coupling_philox import with_tensors
from torch import Tensor

from free_kernels.ops import Coupling, couple, couple_block, couple_block_philox
from free_kernels.ops.coupling import reference as coupling
from free_kernels.ops.coupling import reference_block as reference
from free_kernels.ops.coupling.arguments import CouplingArguments
from free_kernels.ops.coupling.reference import compare, compare_variances, guide

COUNT, ELEMENTS = 40_000, 4
SHAPE = (1, 2, 2)
on_cpu = pytest.mark.parametrize("backend", ON_CPU)


def constant(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


class Chain(NamedTuple):
    """A chain whose drafts are off along element 0, by ``size``, or by ``steer size`` where element 1 is negative.

    So how far a draft is off hangs on the orthogonal noise of the one before. ``spread`` is how much the target's
    deviation varies with the state; drafts have deviation 1.
    """

    size: float = 1.1
    spread: float = 0.0
    steer: float = 0.2

    def mean(self, x: Tensor) -> Tensor:
        return 0.5 * x + 0.3 * torch.tanh(x.roll(1, -1))

    def std(self, x: Tensor) -> Tensor:
        return torch.exp(self.spread * torch.tanh(x))

    def gap(self, x: Tensor, step: int) -> Tensor:
        """Mean of the target minus that of the draft."""
        size = torch.where(x[:, 1] > 0, self.size, self.steer * self.size) * (1.0 if step % 2 == 0 else 0.8)
        return torch.nn.functional.pad(size.unsqueeze(1), (0, x.shape[1] - 1))


class Round(NamedTuple):
    """One verified block of ``COUNT`` slots: what went in, what came out, the drafts' whitened gaps."""

    chain: Chain
    inputs: CouplingArguments
    outcome: Coupling


def verify(chain: Chain, length: int, seed: int = 0, verifier=couple_block, backend: str = "auto") -> Round:
    generator = torch.Generator().manual_seed(seed)
    noise, slack_noise = torch.randn(2, COUNT, length, ELEMENTS, generator=generator)
    uniform = 1 - torch.rand(COUNT, length, generator=generator)
    states, means = [torch.tensor([1.0, -1.0]).repeat(COUNT, ELEMENTS // 2)], []
    for step in range(length - 1):
        means.append(chain.mean(states[-1]) - chain.gap(states[-1], step))
        states.append(means[-1] + noise[:, step])
    x, mean = torch.stack(states, 1), torch.stack(means, 1)
    output = torch.stack([chain.mean(x.flatten(0, 1)), chain.std(x.flatten(0, 1)).log()], 1).view(-1, 2, *SHAPE[1:])
    shaped = [part.view(COUNT, -1, *SHAPE) for part in (x, mean, torch.ones_like(mean), noise, slack_noise)]
    if chain.spread == 0:
        shaped[4], output = None, output[:, :1]
    rest = (uniform, output, torch.arange(COUNT + 1) * length, columns_for(1.0, COUNT, length))
    inputs = CouplingArguments(*shaped, *rest, **PLAIN)
    return Round(chain, inputs, call(verifier, inputs, backend=backend))


def path_p_value(done: Round, next_states: Tensor | None = None, reuse: bool = False) -> float:
    """Follow each slot for a block's length, and test the whitened steps: all independent normals under the exact law.

    Args:
        done: a round; steps behind the committed ones are drawn from the target.
        next_states: what to commit in the place of the outcome's.
        reuse: draw the steps behind with the noise of the discarded drafts.
    """
    chain, states, noise = done.chain, done.inputs.draft_states.flatten(2), done.inputs.noise.flatten(2)
    new = (done.outcome.next_states if next_states is None else next_states).flatten(1)
    stop = (done.outcome.committed - 1).unsqueeze(1)
    generator = torch.Generator().manual_seed(99)
    x, steps = states[:, 0], []
    for step in range(states.shape[1]):
        mean, std = chain.mean(x), chain.std(x)
        x = mean + std * (noise[:, step] if reuse else torch.randn(x.shape, generator=generator))
        x = torch.where(stop == step, new, x)
        if step + 1 < states.shape[1]:
            x = torch.where(stop > step, states[:, step + 1], x)
        steps.append(((x - mean) / std).double())
    values = []
    for k, now in enumerate(steps):
        values.append(scipy.stats.kstest(now.square().sum(1).numpy(), "chi2", (ELEMENTS,)).pvalue)
        projections = list(now.unbind(1))
        for before in steps[k - 1 : k]:
            projections += [(before[:, i] + now[:, 0]) / math.sqrt(2) for i in (0, 1)]
            projections += [before[:, i].sign() * now[:, 0] for i in (0, 1)]
        # Where the past is likelier under the target than under the drafts, and where it is not.
        past = sum((step[:, 0] for step in steps[:k]), torch.zeros(COUNT)) / math.sqrt(max(k, 1))
        projections += [now[past < -0.7, 0], now[past > 0.7, 0]] if k else []
        values += [scipy.stats.kstest(part.numpy(), "norm").pvalue for part in projections]
    return min(1.0, len(values) * min(values))


STEERED, OFTEN_REFUSED = Chain(), Chain(1.6, steer=0.5)
SHARED, SOME_INFEASIBLE = Chain(1.6, spread=0.3), Chain(spread=0.4)


@pytest.mark.parametrize("chain", [STEERED, OFTEN_REFUSED, SHARED, SOME_INFEASIBLE])
def test_law_of_a_block(chain, monkeypatch):
    """Equal variances; different ones that share slack; and some that share none."""
    infeasible = []

    def recorded(*args):
        infeasible.append(compare_variances(*args).infeasible.float().mean())
        return compare_variances(*args)

    monkeypatch.setattr(coupling, "compare_variances", recorded)
    done = verify(chain, 5, backend="reference")
    for share in infeasible:
        assert (0.1 < share < 0.9) if chain == SOME_INFEASIBLE else share == 0
    assert len(infeasible) == (chain.spread > 0)
    assert path_p_value(done) > FALSE_ALARM


@needs_extension
@pytest.mark.parametrize("chain", [STEERED, OFTEN_REFUSED, SHARED, SOME_INFEASIBLE])
def test_law_of_a_compiled_block(chain):
    """The same decisions as the reference's, but for ties to rounding, and the same law."""
    done = verify(chain, 5, backend="extension")
    assert path_p_value(done) > FALSE_ALARM
    other = call(couple_block, done.inputs, backend="reference").committed
    # Thresholds differ by the rounding of scores of size 10, below 1e-5, and that is the chance that a decision turns:
    # 2 of 200,000 are expected to, and more than 10 with a probability of 1e-5.
    assert int((done.outcome.committed != other).sum()) <= 10


@on_cpu
def test_joint_law_of_two_steps_in_one_dimension(backend):
    """x1 ~ N(0, 1), x2 | x1 ~ N(0.8 x1, 1) from drafts off by 0.8 and -0.6: the exact Gaussian in four directions."""
    generator = torch.Generator().manual_seed(4)
    noise = torch.randn(COUNT, 3, 1, 1, 1, generator=generator)
    first = 0.8 + noise[:, 0]
    means = torch.stack([torch.full_like(first, 0.8), 0.8 * first - 0.6], 1)
    states = torch.stack([torch.zeros_like(first), first, means[:, 1] + noise[:, 1]], 1)
    outcome = couple_block(
        states,
        means,
        torch.ones_like(means),
        noise,
        None,
        1 - torch.rand(COUNT, 3, generator=generator),
        0.8 * states.flatten(0, 1),
        torch.arange(COUNT + 1) * 3,
        columns_for(1.0, COUNT, 3),
        backend=backend,
    )
    new, committed = outcome.next_states.flatten(), outcome.committed
    x1 = torch.where(committed > 1, states[:, 1].flatten(), new)
    x2 = torch.where(committed > 2, states[:, 2].flatten(), new)
    x2 = torch.where(committed > 1, x2, 0.8 * x1 + torch.randn(COUNT, generator=generator))
    drafts = states[:, 1].flatten(), states[:, 2].flatten()
    for i, j in ((1, 0), (0, 1), (1, 1), (1, -1)):
        law = ("norm", (0, math.sqrt((i + 0.8 * j) ** 2 + j**2)))
        assert scipy.stats.kstest((i * x1 + j * x2).numpy(), *law).pvalue > FALSE_ALARM / 4
        if i:
            assert scipy.stats.kstest((i * drafts[0] + j * drafts[1]).numpy(), *law).pvalue < DETECTED


def weights_not_clipped(monkeypatch):
    pad = torch.nn.functional.pad
    monkeypatch.setattr(reference, "log_weights", lambda score: pad(score.cumsum(1), (1, 0)).clamp(max=0))


def residual_from_the_target(monkeypatch):
    monkeypatch.setattr(reference, "draw_residual", lambda log_a, delta, uniform: torch.special.ndtri(uniform))


def residual_of_weight_one(monkeypatch):
    draw = reference.draw_residual
    monkeypatch.setattr(reference, "draw_residual", lambda a, delta, uniform: draw(torch.zeros_like(a), delta, uniform))


def gap_of_the_row_before(monkeypatch):
    mass = reference.residual_mass
    monkeypatch.setattr(reference, "residual_mass", lambda log_a, delta: mass(log_a, delta.roll(1, 1)))


def new_slack_in_the_residual(monkeypatch):
    def changed(mean_q, std_q, arguments):
        noise, slack_noise = (torch.randn_like(arguments.noise) for _ in range(2))
        other = compare(mean_q, std_q, arguments._replace(noise=noise, slack_noise=slack_noise))
        return compare(mean_q, std_q, arguments)._replace(lead=other.lead)

    monkeypatch.setattr(reference, "compare", changed)


@pytest.mark.parametrize(
    ("mutation", "setting"),
    [
        (weights_not_clipped, STEERED),
        (weights_not_clipped, SHARED),
        (residual_from_the_target, STEERED),
        (residual_of_weight_one, OFTEN_REFUSED),
        (gap_of_the_row_before, STEERED),
        (new_slack_in_the_residual, SHARED),
    ],
)
def test_wrong_blocks_are_found(mutation, setting, monkeypatch):
    torch.manual_seed(1)
    mutation(monkeypatch)
    assert path_p_value(verify(setting, 5, backend="reference")) < DETECTED


def test_a_reflected_draft_is_not_the_residual():
    """Token verification's replacement, which uses all of the refused noise again, is wrong once P is below 1."""
    done = verify(OFTEN_REFUSED, 5)
    given = done.inputs
    states, means, noise = (part.flatten(2) for part in (given.draft_states, given.draft_mean, given.noise))
    slots, drafts = torch.arange(COUNT), means.shape[1]
    row = (done.outcome.committed - 1).clamp(max=drafts - 1)
    mean_q = done.chain.mean(states[slots, row])
    gap, z = mean_q - means[slots, row], noise[slots, row]
    reflected = mean_q + z - 2 * ((z * gap).sum(1) / gap.square().sum(1)).unsqueeze(1) * gap
    refused = (done.outcome.committed <= drafts).unsqueeze(1)
    wrong = torch.where(refused, reflected, done.outcome.next_states.flatten(1))
    assert path_p_value(done, wrong) < DETECTED


def test_discarded_noise_must_not_be_met_again():
    """Steps behind the committed ones need new noise; after row-by-row verification they may use what was discarded."""
    assert path_p_value(verify(Chain(), 5), reuse=True) < DETECTED
    assert path_p_value(verify(Chain(), 5, verifier=couple), reuse=True) > FALSE_ALARM


@on_cpu
@pytest.mark.parametrize("chain", [STEERED, OFTEN_REFUSED, SHARED])
def test_more_steps_than_row_by_row(chain, backend):
    block, token = (verify(chain, 7, verifier=verifier, backend=backend) for verifier in (couple_block, couple))
    gain = (block.outcome.committed - token.outcome.committed).double()
    assert float(gain.mean() / gain.std() * math.sqrt(COUNT)) > scipy.stats.norm.isf(DETECTED)


@on_cpu
@pytest.mark.parametrize("size", [0.3, 1.0])
def test_probability_of_going_on_is_the_mean_weight(size, backend):
    """``P(tau >= i) = E P_i``; for one draft that is ``2 Phi(-delta / 2)``, as for the maximal coupling."""
    done = verify(Chain(size), 6, backend=backend)
    given = done.inputs
    states, mean, noise = (part.flatten(2) for part in (given.draft_states, given.draft_mean, given.noise))
    gap = done.chain.mean(states[:, :-1].flatten(0, 1)).view_as(mean) - mean
    score = (noise[:, :-1] * gap).sum(-1) - gap.square().sum(-1) / 2
    weight = [torch.ones(COUNT)]
    for i in range(score.shape[1]):
        weight.append((weight[-1] * score[:, i].exp()).clamp(max=1))
        surplus = (done.outcome.committed > i + 1).double() - weight[-1]
        z = float(surplus.mean() / surplus.std() * math.sqrt(COUNT))
        assert abs(z) < scipy.stats.norm.isf(FALSE_ALARM / 2 / 5)
    single = verify(Chain(size), 2, backend=backend)
    expected = 2 * scipy.stats.norm.cdf(-0.2 * size / 2)
    accepted = int((single.outcome.committed == 2).sum())
    assert scipy.stats.binomtest(accepted, COUNT, expected).pvalue > FALSE_ALARM
    assert scipy.stats.binomtest(accepted, COUNT, expected * 0.95).pvalue < DETECTED


@pytest.mark.parametrize("delta", [1e-3, 0.1, 1.0, 4.0, 30.0])
@pytest.mark.parametrize("a", [1.0, 0.99, 0.5, 1e-3, 1e-12])
def test_residual_mass_and_tail_are_the_integrals(a, delta):
    def density(t: float) -> float:
        return a * scipy.stats.norm.pdf(t) - scipy.stats.norm.pdf(t + delta)

    arguments = constant(math.log(a)), constant(delta)
    end = float(reference.lower_end(*arguments))
    assert abs(density(end)) < 1e-12
    start = max(end, -12.0)
    expected = scipy.integrate.quad(density, start, max(start, 0.0) + 12, epsabs=0, epsrel=1e-10, limit=200)[0]
    mass = float(reference.residual_mass(*arguments))
    assert mass == pytest.approx(expected, rel=1e-7, abs=1e-15)
    if mass < 1e-200:
        return
    for u in (1.0, 0.999, 0.5, 1e-3, 2.0**-32):
        t = float(reference.draw_residual(*arguments, constant(u)))
        assert t >= start
        got = scipy.integrate.quad(density, t, max(t, 0.0) + 12, epsabs=0, epsrel=1e-8, limit=200)[0]
        assert got == pytest.approx(u * mass, rel=1e-5)


def test_extreme_weights_and_gaps_stay_finite():
    log_a = constant(0.0, -1e-16, -1e-8, -1.0, -100.0, reference.LOWEST_LOG_WEIGHT).repeat_interleave(6)
    delta = constant(reference.SMALLEST_GAP, 1e-15, 1e-7, 1.0, 1e6, 1e15).repeat(6)
    mass = reference.residual_mass(log_a, delta)
    assert bool(((mass >= 0) & (mass <= log_a.exp())).all())
    assert float(mass[log_a < -1e-3][(delta < 1e-6).nonzero()[0]]) == 0, "(a q - p)+ vanishes with the gap"
    for u in (1.0, 0.5, 2.0**-33):
        assert bool(reference.draw_residual(log_a, delta, torch.full_like(delta, u)).isfinite().all())


def ragged(lengths: list[int], mean_q: Tensor, padding: int = 0) -> CouplingArguments:
    """Arguments of slots of these lengths with drafts of mean 0 and deviation 1."""
    slots, length = len(lengths), max(lengths)
    noise = torch.randn(slots, length, *LATENT, generator=torch.Generator().manual_seed(0))
    states = torch.cat([torch.zeros(slots, 1, *LATENT), noise[:, :-1]], 1)
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    drafts = torch.zeros(slots, length - 1, *LATENT)
    output = torch.cat([mean_q, torch.full((padding, *LATENT), 7.0)])
    uniform = torch.full((slots, length), 0.3)
    columns = columns_for(1.0, slots, length)
    return CouplingArguments(states, drafts, drafts + 1, noise, None, uniform, output, offsets, columns, **PLAIN)


@on_cpu
def test_identical_laws_commit_everything(backend):
    """Every draft is kept, the last row is the ordinary step, and padding rows change nothing."""
    lengths = [3, 1, 0, 2]
    arguments = ragged(lengths, torch.zeros(6, *LATENT))
    outcome = call(couple_block, arguments, backend=backend)
    assert outcome.committed.tolist() == lengths
    for slot in (0, 1, 3):
        assert torch.equal(outcome.next_states[slot], arguments.noise[slot, lengths[slot] - 1])
    padded = call(couple_block, ragged(lengths, torch.zeros(6, *LATENT), padding=5), backend=backend)
    assert torch.equal(padded.next_states, outcome.next_states)


@on_cpu
@pytest.mark.parametrize("gap", [1e-30, 1e-6, 50.0, 1e14, 1e30, math.nan])
def test_gaps_of_any_size(gap, backend):
    """A gap in one row: tiny ones are not seen, huge ones stop the slot there and commit the target's state."""
    mean_q = torch.zeros(6, *LATENT)
    mean_q[1] = gap
    arguments = ragged([3, 3], mean_q)
    outcome = call(couple_block, arguments, backend=backend)
    assert outcome.committed.tolist() == ([3, 3] if gap < 1 else [2, 3])
    assert torch.equal(outcome.next_states[1], arguments.noise[1, 2])
    if gap == 50.0:
        whitened = outcome.next_states[0] - gap
        assert abs(float(whitened.sum() / 4) - scipy.stats.norm.isf(0.3)) < 1e-3
    elif gap > 1e15 or math.isnan(gap):
        torch.testing.assert_close(outcome.next_states[0], gap + arguments.noise[0, 1], equal_nan=True)


@on_cpu
def test_one_row_is_the_ordinary_step(backend):
    arguments = ragged([1, 1], torch.ones(2, *LATENT))
    outcome, token = call(couple_block, arguments, backend=backend), call(couple, arguments, backend=backend)
    assert torch.equal(outcome.next_states, token.next_states)
    assert outcome.committed.tolist() == [1, 1]


def test_guidance_and_gaps_are_those_of_couple():
    arguments = op_arguments(True)
    guided = call(couple_block, arguments)
    mixed = arguments._replace(output=guide(arguments.output, 2.0, 1), guidance_scale=1.0)
    # To rounding: guidance in the op runs on rows of another layout.
    torch.testing.assert_close(call(couple_block, mixed).next_states, guided.next_states)
    assert torch.equal(guided.gap_sq, call(couple, arguments).gap_sq)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"uniform": torch.ones(3, 2)}, "uniform must be"),
        ({"row_offsets": torch.zeros(3, dtype=torch.int32)}, "row_offsets must be int64"),
        (
            {"slack_noise": torch.zeros(2, 3, *LATENT)},
            "slack_noise must be given exactly where output has 2 C channels",
        ),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises((ValueError, TypeError), match=f"^couple_block: {message}"):
        call(couple_block, ragged([3, 3], torch.zeros(6, *LATENT)), **change)


@pytest.mark.parametrize("learned", [False, True])
def test_the_op_passes_opcheck(learned):
    torch.library.opcheck(torch.ops.free_kernels.couple_block.default, op_arguments(learned))


@pytest.mark.parametrize("backend", ["auto", *ON_CPU])
@pytest.mark.parametrize("learned", [False, True])
def test_numbers_by_their_keys(learned, backend):
    """The same as with numbers of the source that the sampler uses; each key counts."""
    given = philox_arguments(learned, True)._replace(relaxation=None)
    outcome, want = call(couple_block_philox, given, backend=backend), with_tensors(given, op=couple_block)
    assert torch.equal(outcome.committed, want.committed)
    live = outcome.committed > 0
    torch.testing.assert_close(outcome.next_states[live], want.next_states[live])
    for change in ({"seed": given.seed + 1}, {"images": given.images + 1}, {"rounds": given.rounds + 1}):
        other = call(couple_block_philox, given, **change, backend=backend)
        assert not torch.allclose(other.next_states[live], outcome.next_states[live])


@pytest.mark.parametrize("learned", [False, True])
def test_the_op_with_keys_passes_opcheck(learned):
    given = philox_arguments(learned, True)._replace(seed=-5, relaxation=None)
    torch.library.opcheck(torch.ops.free_kernels.couple_block_philox.default, given)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rounds": None}, TypeError, r"rounds must be int64 \[S\], since noise must be fresh in each round, got None"),
        ({"rounds": torch.zeros(4)}, TypeError, r"rounds must be int64 \[4\]"),
        ({"seed": 2**64}, ValueError, "seed must be an int in"),
        ({"backend": "cuda"}, ValueError, "backend must be one of 'auto', 'reference', 'extension', 'triton'"),
        ({"backend": "triton"}, RuntimeError, "backend 'triton' cannot be used: (it needs|importing Triton)"),
    ],
)
def test_wrong_keys_are_named(change, error, message):
    with pytest.raises(error, match=f"^couple_block_philox: {message}"):
        call(couple_block_philox, philox_arguments(True, True), **change)


def test_it_compiles_without_a_graph_break():
    def step(arguments):
        outcome = call(couple_block, arguments)
        return outcome.next_states, outcome.committed

    arguments, compiled = op_arguments(True), torch.compile(step, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(arguments), step(arguments), strict=True):
        torch.testing.assert_close(got, expected)
