"""Guidance scales of steps and images: what they come to, in every sampler and place, and what is refused."""

from __future__ import annotations

import pytest
import torch
from analytic import BiasedDrafter, GaussianTarget, PerfectDrafter

from free_kernels import DDPMSchedule, FlowSDESchedule, ancestral_sample, feasibility, sample, sample_iter
from free_kernels.extension import has_extension
from free_kernels.ops.coupling import couple, couple_block, gaussian_transition
from free_kernels.ops.drafting import AdvanceArguments
from free_kernels.ops.drafting.api import ADVANCE
from free_kernels.sampling.guidance import (
    SCALE_OF_MIXED,
    GuidanceScales,
    guidance_of,
    mixed,
    scale_of_images,
    step_times,
)
from free_kernels.sampling.job import make_job
from free_kernels.sampling.options import Options
from free_kernels.sampling.round import packed_values

STEPS = DDPMSchedule(20)
LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0])
BY_IMAGE = torch.tensor([1.0, 0.0, 0.4, 2.0, 3.0, 4.0, 7.5])
BACKENDS = ("reference", "extension") if has_extension() else ("reference",)


@pytest.fixture(params=[False, True], ids=["fixed", "learned"])
def target(request):
    return GaussianTarget(learns_variance=request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("scale", [0.0, 0.25, 0.5, 1.0, 1.5, 7.5])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_mixed_outputs_give_the_transition_of_their_scale(dtype, scale, channels):
    """To the last bits of the interpolation, which is done once in either form."""
    generator = torch.Generator().manual_seed(3)
    state, output = (
        torch.randn(5, 4, 3, 3, generator=generator),
        torch.randn(10, 8, 3, 3, generator=generator).to(dtype),
    )
    columns = STEPS.table("learned_range")[3:8]
    settings = {"guidance_channels": channels}
    given = mixed(output, torch.full((5,), scale), channels)
    assert torch.equal(given[5:, channels:], output[5:, channels:].float())
    got = gaussian_transition(state, given, columns, guidance_scale=SCALE_OF_MIXED, **settings)
    wanted = gaussian_transition(
        state, output[:5] if scale == 1.0 else output, columns, guidance_scale=scale, **settings
    )
    for one, other in zip(got, wanted, strict=True):
        # Three roundings of numbers up to (1 + 2 |scale|) max|e|.
        bound = (
            3 * torch.finfo(torch.float32).eps * (1 + 2 * scale) * float(output.float().abs().max() + state.abs().max())
        )
        torch.testing.assert_close(one, other, rtol=0, atol=0 if scale == 1.0 else bound)


def test_mixing_leaves_the_networks_output_alone_and_takes_rows_of_scale_one_as_they_are():
    output = torch.randn(4, 2, 2, 2) * 1e6
    before = output.clone()
    given = mixed(output, torch.tensor([1.0, 2.0]), 2)
    assert torch.equal(output, before)
    assert torch.equal(given[2], output[0])
    assert not torch.equal(given[3], output[3])


def test_scales_of_steps_and_images():
    values, steps, images = torch.arange(6.0).view(3, 2), torch.tensor([[0, 1], [2, 1]]), torch.tensor([[0, 1], [1, 0]])
    scales = GuidanceScales(values, torch.ones(3, dtype=torch.bool))
    assert scales.at(steps, images).tolist() == [[0.0, 3.0], [5.0, 2.0]]
    assert scales.at(steps, torch.tensor([[0], [1]])).tolist() == [[0.0, 2.0], [5.0, 3.0]]
    by_step = GuidanceScales(values[:, :1], torch.ones(3, dtype=torch.bool))
    assert by_step.at(steps, images).tolist() == [[0.0, 2.0], [4.0, 2.0]]
    by_image = GuidanceScales(values[:1], torch.ones(3, dtype=torch.bool))
    assert by_image.at(steps, images).tolist() == [[0.0, 1.0], [1.0, 0.0]]
    assert by_image.at(steps, torch.tensor([[0], [1]])).tolist() == [[0.0, 0.0], [1.0, 1.0]]


def test_rows_are_packed_slot_by_slot():
    values = torch.arange(12.0).view(4, 3)
    offsets = torch.tensor([0, 3, 3, 4, 6])
    assert packed_values(values, offsets, 6).tolist() == [0.0, 1.0, 2.0, 6.0, 9.0, 10.0]
    # Rows behind the last slot may have any scale.
    assert packed_values(values, offsets, 8).tolist()[:6] == [0.0, 1.0, 2.0, 6.0, 9.0, 10.0]


@pytest.mark.parametrize(
    ("scale", "interval", "number"),
    [
        (3.0, None, 3.0),
        (3.0, (0, 999), 3.0),
        (3.0, (1000.5, 2000.0), 1.0),
        (torch.full((7,), 3.0), None, 3.0),
        (torch.ones(7), None, 1.0),
        (torch.ones(7), (100, 200), 1.0),
        (lambda step: 3.0, None, 3.0),
        (lambda step: torch.tensor(3.0), None, 3.0),
        (lambda step: 1, (100, 200), 1.0),
        (3.0, (100, 200), None),
        (torch.arange(7), None, None),
        (lambda step: step, None, None),
        (lambda step: BY_IMAGE if step else 2.0, None, None),
    ],
)
def test_what_is_the_same_everywhere_is_one_number(scale, interval, number):
    found, scales = guidance_of("sample", scale, interval, STEPS, 7)
    assert (found, scales is None) == ((SCALE_OF_MIXED, False) if number is None else (number, True))


@pytest.mark.filterwarnings("ignore:.*holds none of the steps")
def test_a_number_is_the_same_images_bit_for_bit(target):
    drafter = BiasedDrafter(target)
    for sampler, own in ((sample, {"drafter": drafter, "max_slots": 3}), (ancestral_sample, {})):
        given = {"schedule": STEPS, "seed": 2} | own
        limited = given | {"guidance_scale": 3.0}
        number = sampler(target, LABELS, guidance_scale=3.0, **given).samples
        for scale in (torch.full((7,), 3.0), lambda step: 3.0):
            assert torch.equal(sampler(target, LABELS, guidance_scale=scale, **given).samples, number)
        assert torch.equal(sampler(target, LABELS, guidance_interval=(0, 999), **limited).samples, number)
        none = sampler(target, LABELS, **given).samples
        assert torch.equal(sampler(target, LABELS, guidance_interval=(2e3, 3e3), **limited).samples, none)


@pytest.mark.parametrize("drafter", ["frozen", "biased"])
@pytest.mark.parametrize("verification", ["token", "block"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_image_has_its_own_scale_in_any_slot(target, drafter, verification, backend):
    """Image by image the one that its number gives, with slots that images leave and enter; scale 1 is unguided."""
    given = {"drafter": drafter if drafter == "frozen" else BiasedDrafter(target), "backend": backend}
    given |= {"schedule": STEPS, "seed": 5, "verification": verification}
    slots = {"guidance_scale": BY_IMAGE, "max_slots": 2}
    whole = sample(target, LABELS, **slots, **given).samples
    for image, scale in enumerate(BY_IMAGE.tolist()):
        alone = sample(target, LABELS, guidance_scale=scale, **given).samples[image]
        torch.testing.assert_close(whole[image], alone, rtol=1e-4, atol=1e-4)
    iterated = {
        one.index: one.sample for one in sample_iter(target, LABELS, guidance_scale=BY_IMAGE, max_slots=2, **given)
    }
    torch.testing.assert_close(torch.stack([iterated[i] for i in range(7)]), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["interval", "step", "image"])
@pytest.mark.parametrize("graphs", [False, True], ids=["", "as captured"])
def test_perfect_drafts_are_the_ordinary_images(target, kind, graphs, monkeypatch):
    keywords = {
        "interval": {"guidance_scale": 3.0, "guidance_interval": (200, 700)},
        "step": {"guidance_scale": lambda step: 1 + step % 3},
        "image": {"guidance_scale": lambda step: BY_IMAGE * step / 20},
    }[kind]
    given = {"schedule": STEPS, "seed": 8} | keywords
    wanted = ancestral_sample(target, LABELS, **given).samples
    result = sample(target, LABELS, drafter=PerfectDrafter(target), max_slots=3, **given)
    torch.testing.assert_close(result.samples, wanted, rtol=1e-4, atol=1e-4)
    assert result.stats.acceptance > 0.999
    if graphs:
        # Rounds of fixed shapes, as a CUDA graph has them.
        from free_kernels.sampling.job import make_job
        from free_kernels.sampling.options import Options
        from free_kernels.sampling.speculative import Speculation

        options = Options(drafter=PerfectDrafter(target), max_slots=3, **given)
        run = Speculation(make_job("sample", target, LABELS, options), dense=True)
        run.run()
        torch.testing.assert_close(run.samples, wanted, rtol=1e-4, atol=1e-4)


def test_steps_outside_are_the_conditional_ones_and_cost_no_second_branch():
    """The chain by hand; the ordinary sampler has no unconditional rows where no image is guided."""

    class Counting(GaussianTarget):
        rows = ()

        def features(self, x, t, y):
            self.rows += (len(x),)
            return super().features(x, t, y)

    target = Counting()
    noise = torch.randn(len(LABELS), 20, *target.latent_shape, generator=torch.Generator().manual_seed(1))
    given = {"schedule": STEPS, "noise": noise, "guidance_scale": 3.0, "guidance_interval": (300, 600)}
    got = ancestral_sample(target, LABELS, **given).samples
    guided = [300 <= t <= 600 for t in STEPS.timesteps.tolist()]
    assert 0 < sum(guided) < 20
    assert target.rows == tuple(14 if one else 7 for one in guided)
    x, table, null = noise[:, 0], STEPS.table("fixed_small"), torch.full_like(LABELS, 3)
    for k, t in enumerate(STEPS.timesteps):
        t = t.expand(len(x))
        output = target.head(target.features(x, t, LABELS), t, LABELS)
        if guided[k]:
            without = target.head(target.features(x, t, null), t, null)
            output = without + 3.0 * (output - without)
        mean, std = gaussian_transition(x, output, table[k : k + 1])
        x = mean + (std * noise[:, k + 1] if k < 19 else 0)
    torch.testing.assert_close(got, x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("schedule", "interval", "span"),
    [
        (STEPS, (0.1, 0.7), "999 to 0"),
        (FlowSDESchedule(11), (200, 700), "0 to 0.96"),
    ],
)
def test_an_interval_without_a_step_is_warned_of(schedule, interval, span):
    """As one in another unit is."""
    with pytest.warns(
        UserWarning, match=rf"^sample: guidance_interval .* holds none of the steps' times, .* {span}: no"
    ):
        assert guidance_of("sample", 2.0, interval, schedule, 1) == (1.0, None)


def test_intervals_are_in_the_schedules_own_time():
    assert step_times(STEPS).tolist() == STEPS.timesteps.tolist()
    flow = FlowSDESchedule(11, last_step_size=0.1, first_time=0.1)
    assert torch.equal(step_times(flow), flow.times)
    _, scales = guidance_of("sample", 2.0, (0.18, 0.5), flow, 1)
    assert scales.inside.tolist() == [0.18 <= t <= 0.5 for t in flow.times.tolist()]
    assert 0 < scales.inside.sum() < 11
    # Both ends belong to it.
    first, last = STEPS.timesteps[[4, 2]].tolist()
    _, scales = guidance_of("sample", 2.0, (first, last), STEPS, 1)
    assert scales.inside.nonzero().flatten().tolist() == [2, 3, 4]


@pytest.mark.parametrize("sampler", [sample, ancestral_sample])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"guidance_scale": [1.0, 2.0]}, TypeError, "guidance_scale must be a finite number in"),
        ({"guidance_scale": True}, TypeError, "guidance_scale must be a finite number in"),
        ({"guidance_scale": -1.0}, ValueError, r"guidance_scale must be a finite number in \[0, inf\), got -1"),
        ({"guidance_scale": torch.ones(6)}, ValueError, r"guidance_scale must be finite numbers in .* a tensor \[7\]"),
        ({"guidance_scale": torch.ones(7, 1)}, ValueError, r"guidance_scale must be .* got float32 \[7, 1\]"),
        ({"guidance_scale": torch.ones(7, dtype=torch.bool)}, TypeError, "guidance_scale must be finite numbers"),
        ({"guidance_scale": torch.full((7,), torch.nan)}, ValueError, r"guidance_scale must be .* got values in \[nan"),
        ({"guidance_scale": -torch.ones(7)}, ValueError, r"guidance_scale must be .* got values in \[-1, -1\]"),
        ({"guidance_scale": lambda step: None}, TypeError, r"guidance_scale\(0\) must be a finite number"),
        ({"guidance_scale": lambda step: 3 - step}, ValueError, r"guidance_scale\(4\) must be .* got -1"),
        ({"guidance_scale": lambda step: torch.ones(3)}, ValueError, r"guidance_scale\(0\) must be .* a tensor \[7\]"),
        ({"guidance_interval": 0.5}, TypeError, "guidance_interval must be None or two finite numbers"),
        ({"guidance_interval": (0.5,)}, TypeError, "guidance_interval must be None or two finite numbers"),
        ({"guidance_interval": ("0", "1")}, TypeError, "guidance_interval must be None or two finite numbers"),
        ({"guidance_interval": (2, 1)}, ValueError, r"guidance_interval must be .* got \(2, 1\)"),
        ({"guidance_interval": (0, float("inf"))}, ValueError, "guidance_interval must be"),
    ],
)
def test_wrong_scales_are_named(sampler, arguments, error, message):
    with pytest.raises(error, match=f"^{sampler.__name__}: {message}"):
        sampler(GaussianTarget(), LABELS, schedule=STEPS, **arguments)


