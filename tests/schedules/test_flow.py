"""Flow models: transitions against the SDE, exactness on Gaussian data, the SiT adapter, training and the drafter."""

from __future__ import annotations

import dataclasses
import math
import pickle
from dataclasses import dataclass

import mutations
import numpy as np
import pytest
import torch
from analytic import DETECTED, FALSE_ALARM, BiasedDrafter, GaussianTarget, PerfectDrafter, law_p_value
from call_by_call import play_call_by_call

import free_kernels.sampling.round
from free_dit import DiT, DiTConfig, cli, load_bundled
from free_dit.bundled import MODELS
from free_dit.data import load_digits
from free_dit.generation import ChainSettings
from free_dit.networks.families import load_model, save_model, schedule_for
from free_dit.networks.sit import SiT
from free_dit.train_drafter import DrafterTrainConfig, train_drafter
from free_dit.training.image_losses import VelocityLoss
from free_dit.training.loop import LoopConfig
from free_dit.training.train_dit import TrainConfig, train
from free_kernels import (
    DDIMSchedule,
    DDPMSchedule,
    DiTTarget,
    DrafterConfig,
    FeatureDrafter,
    FlowSDESchedule,
    Schedule,
    SiTTarget,
    ancestral_sample,
    sample,
)
from free_kernels.constants import TIME_TICKS, TransitionColumn
from free_kernels.ops.coupling import gaussian_transition
from free_kernels.schedules.flow import DIFFUSIONS, interpolate, shifted
from free_kernels.targets import as_target

IMAGES, LABEL = 3000, 1
LABELS = torch.full((IMAGES,), LABEL)


