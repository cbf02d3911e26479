"""Schedulers of diffusers whose steps are Gaussian, in every setting that matters, and their own steps."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    TCDScheduler,
)

from free_kernels import GaussianSchedule, schedule_from_diffusers
from free_kernels.constants import TransitionColumn

BETAS = (
    {"beta_schedule": "linear"},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"trained_betas": [0.001 + 0.00001 * step for step in range(1000)]},
)
# The last one ends above timestep 0.
GRIDS = (
    {"timestep_spacing": "linspace"},
    {"timestep_spacing": "leading"},
    {"timestep_spacing": "leading", "steps_offset": 1},
    {"timestep_spacing": "trailing"},
)
DIFFUSION = ("epsilon", "v_prediction", "sample")


class Case(NamedTuple):
    """A scheduler in a setting, what its ``set_timesteps`` is called with, and the eta of its steps."""

    kind: type
    settings: dict[str, Any]
    call: dict[str, Any]
    eta: float | None = None

    def scheduler(self) -> Any:
        """A new scheduler."""
        return self.kind(**self.settings)

    def schedule(self) -> GaussianSchedule:
        """Ours."""
        call = {"num_steps" if name == "num_inference_steps" else name: value for name, value in self.call.items()}
        return schedule_from_diffusers(self.scheduler(), eta=self.eta, **call)


def grid(number: int) -> dict[str, Any]:
    return {"num_inference_steps": number}


def cases(kind: type) -> Iterator[Case]:
    """Every setting of a scheduler that has a law."""
    nine, custom = grid(9), {"timesteps": [999, 700, 450, 449, 200, 60, 3]}
    zero_snr = {"rescale_betas_zero_snr": True}
    if kind is DDPMScheduler:
        variances, clips = ("fixed_small", "fixed_small_log", "fixed_large", "learned_range"), (None, 1.0, 0.4)
        for variance, prediction, spacing, clip in itertools.product(variances, DIFFUSION, GRIDS, clips):
            clipped = {"clip_sample": clip is not None, "clip_sample_range": clip or 1.0}
            yield Case(kind, {"variance_type": variance, "prediction_type": prediction, **spacing, **clipped}, nine)
        for betas, spacing in itertools.product(BETAS, GRIDS):
            yield Case(kind, {**betas, **spacing, "clip_sample": False, "variance_type": "fixed_large"}, nine)
        for variance, prediction in itertools.product(variances, DIFFUSION[1:]):
            settings = {"variance_type": variance, "prediction_type": prediction, "timestep_spacing": "trailing"}
            yield Case(kind, {**settings, **zero_snr}, nine)
        yield Case(kind, {"clip_sample": False}, custom)
    elif kind is DDIMScheduler:
        for eta, prediction, betas, spacing in itertools.product((0.3, 1.0), DIFFUSION, BETAS, GRIDS):
            for ends_at_data in (True, False):
                settings = {"prediction_type": prediction, "clip_sample": False, "set_alpha_to_one": ends_at_data}
                yield Case(kind, {**settings, **betas, **spacing}, nine, eta)
        settings = {"clip_sample": False, "timestep_spacing": "trailing", **zero_snr}
        # With eta 1 diffusers takes the root of a negative rounding error where the signal is zero.
        yield from (Case(kind, {**settings, "prediction_type": name}, nine, 0.5) for name in DIFFUSION[1:])
    elif kind is EulerAncestralDiscreteScheduler:
        for prediction, betas, spacing in itertools.product(DIFFUSION[:2], BETAS, GRIDS):
            for rescaled in ({}, zero_snr):
                yield Case(kind, {"prediction_type": prediction, **betas, **spacing, **rescaled}, nine)
    elif kind is DPMSolverMultistepScheduler:
        order = {"solver_order": 1, "algorithm_type": "sde-dpmsolver++"}
        ends = ({"final_sigmas_type": "zero"}, {"final_sigmas_type": "sigma_min"})
        for prediction, betas, spacing, end in itertools.product(DIFFUSION, BETAS, GRIDS, ends):
            yield Case(kind, {"prediction_type": prediction, **order, **betas, **spacing, **end}, nine)
        yield Case(kind, {**order, "prediction_type": "v_prediction", "timestep_spacing": "trailing", **zero_snr}, nine)
        for prediction, spacing in itertools.product(DIFFUSION, GRIDS):
            deprecated = {"solver_order": 1, "algorithm_type": "sde-dpmsolver", **ends[1]}
            yield Case(kind, {"prediction_type": prediction, **deprecated, **spacing}, nine)
        for name in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"):
            yield Case(kind, {**order, name: True}, nine)
        flow = {**order, "use_flow_sigmas": True, "prediction_type": "flow_prediction"}
        yield from (Case(kind, {**flow, "flow_shift": shift}, nine) for shift in (1.0, 3.0))
        yield Case(kind, order, custom)
    elif kind is TCDScheduler:
        for eta, prediction, betas in itertools.product((None, 0.3, 0.7, 1.0), DIFFUSION, BETAS):
            # Neither is read by its step.
            for unread in ({}, {"clip_sample": True, "clip_sample_range": 0.1}, {"thresholding": True}):
                yield Case(kind, {"prediction_type": prediction, **betas, **unread}, nine, eta)
        yield Case(kind, {}, custom, 0.5)
        yield from (Case(kind, {"prediction_type": name, **zero_snr}, nine, 0.5) for name in DIFFUSION[1:])
    elif kind is LCMScheduler:
        for prediction, betas, clip in itertools.product(DIFFUSION, BETAS, (None, 1.0, 0.4)):
            clipped = {"clip_sample": clip is not None, "clip_sample_range": clip or 1.0}
            yield Case(kind, {"prediction_type": prediction, **betas, **clipped}, nine)
        yield Case(kind, {"timestep_scaling": 0.001}, nine)
        yield Case(kind, {}, custom)
        yield from (Case(kind, {"prediction_type": name, **zero_snr}, nine) for name in DIFFUSION[1:])
    elif kind is FlowMatchEulerDiscreteScheduler:
        noisy = {"stochastic_sampling": True}
        for shift, terminal in itertools.product((1.0, 3.0), (None, 0.1)):
            yield Case(kind, {**noisy, "shift": shift, "shift_terminal": terminal}, nine)
        for name in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"):
            yield Case(kind, {**noisy, name: True}, nine)
        for shape in ("exponential", "linear"):
            yield Case(kind, {**noisy, "use_dynamic_shifting": True, "time_shift_type": shape}, {**nine, "mu": 0.8})
        yield Case(kind, noisy, {"sigmas": [1.0, 0.8, 0.5, 0.1]})
        yield Case(kind, noisy, {"sigmas": [1.0, 0.8, 0.5, 0.1], "timesteps": [1000.0, 700.5, 400.0, 50.25]})


KINDS = (
    DDPMScheduler,
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    DPMSolverMultistepScheduler,
    TCDScheduler,
    LCMScheduler,
    FlowMatchEulerDiscreteScheduler,
)


class Inputs(NamedTuple):
    """Random ``states``, ``outputs`` and ``noise [K, C, H, W]`` of every step, in our conventions."""

    states: torch.Tensor
    outputs: torch.Tensor
    noise: torch.Tensor

    @staticmethod
    def random(num_steps: int, learned: bool = False) -> Inputs:
        generator = torch.Generator().manual_seed(num_steps)
        states, outputs, v, noise = torch.randn(4, num_steps, 2, 3, 3, generator=generator, dtype=torch.float64)
        return Inputs(states, torch.cat([outputs, v.tanh()], 1) if learned else outputs, noise)


def prepared(case: Case, double: bool) -> Any:
    """The scheduler after ``set_timesteps``; with ``double`` its tables in float64: what is left is the formula."""
    scheduler = case.scheduler()
    scheduler.set_timesteps(**case.call)
    for name in ("alphas_cumprod", "final_alpha_cumprod", "one", "sigmas") if double else ():
        if isinstance(getattr(scheduler, name, None), torch.Tensor):
            setattr(scheduler, name, getattr(scheduler, name).double())
    return scheduler


def input_scale(scheduler: Any, step: int) -> float:
    """What a scheduler divides its state by, for the network."""
    if not isinstance(scheduler, EulerAncestralDiscreteScheduler):
        return 1.0
    return float((scheduler.sigmas[step].double() ** 2 + 1).sqrt())


def their_steps(monkeypatch, case: Case, inputs: Inputs, double: bool) -> torch.Tensor:
    """``scheduler.step`` at every step, each from its own state and with its own noise, in the network's scale."""
    scheduler, results = prepared(case, double), []
    eta = {} if case.eta is None else {"eta": case.eta}
    is_flow = case.kind is FlowMatchEulerDiscreteScheduler or scheduler.config.get("use_flow_sigmas")
    sign = -1 if is_flow else 1
    module = sys.modules[case.kind.__module__]
    for k in range(len(inputs.states)):
        monkeypatch.setattr(module, "randn_tensor", lambda *_, k=k, **__: inputs.noise[k : k + 1])
        t = scheduler.timesteps[k]
        t = t if t.is_floating_point() else int(t)
        state, output = inputs.states[k : k + 1] * input_scale(scheduler, k), sign * inputs.outputs[k : k + 1]
        if not double:
            state, output = state.float(), output.float()
        after = scheduler.step(output, t, state, **eta).prev_sample.double()
        results.append(after / input_scale(scheduler, k + 1))
    return torch.cat(results)