def test_targets_without_a_null_label_take_scale_one_only():
    class Unguided(GaussianTarget):
        has_null_label = False

    target = Unguided()
    sample(target, LABELS, schedule=STEPS, guidance_scale=torch.ones(7))
    for keywords in ({"guidance_scale": BY_IMAGE}, {"guidance_scale": 2.0, "guidance_interval": (100, 200)}):
        with pytest.raises(ValueError, match="guidance_scale must be 1 for a target trained without label dropout"):
            sample(target, LABELS, schedule=STEPS, **keywords)


def test_a_forecast_is_of_one_number():
    with pytest.raises(TypeError, match="^feasibility: guidance_scale must be a finite number"):
        feasibility(GaussianTarget(), schedule=STEPS, guidance_scale=BY_IMAGE)


def test_parts_of_a_job_take_their_images_scales():
    images = torch.tensor([2, 5])
    assert scale_of_images(BY_IMAGE, images, 7).tolist() == [BY_IMAGE[2], BY_IMAGE[5]]
    assert scale_of_images(2.0, images, 7) == 2.0
    by_step = scale_of_images(lambda step: BY_IMAGE * step if step else 3.0, images, 7)
    assert by_step(0) == 3.0
    assert by_step(2).tolist() == [2 * BY_IMAGE[2], 2 * BY_IMAGE[5]]