@dataclass
class GaussianFlow(GaussianTarget):
    """The exact velocity, noise or score of data ``N(class mean, class std^2)``: linear in x."""

    interpolant: str = "linear"
    prediction: str = "velocity"
    family = "flow"
    num_train_steps = TIME_TICKS

    def __post_init__(self) -> None:
        super().__post_init__()
        # What the biased drafter scales its bias by: about the step's noise over the velocity's weight.
        self.alphas = 1 - interpolate("linear", torch.arange(TIME_TICKS) / TIME_TICKS)[1]

    def linear(self, t: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        alpha, sigma, d_alpha, d_sigma = interpolate(self.interpolant, t.double().unsqueeze(1) / TIME_TICKS)
        variance = self.stds[y].double() ** 2
        total = alpha**2 * variance + sigma**2
        slope = {
            "velocity": (d_alpha * alpha * variance + d_sigma * sigma) / total,
            "noise": sigma / total,
            "score": -1 / total,
        }[self.prediction]
        offset = -slope * alpha * self.means[y] + (d_alpha * self.means[y] if self.prediction == "velocity" else 0.0)
        return slope.float(), offset.float()


class TestSchedule:
    @pytest.mark.parametrize("prediction", ["velocity", "noise", "score"])
    @pytest.mark.parametrize("diffusion", DIFFUSIONS)
    @pytest.mark.parametrize("interpolant", ["linear", "gvp"])
    def test_steps_are_the_sdes(self, interpolant, diffusion, prediction):
        """``x + (v + D s) dt`` and ``2 D dt``, with the score of the Gaussian marginal itself instead of one from v."""
        schedule = FlowSDESchedule(
            40, interpolant, diffusion, 0.7, prediction=prediction, first_time=0.02, last_step_size=0.05
        )
        target = GaussianFlow(interpolant=interpolant, prediction=prediction)
        t = schedule.times
        assert float(t[0]) == 0.02
        assert float(t[-1]) == 0.95
        x = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
        y = torch.full((40,), LABEL)
        output = target.head(target.features(x.view(-1, 1, 4, 4), schedule.timesteps, y), t, y)
        mean, std = gaussian_transition(x.view_as(output), output, schedule.table())

        alpha, sigma, d_alpha, d_sigma = (part.unsqueeze(1) for part in interpolate(interpolant, t))
        data_variance, data_mean = target.stds[LABEL].double() ** 2, target.means[LABEL].double()
        score = (alpha * data_mean - x) / (alpha**2 * data_variance + sigma**2)
        noise = -sigma * score
        velocity = d_alpha * (x - sigma * noise) / alpha + d_sigma * noise
        forms = {
            "sigma": 0.7 * sigma,
            "linear": 0.7 * (1 - t.unsqueeze(1)),
            "constant": torch.full_like(sigma, 0.7),
            "increasing-decreasing": 0.7 * torch.sin(math.pi * t.unsqueeze(1)) ** 2,
            "decreasing": 0.25 * (0.7 * torch.cos(math.pi * t.unsqueeze(1)) + 1) ** 2,
            # Of the linear path it is (1 - t) / t; of any path sigma^2 (log(alpha / sigma))'.
            "sbdm": 0.7 * sigma**2 * (d_alpha / alpha - d_sigma / sigma),
            "grpo": 0.7**2 / 2 * (1 - t.unsqueeze(1)) / t.unsqueeze(1),
        }
        drift = forms[diffusion]
        dt = torch.cat([t[1:], torch.ones(1)]).unsqueeze(1) - t.unsqueeze(1)
        expected = x + (velocity + drift * score) * dt
        torch.testing.assert_close(mean.flatten(1).double(), expected, rtol=1e-4, atol=1e-4)
        spread = (2 * drift * dt).sqrt().expand_as(expected)
        torch.testing.assert_close(std.flatten(1)[:-1].double(), spread[:-1], rtol=1e-5, atol=1e-6)
        assert bool((std[-1] == 0).all()), "the last step adds no noise"

    @pytest.mark.parametrize("last_step", ["mean", "euler", "tweedie"])
    def test_last_steps(self, last_step):
        schedule = FlowSDESchedule(20, "gvp", last_step=last_step, last_step_size=0.1)
        x, v = torch.randn(2, 20, 1, 2, 2, generator=torch.Generator().manual_seed(0))
        mean, _ = gaussian_transition(x, v, schedule.table())
        alpha, sigma, d_alpha, d_sigma = (float(part) for part in interpolate("gvp", torch.tensor(0.9).double()))
        # The two expectations that velocity and state are made of.
        clean, noise = torch.linalg.solve(
            torch.tensor([[alpha, sigma], [d_alpha, d_sigma]]), torch.stack([x[-1].flatten(), v[-1].flatten()])
        )
        score = -noise / sigma
        expected = {
            "mean": x[-1].flatten() + 0.1 * (v[-1].flatten() + sigma * score),
            "euler": x[-1].flatten() + 0.1 * v[-1].flatten(),
            "tweedie": clean,
        }[last_step]
        torch.testing.assert_close(mean[-1].flatten(), expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("last_step", ["mean", "euler", "tweedie"])
    @pytest.mark.parametrize("prediction", ["velocity", "noise", "score"])
    def test_means_from_the_clean_sample_are_the_same(self, prediction, last_step):
        table = FlowSDESchedule(30, "gvp", first_time=0.05, last_step=last_step, prediction=prediction).table()
        state, output = torch.randn(2, 30, 1, 2, 2, generator=torch.Generator().manual_seed(0))
        plain, _ = gaussian_transition(state, output, table)
        clipped, _ = gaussian_transition(state, output, table, clip=1e9)
        torch.testing.assert_close(plain, clipped, rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("diffusion", ["sigma", "constant", "decreasing", "increasing-decreasing"])
    @pytest.mark.parametrize("interpolant", ["linear", "gvp"])
    def test_chains_approach_the_data(self, interpolant, diffusion):
        """In closed form: mean and deviation at the end come closer to the data's as steps grow."""
        target, errors = GaussianFlow(interpolant=interpolant), []
        for steps in (25, 100, 400):
            schedule = FlowSDESchedule(steps, interpolant, diffusion, last_step="tweedie", last_step_size=1 / steps)
            mean, std = map(torch.from_numpy, target.final_law(schedule, LABEL))
            errors.append(
                float(torch.maximum((mean - target.means[LABEL]).abs(), (std - target.stds[LABEL]).abs()).max())
            )
        assert errors[1] < 0.5 * errors[0]
        assert errors[2] < 0.5 * errors[1]
        assert errors[2] < 0.01

    def test_a_wrong_score_does_not_approach_the_data(self, monkeypatch):
        """Negative control of the test above: noise without the score's drift."""
        plain = FlowSDESchedule.table

        def without_score(schedule, variance="fixed"):
            table = plain(schedule, variance)
            table[:-1, TransitionColumn.MEAN_FROM_STATE] = 1.0
            table[:-1, TransitionColumn.MEAN_FROM_OUTPUT] = schedule.times.diff().float()
            return table

        monkeypatch.setattr(FlowSDESchedule, "table", without_score)
        schedule = FlowSDESchedule(400, last_step="tweedie", last_step_size=1 / 400)
        _, std = map(torch.from_numpy, GaussianFlow().final_law(schedule, LABEL))
        assert float((std - GaussianFlow().stds[LABEL]).abs().max()) > 0.1

    def test_times_are_the_grid_to_half_a_tick(self):
        schedule = FlowSDESchedule(250)
        assert isinstance(schedule, Schedule)
        assert schedule.timesteps.dtype == torch.int64
        grid = torch.linspace(0, 0.96, 250, dtype=torch.float64)
        assert float((schedule.times - grid).abs().max()) <= 0.5 / TIME_TICKS
        assert bool((schedule.timesteps.diff() > 0).all())
        # Multiples of a tick are met exactly.
        assert FlowSDESchedule(25).timesteps.tolist() == [4000 * k for k in range(25)]
        assert FlowSDESchedule(1).timesteps.tolist() == [0]

    @pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 7.0])
    def test_a_shift_moves_noise_levels(self, shift):
        """``s u / (1 + (s - 1) u)`` of u = 1 - t, to half a tick; the ends of time stay."""
        plain, schedule = FlowSDESchedule(40), FlowSDESchedule(40, shift=shift)
        noise = 1 - torch.linspace(0, 0.96, 40, dtype=torch.float64)
        wanted = shift * noise / (1 + (shift - 1) * noise)
        assert float((1 - schedule.times - wanted).abs().max()) <= 0.5 / TIME_TICKS + 1e-12
        torch.testing.assert_close(shifted(torch.tensor([0.0, 1.0]), shift), torch.tensor([0.0, 1.0]))
        # The ratio of data to noise, t / (1 - t), is divided by s.
        t = shifted(torch.tensor(0.3, dtype=torch.float64), shift)
        assert float(t / (1 - t)) == pytest.approx(0.3 / 0.7 / shift)
        assert torch.equal(schedule.timesteps, plain.timesteps) == (shift == 1.0)
        # Shifts by s and by 1 / s are inverse.
        torch.testing.assert_close(shifted(shifted(plain.times, shift), 1 / shift), plain.times)

    def test_given_times_are_the_steps(self):
        times = [0.0, 0.1, 0.25, 0.5, 0.8, 0.95]
        schedule = FlowSDESchedule(times=times)
        assert schedule.timesteps.tolist() == [0, 10000, 25000, 50000, 80000, 95000]
        assert (schedule.num_steps, schedule.first_time) == (6, 0.0)
        assert schedule.last_step_size == pytest.approx(0.05)
        variance = (2 * schedule.table()[:-1, TransitionColumn.LOG_STD].double()).exp()
        t = torch.tensor(times, dtype=torch.float64)
        torch.testing.assert_close(variance, 2 * (1 - t[:-1]) * t.diff(), rtol=1e-5, atol=0)
        for same in (torch.tensor(times), np.array(times), tuple(times)):
            other = FlowSDESchedule(times=same)
            assert other == schedule
            assert hash(other) == hash(schedule)
            assert torch.equal(other.table(), schedule.table())
        assert FlowSDESchedule(times=[0.0, 0.2, 0.25, 0.5, 0.8, 0.95]) != schedule
        assert FlowSDESchedule(times=FlowSDESchedule(9, shift=3.0).times).timesteps.equal(
            FlowSDESchedule(9, shift=3.0).timesteps
        )

    def test_copies_keep_their_times(self):
        for schedule in (FlowSDESchedule(times=[0.1, 0.3, 0.9]), FlowSDESchedule(20), FlowSDESchedule(20, shift=3.0)):
            copied = dataclasses.replace(schedule, diffusion="linear")
            assert torch.equal(copied.timesteps, schedule.timesteps)
            assert copied.diffusion == "linear"
            assert pickle.loads(pickle.dumps(schedule)) == schedule
        given = FlowSDESchedule(times=[0.1, 0.3, 0.9])
        for name, value in {"shift": 3.0, "num_steps": 4, "first_time": 0.2, "last_step_size": 0.2}.items():
            with pytest.raises(ValueError, match=f"FlowSDESchedule: {name} must be"):
                dataclasses.replace(given, **{name: value})

    def test_times_of_another_schedule(self):
        other = FlowSDESchedule(20, shift=3.0)
        for arguments in ({}, {"num_steps": 20}, {"num_steps": 20, "first_time": 0.0}):
            assert torch.equal(FlowSDESchedule(**arguments, times=other.times).timesteps, other.timesteps)
        for arguments in ({"num_steps": 10}, {"first_time": 0.5}, {"last_step_size": 0.5}):
            with pytest.raises(ValueError, match=f"{next(iter(arguments))} must be left out or"):
                FlowSDESchedule(**arguments, times=other.times)
        given = {"times": other.times.tolist(), "last_step_size": 1 - float(other.times[-1])}
        copied = dataclasses.replace(FlowSDESchedule(20), **given)
        assert torch.equal(copied.timesteps, other.timesteps)

    @pytest.mark.parametrize(
        "change",
        [
            {"num_steps": 250},
            {"num_steps": 7},
            {"shift": 3.0},
            {"last_step_size": 0.04},
            {"last_step_size": 0.2},
            {"first_time": 0.0},
            {"first_time": 0.3},
            {"num_train_steps": 1000},
            {"num_steps": 12, "shift": 1.0},
            {"times": [0.1, 0.3, 0.9], "num_steps": 3, "first_time": 0.1, "last_step_size": 0.1, "shift": 1.0},
        ],
        ids=lambda change: "-".join(change),
    )
    @pytest.mark.parametrize(
        "arguments",
        [{}, {"num_steps": 30}, {"num_steps": 50, "last_step_size": 0.1}, {"num_steps": 20, "first_time": 0.1}]
        + [{"num_steps": 20, "shift": 2.0}],
        ids=lambda arguments: "-".join(arguments) or "defaults",
    )
    def test_copies_with_another_grid(self, arguments, change):
        copied = dataclasses.replace(FlowSDESchedule(**arguments), **change)
        made = FlowSDESchedule(**arguments | change)
        assert copied == made
        assert torch.equal(copied.timesteps, made.timesteps)
        assert copied.num_steps == len(copied.timesteps) == (arguments | change).get("num_steps", 250)

    def test_coefficients_follow_the_rounded_times(self):
        """Ticks so coarse that steps differ in length: every step is as long as its own two ticks say."""
        schedule = FlowSDESchedule(8, num_train_steps=30, diffusion="constant")
        assert schedule.timesteps.diff().unique().tolist() == [4, 5]
        variance = (2 * schedule.table()[:-1, TransitionColumn.LOG_STD].double()).exp()
        torch.testing.assert_close(variance, 2 * schedule.timesteps.diff().double() / 30, rtol=1e-5, atol=0)

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"num_steps": 0}, ValueError, "num_steps must be an int in"),
            ({"interpolant": "vp"}, ValueError, "interpolant must be one of 'linear', 'gvp'"),
            ({"diffusion": "none"}, ValueError, "diffusion must be one of"),
            ({"diffusion_norm": 0.0}, ValueError, "diffusion_norm must be above 0"),
            ({"last_step": "none"}, ValueError, "last_step must be one of"),
            ({"last_step_size": 0.0}, ValueError, "last_step_size must be a finite number in"),
            ({"first_time": 0.97}, ValueError, "first_time must be a finite number in"),
            ({"num_steps": 99, "num_train_steps": 100}, ValueError, "num_steps must be at most the 0.96 x 100 ticks"),
            ({"diffusion": "sbdm"}, ValueError, "first_time must be above 0 with diffusion 'sbdm'"),
            ({"prediction": "noise"}, ValueError, "first_time must be above 0 with diffusion 'sigma' and prediction"),
            ({"prediction": 1}, ValueError, "prediction must be one of"),
            ({"shift": 0.0}, ValueError, "shift must be above 0, got 0"),
            ({"shift": -1.0}, ValueError, "shift must be a finite number in"),
            ({"shift": "3"}, TypeError, "shift must be a finite number in"),
            ({"times": "linear"}, TypeError, "times must be None, a sequence of numbers or a tensor"),
            ({"times": []}, ValueError, "times must be increasing from noise to data in"),
            ({"times": [[0.1], [0.2]]}, ValueError, "times must be increasing from noise to data in"),
            ({"times": [0.0, 0.5, 1.0]}, ValueError, r"times must be .* got values in \[0, 1\]"),
            ({"times": [-0.1, 0.5]}, ValueError, r"times must be .* got values in \[-0.1, 0.5\]"),
            ({"times": [0.0, float("nan")]}, ValueError, r"times must be .* got values in \[nan"),
            ({"times": [0.9, 0.5, 0.1]}, ValueError, "times must be .* got falling ones"),
            ({"times": [0.0, 0.5, 0.4]}, ValueError, "times must be .* got times that share a tick or fall"),
            ({"times": [0.0, 0.5, 0.500001]}, ValueError, "times must be .* got times that share a tick or fall"),
            ({"times": [0.0, 0.999999]}, ValueError, "times must be .* got times that share a tick or fall"),
            ({"times": [0.0, 0.5], "num_steps": 3}, ValueError, "num_steps must be left out or 2 with these times"),
            ({"times": [0.0, 0.5], "first_time": 0.1}, ValueError, "first_time must be left out or 0 with these"),
            ({"times": [0.0, 0.5], "last_step_size": 0.1}, ValueError, "last_step_size must be left out or 0.5"),
            ({"times": [0.0, 0.5], "shift": 2.0}, ValueError, "shift must be 1 where times are given"),
            ({"times": [0.0, 0.5], "diffusion": "sbdm"}, ValueError, "first_time must be above 0 with diffusion"),
        ],
    )
    def test_wrong_arguments_are_named(self, arguments, error, message):
        with pytest.raises(error, match=f"^FlowSDESchedule: {message}"):
            FlowSDESchedule(**arguments)