def terms(schedule: GaussianSchedule, inputs: Inputs) -> dict[str, torch.Tensor]:
    """The terms of every step in float64, by name, and the predicted clean sample's two."""
    channels = inputs.states.shape[1]
    column = schedule.columns.view(-1, len(TransitionColumn), 1, 1, 1).unbind(1)
    prediction, v = inputs.outputs[:, :channels], inputs.outputs[:, channels:]
    log_std = column[TransitionColumn.LOG_STD]
    if len(v[0]):
        log_std = log_std + column[TransitionColumn.LOG_STD_SLOPE] * v
    return {
        "x0 from state": column[TransitionColumn.X0_FROM_STATE] * inputs.states,
        "x0 from output": column[TransitionColumn.X0_FROM_OUTPUT] * prediction,
        "x0": column[TransitionColumn.MEAN_FROM_X0],
        "state": column[TransitionColumn.MEAN_FROM_STATE_GIVEN_X0] * inputs.states,
        "noise": log_std.exp() * inputs.noise,
    }


def our_steps(schedule: GaussianSchedule, inputs: Inputs) -> torch.Tensor:
    """The same by the coefficients in float64."""
    part = terms(schedule, inputs)
    x0 = (part["x0 from state"] + part["x0 from output"]).clamp(-schedule.clip, schedule.clip)
    return part["state"] + part["x0"] * x0 + part["noise"]