def test_torchs_defaults_have_no_effect():
    wanted = [guidance_of("sample", *given, STEPS, 7) for given in ((2.0, (100, 300)), (BY_IMAGE, None))]
    flow = FlowSDESchedule(times=[0.0, 0.3, 0.8]).timesteps
    with torch.device("meta"):
        torch.set_default_dtype(torch.float64)
        try:
            got = [guidance_of("sample", *given, STEPS, 7) for given in ((2.0, (100, 300)), (BY_IMAGE, None))]
            assert torch.equal(FlowSDESchedule(times=[0.0, 0.3, 0.8]).timesteps, flow)
        finally:
            torch.set_default_dtype(torch.float32)
    for (_, one), (_, other) in zip(wanted, got, strict=True):
        assert one.values.dtype == other.values.dtype == torch.float32
        assert torch.equal(one.values, other.values)
        assert torch.equal(one.inside, other.inside)


def test_automatic_lengths_know_levels_of_guidance_apart(target):
    """What is learned of drafts at one scale is not taken for that of others."""

    def level(scale, interval=None) -> tuple[int, int]:
        options = Options(schedule=STEPS, guidance_scale=scale, guidance_interval=interval)
        return make_job("sample", target, LABELS, options).guidance_level

    scales = ((BY_IMAGE,), (BY_IMAGE + 3,), (8.0,), (8.0, (100, 300)), (8.0, (100, 700)), (0.0,))
    apart = [level(*given) for given in scales]
    assert len(set(apart)) == len(apart)
    # Negative control: every request of a server with a scale of its own would begin anew.
    assert level(BY_IMAGE) == level(BY_IMAGE + 0.01) == level(BY_IMAGE.flip(0))
    result = sample(target, LABELS, schedule=STEPS, guidance_scale=BY_IMAGE, draft_length="auto", max_slots=2)
    assert result.samples.isfinite().all()