class TestExactness:
    """The law of whole runs against closed forms, with a drafter that is wrong half of the time."""

    @pytest.mark.parametrize(
        ("settings", "guidance"),
        [
            ({}, 1.0),
            ({}, 2.0),
            ({"interpolant": "gvp", "diffusion": "decreasing", "last_step": "tweedie"}, 1.0),
            # D = 0 at t = 0: the first step has no noise, and is never drafted.
            ({"diffusion": "increasing-decreasing", "last_step": "euler"}, 1.0),
            ({"prediction": "score", "first_time": 0.02, "diffusion": "sbdm"}, 1.0),
            ({"shift": 3.0}, 2.0),
            ({"times": [0.0, 0.05, 0.2, 0.3, 0.45, 0.7, 0.8, 0.95]}, 1.0),
        ],
    )
    @pytest.mark.parametrize("reuse", [False, True])
    def test_law_is_the_ordinary_samplers(self, settings, guidance, reuse):
        target = GaussianFlow(
            interpolant=settings.get("interpolant", "linear"), prediction=settings.get("prediction", "velocity")
        )
        drafter, schedule = BiasedDrafter(target, eps_bias=2.0), FlowSDESchedule(**{"num_steps": 8} | settings)
        chosen = {"drafter": drafter, "guidance_scale": guidance, "seed": 11, "reuse_refused": reuse}
        result = sample(target, LABELS, schedule=schedule, **chosen)
        worst = 0.95 if reuse else 0.8
        assert 0.1 < result.stats.acceptance < worst, "the drafter has to be bad enough to exercise reflection"
        law = target.final_law(schedule, LABEL, guidance)
        assert law_p_value(result.samples, *law, drafter.direction) > FALSE_ALARM

    @pytest.mark.parametrize(
        "mutation",
        [
            mutations.wrong_reflection_sign,
            mutations.fresh_sample_on_rejection,
            mutations.draft_kept_on_some_rejections,
            mutations.always_accept,
        ],
        ids=lambda value: value.__name__,
    )
    def test_wrong_couplings_are_found(self, mutation, monkeypatch):
        torch.manual_seed(0)
        target = GaussianFlow()
        drafter, schedule = BiasedDrafter(target, eps_bias=2.0), FlowSDESchedule(8)
        play_call_by_call(monkeypatch)
        monkeypatch.setattr(free_kernels.sampling.round, "couple", mutation)
        result = sample(target, LABELS, schedule=schedule, drafter=drafter, seed=11)
        assert law_p_value(result.samples, *target.final_law(schedule, LABEL), drafter.direction) < DETECTED

    def test_law_of_the_ordinary_sampler(self):
        target, schedule = GaussianFlow(), FlowSDESchedule(8)
        result = ancestral_sample(target, LABELS, schedule=schedule, seed=5)
        law = target.final_law(schedule, LABEL)
        assert law_p_value(result.samples, *law, BiasedDrafter(target).direction) > FALSE_ALARM

    @pytest.mark.parametrize("draft_length", [3, "auto"])
    def test_law_of_block_verification_and_automatic_lengths(self, draft_length):
        target, schedule = GaussianFlow(), FlowSDESchedule(12)
        drafter = BiasedDrafter(target, eps_bias=0.5)
        settings = {"schedule": schedule, "draft_length": draft_length, "verification": "block", "seed": 2}
        result = sample(target, LABELS, drafter=drafter, **settings)
        assert law_p_value(result.samples, *target.final_law(schedule, LABEL), drafter.direction) > FALSE_ALARM

    @pytest.mark.parametrize("guidance", [1.0, 1.7])
    def test_a_perfect_drafter_returns_the_ordinary_images(self, guidance):
        target, labels = SiTTarget(random_sit()), torch.tensor([0, 3, 4])
        settings = {"schedule": FlowSDESchedule(15), "guidance_scale": guidance, "seed": 4}
        expected = ancestral_sample(target, labels, **settings).samples
        result = sample(target, labels, drafter=PerfectDrafter(target), **settings)
        assert result.stats.acceptance > 0.99
        torch.testing.assert_close(result.samples, expected, rtol=1e-3, atol=1e-3)


CONFIG = DiTConfig(8, 2, 4, 48, 3, 4, 5)


def random_sit(config: DiTConfig = CONFIG) -> SiT:
    """A SiT whose every weight is random: adaLN-Zero's zeros would hide mistakes."""
    torch.manual_seed(0)
    module = SiT(config).eval().requires_grad_(False)
    for parameter in module.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.1)
    return module


class TestTarget:
    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 4e-2)], ids=str)
    @pytest.mark.parametrize("learn_sigma", [True, False])
    def test_features_and_head_are_the_modules_forward(self, learn_sigma, dtype, tolerance):
        module = random_sit(DiTConfig(**{**CONFIG.to_dict(), "learn_sigma": learn_sigma})).to(dtype)
        target = SiTTarget(module)
        assert not target.learns_variance
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(6, 4, 8, 8, generator=generator)
        t, y = torch.tensor([0, 1, 12_345, 50_000, 96_000, 99_999]), torch.arange(6)
        expected = module(x.to(dtype), t.float() / TIME_TICKS, y)
        assert expected.shape == (6, 4, 8, 8)
        for network in (target, target.hoisted(t, y)):
            output = network.head(network.features(x, t, y), t, y)
            error = float((output - expected).float().abs().max())
            assert error <= tolerance * float(expected.float().abs().max())
        # Times that differ are told apart.
        assert float((expected[2] - module(x[2:3].to(dtype), torch.tensor([0.9]), y[2:3])[0]).abs().max()) > 1e-4

    def test_a_learned_second_half_is_dropped(self):
        module, labels = random_sit(), torch.tensor([0, 4])
        expected = ancestral_sample(SiTTarget(module), labels, schedule=FlowSDESchedule(6)).samples
        linear = module.final_layer.linear
        second = torch.arange(linear.out_features) % 8 >= 4
        linear.weight[second], linear.bias[second] = 1e3, 1e3
        torch.testing.assert_close(
            ancestral_sample(SiTTarget(module), labels, schedule=FlowSDESchedule(6)).samples, expected
        )

    def test_our_own_sit_is_recognised_and_a_foreign_one_is_wrapped(self):
        assert isinstance(as_target("sample", random_sit()), SiTTarget)
        foreign = DiT(CONFIG).eval()
        assert not isinstance(as_target("sample", foreign), SiTTarget)
        assert isinstance(as_target("sample", SiTTarget(foreign)), SiTTarget)

    @pytest.mark.parametrize("sampler", [sample, ancestral_sample])
    def test_schedules_of_the_other_family_are_refused(self, sampler):
        labels, flow, noise = torch.tensor([1]), SiTTarget(random_sit()), DiTTarget(DiT(CONFIG).eval())
        for schedule in (DDPMSchedule(8), DDIMSchedule(8, 1.0)):
            with pytest.raises(
                ValueError, match=r"schedule must be one for a flow model such as FlowSDESchedule\(\), "
            ):
                sampler(flow, labels, schedule=schedule)
        with pytest.raises(ValueError, match=r"schedule must be one for a diffusion model such as DDPMSchedule\(\), "):
            sampler(noise, labels, schedule=FlowSDESchedule(8))
        with pytest.raises(ValueError, match="schedule must be one with the target's num_train_steps 100000, got 1000"):
            sampler(flow, labels, schedule=FlowSDESchedule(8, num_train_steps=1000))

    def test_coarser_ticks(self):
        """The tick is a matter of bookkeeping: where both hold the same times the images are the same."""
        module, labels = random_sit(), torch.tensor([1, 2])
        fine = ancestral_sample(SiTTarget(module), labels, schedule=FlowSDESchedule(25)).samples
        coarse = FlowSDESchedule(25, num_train_steps=50)
        torch.testing.assert_close(ancestral_sample(SiTTarget(module, 50), labels, schedule=coarse).samples, fine)