def a_round(length: int, learned: bool):
    """Ragged slots of drafts, outputs of both branches, and a scale for every packed row."""
    generator = torch.Generator().manual_seed(7)

    def normals(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    counts, latent = [length, 1, 0, length - 1, length], (2, 3, 3)
    slots, rows = len(counts), sum(counts)
    steps = torch.tensor([3, 19, 0, 7, 11]).unsqueeze(1) + torch.arange(length)
    columns = STEPS.table("learned_range" if learned else "fixed_small")[steps.clamp(max=19)]
    offsets = torch.tensor([0, *counts]).cumsum(0)
    drafts = normals(slots, length, *latent), normals(slots, length - 1, *latent)
    noise = normals(slots, length, *latent), normals(slots, length, *latent) if learned else None
    output = normals(2 * rows, 4 if learned else 2, 3, 3)
    scales = torch.tensor([0.0, 0.3, 1.0, 2.0, 7.5]).repeat(rows)[:rows]
    conditional, unconditional = output.chunk(2)
    # One branch that is guided already, in float64.
    guided = conditional.double()
    guided[:, :1] = unconditional[:, :1].double() + scales.view(-1, 1, 1, 1) * (guided - unconditional)[:, :1]
    uniform = torch.rand(slots, length, generator=generator).clamp(min=1e-3)
    return drafts, noise, uniform, output, offsets, columns, scales, guided.float()


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", [couple, couple_block])
def test_coupling_of_rows_with_scales_of_their_own(op, backend, learned):
    """As of a network with one branch that says what guidance makes of the two."""
    (states, mean), (noise, slack), uniform, output, offsets, columns, scales, guided = a_round(4, learned)
    # Near enough to the target for some drafts to be accepted.
    rows = (offsets[:-1, None] + torch.arange(3)).clamp(max=len(guided) - 1).flatten()
    there = gaussian_transition(states[:, :3].flatten(0, 1), guided[rows], columns[:, :3].flatten(0, 1))
    mean = there[0].view_as(mean) + 0.02 * mean
    std = there[1].reshape_as(mean)
    states[:, 1:] = mean + std * noise[:, :3]
    given = states, mean, std, noise, slack, uniform
    mixed_rows = mixed(output, scales, 1)
    got = op(*given, mixed_rows, offsets, columns, guidance_scale=SCALE_OF_MIXED, guidance_channels=1, backend=backend)
    wanted = op(*given, guided, offsets, columns, backend="reference")
    assert torch.equal(got.committed, wanted.committed)
    assert got.committed.max() > 1
    live = wanted.committed > 0
    torch.testing.assert_close(got.next_states[live], wanted.next_states[live], rtol=1e-4, atol=1e-4)
    # A wrong scale of one row is seen.
    wrong = op(
        *given,
        mixed(output, scales.roll(1), 1),
        *(offsets, columns),
        guidance_scale=SCALE_OF_MIXED,
        guidance_channels=1,
        backend=backend,
    )
    assert float((wrong.next_states[live] - wanted.next_states[live]).abs().max()) > 1e-2


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_drafts_from_rows_with_scales_of_their_own(backend, learned):
    (states, mean), (noise, _), _, output, _, columns, scales, guided = a_round(4, learned)
    held = len(scales)
    rows = torch.arange(15).view(5, 3) % held

    def drafted(output: torch.Tensor, backend: str, *settings: float) -> tuple[torch.Tensor, ...]:
        made = states.clone(), torch.zeros_like(mean), torch.zeros_like(mean)
        arguments = AdvanceArguments(*made, noise, columns, output, rows, 0, 3, *settings)
        ADVANCE(arguments, output, backend)
        return made

    got = drafted(mixed(output, scales, 1), backend, SCALE_OF_MIXED, 1, float("inf"))
    wanted = drafted(guided, "reference", 1.0, 2, float("inf"))
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