class TestDrafter:
    CONFIG = DrafterConfig(width=32, time_unit=100)

    def test_change_scales_follow_times_of_either_direction(self):
        schedule = FlowSDESchedule(20)
        states = torch.randn(20, 5, 4, 8, 8) * torch.linspace(1, 3, 20).view(-1, 1, 1, 1, 1)
        drafter = FeatureDrafter((4, 8, 8), (16, 48), 5, self.CONFIG)
        drafter.set_change_scale(schedule.timesteps, states)
        sizes = states.diff(dim=0).flatten(1).square().mean(1).sqrt()
        at = torch.div(schedule.timesteps[1:], 100, rounding_mode="floor")
        torch.testing.assert_close(drafter.change_rms[at], sizes, rtol=1e-2, atol=0)
        assert bool((drafter.change_rms[at[5:]].diff() > 0).all())

    def test_hoisted_drafts_are_the_same(self):
        drafter = FeatureDrafter((4, 8, 8), (16, 48), 5, self.CONFIG).eval().requires_grad_(False)
        for parameter in drafter.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
        timesteps, labels = FlowSDESchedule(12).timesteps, torch.arange(4)
        feature, previous, state = torch.randn(4, 16, 48), torch.randn(4, 4, 8, 8), torch.randn(4, 4, 8, 8)
        t = timesteps[[1, 4, 7, 11]]
        expected = drafter(feature, previous, state, t, labels)
        torch.testing.assert_close(
            drafter.hoisted(timesteps, labels)(feature, previous, state, t, labels), expected, rtol=1e-4, atol=1e-4
        )
        assert float((expected - drafter(feature, previous, state, t.flip(0), labels)).abs().max()) > 1e-2

    def test_a_drafter_of_another_time_is_refused(self):
        drafter = FeatureDrafter((4, 8, 8), (16, 48), 5, DrafterConfig(width=32)).eval()
        with pytest.raises(ValueError, match="^FeatureDrafter: timesteps must be below the 1000 that the drafter"):
            sample(SiTTarget(random_sit()), torch.tensor([1]), schedule=FlowSDESchedule(8), drafter=drafter)

    def test_training_and_saving(self, tmp_path):
        loop = LoopConfig(iterations=3, checkpoint_every=10, log_every=1)
        config = DrafterTrainConfig(
            DrafterConfig(width=32), loop, num_steps=12, batch_size=4, trajectories=4, calibration_images=2
        )
        target = SiTTarget(random_sit())
        assert schedule_for(target, 12) == FlowSDESchedule(12)
        drafter = FeatureDrafter.load(train_drafter(target, config, tmp_path, "test"), target)
        assert drafter.config.time_unit == 100
        settings = {"schedule": FlowSDESchedule(12), "drafter": drafter}
        assert sample(target, torch.tensor([1, 2]), **settings).stats.call_reduction >= 1


class TestTraining:
    @pytest.mark.parametrize("interpolant", ["linear", "gvp"])
    def test_the_true_velocity_has_no_loss(self, interpolant):
        """Of data that is one point the velocity is a function of (x, t)."""
        point = torch.tensor([0.3, -0.8]).view(1, 2, 1, 1)

        def exact(x, t, y):
            alpha, sigma, d_alpha, d_sigma = (part.view(-1, 1, 1, 1) for part in interpolate(interpolant, t.double()))
            return d_alpha * point + d_sigma * (x - alpha * point) / sigma

        torch.manual_seed(0)
        loss, figures = VelocityLoss(interpolant)(exact, point.expand(64, -1, 4, 4), torch.zeros(64).long())
        assert float(loss) < 1e-6
        assert figures["mse"] == pytest.approx(float(loss))
        wrong, _ = VelocityLoss(interpolant)(lambda *a: -exact(*a), point.expand(64, -1, 4, 4), torch.zeros(64).long())
        assert float(wrong) > 1

    def test_a_trained_sit_is_one_again_when_loaded(self, tmp_path):
        config = TrainConfig(DiTConfig(8, 2, 1, 32, 2, 2, 10), LoopConfig(iterations=2), "digits", 4, "velocity")
        module = load_model(train(config, tmp_path))
        assert type(module) is SiT
        result = sample(module, torch.tensor([3]), schedule=FlowSDESchedule(8))
        assert result.samples.shape == (1, 1, 8, 8)
        save_model(tmp_path / "dit.safetensors", DiT(config.model))
        assert type(load_model(tmp_path / "dit.safetensors")) is DiT

    def test_unknown_objectives_are_refused(self, tmp_path):
        with pytest.raises(ValueError, match="^train: objective must be one of 'noise', 'velocity', got 'score'"):
            train(TrainConfig(objective="score"), tmp_path)


# Noise that drafter training has not seen.
BUNDLED = {"schedule": FlowSDESchedule(250), "seed": 2**63 + 1234}


@pytest.fixture(scope="module")
def pair():
    return load_bundled("digits_sit")


class TestBundled:
    """The shipped digits SiT and its drafter."""

    def test_the_pair_belongs_together(self, pair):
        target, drafter = pair
        assert isinstance(target, SiTTarget)
        assert drafter.config.time_unit * drafter.config.num_timesteps == target.num_train_steps
        assert drafter.calibration is not None
        folder = MODELS / "digits_sit"
        assert sum(path.stat().st_size for path in folder.glob("*.safetensors")) < 3_000_000

    @pytest.mark.slow
    def test_learned_drafts_save_calls(self, pair):
        target, drafter = pair
        runs = [sample(target, torch.arange(16) % 10, drafter=one, **BUNDLED).stats for one in ("frozen", drafter)]
        assert min(run.call_reduction for run in runs) > 5
        # Clean samples commit nearly as much here: no more rounds than theirs beyond chance.
        more = runs[1].rounds_per_image - runs[0].rounds_per_image
        assert more.mean() <= 3 * more.std() / len(more) ** 0.5
        assert runs[1].bias_bound == 0.0

    @pytest.mark.slow
    def test_a_perfect_drafter_returns_the_ordinary_images(self, pair):
        target, labels = pair[0], torch.arange(6)
        settings = {"schedule": FlowSDESchedule(40), "guidance_scale": 1.5}
        expected = ancestral_sample(target, labels, **settings).samples
        result = sample(target, labels, drafter=PerfectDrafter(target), **settings)
        torch.testing.assert_close(result.samples, expected, rtol=1e-3, atol=1e-3)

    @pytest.mark.slow
    def test_samples_are_digits(self, pair):
        """A nearest-neighbour classifier trained on the real digits reads the samples as what they were asked to be."""
        from sklearn.neighbors import KNeighborsClassifier

        target, drafter = pair
        labels, data = torch.arange(64) % 10, load_digits("train")
        reader = KNeighborsClassifier(3).fit(data.images.flatten(1), data.labels)
        images = sample(target, labels, drafter=drafter, guidance_scale=2.0, **BUNDLED).samples
        assert reader.score(images.flatten(1), labels) > 0.9
        assert reader.score(images.flatten(1), labels.roll(1)) < 0.3

    def test_command_line(self, tmp_path):
        """The schedule follows the model."""
        cli.sample(tmp_path / "x.npz", "digits_sit", num=3, chain=ChainSettings(steps=20, seed=3))
        with np.load(tmp_path / "x.npz") as file:
            shown = file["arr_0"]
        target, drafter = load_bundled("digits_sit")
        expected = sample(target, torch.arange(3), schedule=FlowSDESchedule(20), drafter=drafter, seed=3).samples
        assert np.abs(shown[..., 0] - ((expected.clamp(-1, 1) + 1) * 127.5).round()[:, 0].numpy()).max() <= 1
