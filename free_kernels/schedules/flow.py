"""Transitions of flow and interpolant models (SiT, rectified flow): Euler-Maruyama steps of their SDE are Gaussian."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field
from typing import Any

import torch
from torch import Tensor

from free_kernels.constants import TIME_TICKS, TransitionColumn
from free_kernels.validation import check_choice, check_float, check_int, fail

INTERPOLANTS = ("linear", "gvp")
DIFFUSIONS = ("sigma", "linear", "constant", "decreasing", "increasing-decreasing", "sbdm", "grpo")
PREDICTIONS = ("velocity", "noise", "score")
LAST_STEPS = ("mean", "euler", "tweedie")
# What times decide where they are given, and what stands for these arguments where nothing is.
_GRID = {"num_steps": 250, "last_step_size": 0.04, "first_time": 0.0}
_LEFT_OUT: Any = None


def interpolate(interpolant: str, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """alpha, sigma and their time derivatives of ``x_t = alpha data + sigma noise``; t is 0 at noise and 1 at data.

    Args:
        interpolant: ``"linear"`` (alpha = t, sigma = 1 - t) or ``"gvp"`` (a sine and a cosine: unit total variance).
        t: any shape, in ``[0, 1]``.
    """
    if interpolant == "linear":
        return t, 1 - t, torch.ones_like(t), -torch.ones_like(t)
    angle = t * (math.pi / 2)
    alpha, sigma = angle.sin(), angle.cos()
    return alpha, sigma, sigma * (math.pi / 2), alpha * (-math.pi / 2)


def shifted(t: Tensor, shift: float) -> Tensor:
    """Times whose noise level u = 1 - t becomes ``s u / (1 + (s - 1) u)``: with s above 1 more steps are noisy ones.

    Source: Esser et al. 2024 (Stable Diffusion 3, arXiv 2403.03206), section 5.3.2, whose t is u; s is 3 there.

    Args:
        t: any shape, in ``[0, 1]``, 0 at noise.
        shift: s, above 0; 1 changes nothing.
    """
    noise = 1 - t
    return 1 - shift * noise / (1 + (shift - 1) * noise)


@dataclass(frozen=True)
class FlowSDESchedule:
    """Euler-Maruyama steps of a flow model's SDE (SiT: Ma et al. 2024, arXiv 2401.08740).

    A path ``x_t = alpha_t data + sigma_t noise`` with t = 0 at noise and t = 1 at data has the velocity
    ``v = alpha' E[data | x] + sigma' E[noise | x]`` and the score ``s = (alpha v - alpha' x) / (sigma (alpha' sigma -
    alpha sigma'))``. For any D_t >= 0 the SDE ``dx = (v + D s) dt + sqrt(2 D) dW`` has the path's marginals (the
    paper's w_t is 2 D_t). Its steps ``x + (v + D s) dt + sqrt(2 D dt) z`` are Gaussian with a mean linear in (x, v).

    The K times are ``linspace(first_time, 1 - last_step_size, K)``, shifted by ``shift``, or ``times`` as they are;
    rounded to ticks of ``1 / num_train_steps``, and every coefficient is that of the rounded times, which the network
    sees. The last step goes from there to the data without noise. ``schedule.times`` are those of every step, float64
    ``[K]``.

    Args:
        num_steps: K, network calls of a chain, the last step's included; 250 if left out.
        interpolant: ``"linear"`` or ``"gvp"``; what the network was trained with.
        diffusion: D_t over ``diffusion_norm``: ``"sigma"`` (sigma_t), ``"linear"`` (1 - t), ``"constant"`` (1),
            ``"increasing-decreasing"`` (sin^2(pi t)), ``"sbdm"`` (``alpha' sigma^2 / alpha - sigma sigma'``, that of
            the time-reversed diffusion; infinite at t = 0); or ``"decreasing"``, which is
            ``(diffusion_norm cos(pi t) + 1)^2 / 4``; or ``"grpo"``, which is ``diffusion_norm^2 u / (2 (1 - u))`` of
            the noise level u = 1 - t, so that a step's deviation is ``eta sqrt(u / (1 - u)) sqrt(dt)`` with the norm as
            eta (Flow-GRPO: Liu et al. 2025, arXiv 2505.05470; at u = 1 the divisor is the next step's, as in its
            code). That of DanceGRPO (Xue et al. 2025, arXiv 2505.07818), ``eta sqrt(dt)``, is ``"constant"`` with norm
            ``eta^2 / 2``.
        diffusion_norm: scale of D_t, above 0.
        last_step: ``"mean"`` (the SDE's step without its noise), ``"euler"`` (the velocity's step) or ``"tweedie"``
            (the expected data).
        last_step_size: time that is left for the last step, in ``(0, 1)``, before the shift: the score is singular at
            t = 1. 0.04 if left out.
        first_time: t of pure noise; above 0 where something is singular at t = 0. 0 if left out.
        prediction: what the network predicts: ``"velocity"``, ``"noise"`` or ``"score"``.
        num_train_steps: ticks in the unit of time; the target's own (:class:`free_kernels.SiTTarget`).
        shift: s in :func:`shifted`; above 0, and 1 where ``times`` are given.
        times: times of the steps, increasing in ``[0, 1)`` from noise to data, a sequence or a tensor ``[K]``; they
            give ``num_steps``, ``first_time`` and ``last_step_size``. Noise levels u, which fall from 1 as those of
            diffusers and of SD3 do, are times ``1 - u``. None: the grid above. ``dataclasses.replace`` makes a grid of
            the copy's own arguments; it takes another schedule's times as a list.
        window: ``(first, end)``: steps ``first <= k < end`` are the SDE's, and D_t is 0 at all others, which are Euler
            steps of the velocity without noise (MixGRPO: Li et al. 2025, arXiv 2507.21802); an empty one leaves the
            ODE, whose steps nothing can draft (``draft_length=1``). None: all steps.

    Raises:
        ValueError, TypeError: an argument is out of range or of another type, two times share a tick, a coefficient
            is infinite at ``first_time``, or another argument contradicts ``times``.
    """

    num_steps: int = _LEFT_OUT
    interpolant: str = "linear"
    diffusion: str = "sigma"
    diffusion_norm: float = 1.0
    last_step: str = "mean"
    last_step_size: float = _LEFT_OUT
    first_time: float = _LEFT_OUT
    prediction: str = "velocity"
    num_train_steps: int = TIME_TICKS
    shift: float = 1.0
    # The attribute of this name is a property, set below.
    times: InitVar[Sequence[float] | Tensor | None] = None
    window: tuple[int, int] | None = None
    _given_ticks: tuple[int, ...] | None = field(default=None, init=False)

    # Must equal the target's `family`, where the target has one.
    family = "flow"
    # Bound of the predicted clean sample: none.
    clip = math.inf

    def __post_init__(self, times: Sequence[float] | Tensor | None) -> None:
        where = "FlowSDESchedule"
        given = {name for name in _GRID if getattr(self, name) is not _LEFT_OUT}
        for name in _GRID.keys() - given:
            object.__setattr__(self, name, _GRID[name])
        check_int(where, "num_train_steps", self.num_train_steps, 2)
        check_int(where, "num_steps", self.num_steps, 1, self.num_train_steps - 1)
        check_choice(where, "interpolant", self.interpolant, INTERPOLANTS)
        check_choice(where, "diffusion", self.diffusion, DIFFUSIONS)
        check_choice(where, "last_step", self.last_step, LAST_STEPS)
        check_choice(where, "prediction", self.prediction, PREDICTIONS)
        if check_float(where, "diffusion_norm", self.diffusion_norm, 0.0) == 0.0:
            fail(where, "diffusion_norm", "above 0 (an ODE's steps have no noise to speculate with)", "0")
        tick = 1 / self.num_train_steps
        check_float(where, "last_step_size", self.last_step_size, tick, 1 - tick)
        check_float(where, "first_time", self.first_time, 0.0, 1 - self.last_step_size)
        if check_float(where, "shift", self.shift, 0.0) == 0.0:
            fail(where, "shift", "above 0", "0")
        # `dataclasses.replace` names all of them, and brings along the times that its original made of its own.
        is_copy = given == _GRID.keys() and getattr(times, "made_of_a_grid", False)
        if times is not None and not is_copy:
            self._take_times(where, times, given)
        self._check_window(where)
        if bool((self.timesteps.diff() < 1).any()):
            room = f"at most the {1 - self.last_step_size - self.first_time:g} x {self.num_train_steps} ticks of time"
            fail(where, "num_steps", room, str(self.num_steps))
        if not bool(self.table().narrow(1, 0, 2).isfinite().all()):
            expectation = f"above 0 with diffusion {self.diffusion!r} and prediction {self.prediction!r}"
            fail(where, "first_time", expectation, f"{self.first_time:g}")

    def _check_window(self, where: str) -> None:
        if self.window is None:
            return
        wanted = f"None or (first, end) with 0 <= first <= end <= {self.num_steps}"
        if not isinstance(self.window, tuple | list) or len(self.window) != 2:
            fail(where, "window", wanted, self.window, TypeError)
        first, end = (check_int(where, "window", bound, 0, self.num_steps) for bound in self.window)
        if first > end:
            fail(where, "window", wanted, repr((first, end)))
        object.__setattr__(self, "window", (first, end))

    def _take_times(self, where: str, times: Sequence[float] | Tensor, given: set[str]) -> None:
        """Make given times the schedule's own, which the arguments of the names ``given`` must agree with."""
        try:
            values = torch.as_tensor(times, dtype=torch.float64, device="cpu")
        except (TypeError, ValueError, RuntimeError):
            fail(where, "times", "None, a sequence of numbers or a tensor [K]", times, TypeError)
        wanted = "increasing from noise to data in [0, 1), a sequence or tensor [K]"
        if values.ndim != 1 or not len(values):
            fail(where, "times", wanted, values)
        if not bool(values.isfinite().all()) or not 0 <= float(values.min()) <= float(values.max()) < 1:
            fail(where, "times", wanted, f"values in [{float(values.min()):g}, {float(values.max()):g}]")
        ticks = (values * self.num_train_steps).round().long()
        if bool((ticks.diff() < 1).any()) or int(ticks[-1]) >= self.num_train_steps:
            falling = len(values) > 1 and bool((values.diff() < 0).all())
            hint = "falling ones (noise levels u are times 1 - u)" if falling else "times that share a tick or fall"
            fail(where, "times", f"{wanted}, at least a tick of 1 / {self.num_train_steps} apart", hint)
        # A copy of these times need not be an own list of ticks.
        if len(ticks) == self.num_steps and torch.equal(ticks, self._grid()):
            return
        unit, (first, last) = self.num_train_steps, ticks[[0, -1]].tolist()
        ends = {"num_steps": len(ticks), "first_time": first / unit, "last_step_size": (unit - last) / unit}
        for name, value in ends.items():
            own = getattr(self, name)
            if name in given and abs(own - value) * self.num_train_steps > 0.5:
                fail(where, name, f"left out or {value:g} with these times", f"{own:g}")
            object.__setattr__(self, name, value)
        if self.shift != 1.0:
            fail(where, "shift", "1 where times are given, which are taken as they are", f"{self.shift:g}")
        object.__setattr__(self, "_given_ticks", tuple(ticks.tolist()))

    def _grid(self) -> Tensor:
        """Ticks of the steps where no times are given."""
        # With one step, that step starts at pure noise and is also the last.
        times = torch.linspace(
            self.first_time, 1 - self.last_step_size, self.num_steps, dtype=torch.float64, device="cpu"
        )
        # Without a shift the formula would only add its rounding.
        times = times if self.shift == 1.0 else shifted(times, self.shift)
        return (times * self.num_train_steps).round().long()

    @functools.cached_property
    def timesteps(self) -> Tensor:
        """Ticks shown to the target at step k = 0 (noise) ... K-1 (last); int64 ``[K]``, ascending."""
        return self._grid() if self._given_ticks is None else torch.tensor(self._given_ticks, device="cpu")

    def resolve_variance(self, learns_variance: bool) -> str:
        """The variance type in force: the SDE's own, whatever the network learns."""
        return "fixed"

    @functools.cached_property
    def diffusions(self) -> Tensor:
        """D_t of every step, float64 ``[K]``; 0 outside of the window."""
        step = torch.arange(self.num_steps, device="cpu")
        first, end = self.window or (0, self.num_steps)
        return torch.where((step >= first) & (step < end), self._all_diffusions(), 0.0)

    def _all_diffusions(self) -> Tensor:
        """D_t of every step, whatever the window."""
        t = self.times
        alpha, sigma, d_alpha, d_sigma = interpolate(self.interpolant, t)
        if self.diffusion == "decreasing":
            return (self.diffusion_norm * (math.pi * t).cos() + 1).square() / 4
        if self.diffusion == "grpo":
            after = torch.cat([t[1:], torch.ones_like(t[:1])])
            return self.diffusion_norm**2 * (1 - t) / (2 * torch.where(t == 0, after, t))
        form = {
            "sigma": sigma,
            "linear": 1 - t,
            "constant": torch.ones_like(t),
            "increasing-decreasing": (math.pi * t).sin().square(),
            "sbdm": d_alpha / alpha * sigma.square() - sigma * d_sigma,
        }
        return self.diffusion_norm * form[self.diffusion]

    def table(self, variance: str = "fixed") -> Tensor:
        """Transition coefficients, float32 ``[K, 8]``, rows in sampling order, columns of :class:`TransitionColumn`."""
        alpha, sigma, d_alpha, d_sigma = interpolate(self.interpolant, self.times)
        speed = d_alpha * sigma - alpha * d_sigma
        zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
        # Velocity and score as pairs of coefficients, of the state and of the network's output.
        if self.prediction == "velocity":
            velocity, score = (zero, one), (-d_alpha / (sigma * speed), alpha / (sigma * speed))
        else:
            per_output = -1 / sigma if self.prediction == "noise" else one
            score = zero, per_output
            velocity = d_alpha / alpha, speed / alpha * sigma * per_output
        # The same from the clean sample: noise is (x - alpha clean) / sigma.
        clean = [(sigma * part - d_sigma * own) / speed for part, own in zip(velocity, (one, zero), strict=True)]
        velocity_given_clean = d_sigma / sigma, speed / sigma
        score_given_clean = -1 / sigma.square(), alpha / sigma.square()

        ends = torch.cat([self.times[1:], one[:1]])
        dt, drift = ends - self.times, self.diffusions.clone()
        if self.last_step == "euler":
            drift[-1] = 0.0
        columns = torch.empty(self.num_steps, len(TransitionColumn), dtype=torch.float64, device="cpu")
        columns[:, TransitionColumn.MEAN_FROM_STATE] = 1 + dt * (velocity[0] + drift * score[0])
        columns[:, TransitionColumn.MEAN_FROM_OUTPUT] = dt * (velocity[1] + drift * score[1])
        columns[:, TransitionColumn.LOG_STD] = (2 * self.diffusions * dt).log() / 2
        columns[:, TransitionColumn.LOG_STD_SLOPE] = 0.0
        columns[:, TransitionColumn.X0_FROM_STATE] = clean[0]
        columns[:, TransitionColumn.X0_FROM_OUTPUT] = clean[1]
        given = velocity_given_clean[0] + drift * score_given_clean[0]
        columns[:, TransitionColumn.MEAN_FROM_STATE_GIVEN_X0] = 1 + dt * given
        columns[:, TransitionColumn.MEAN_FROM_X0] = dt * (velocity_given_clean[1] + drift * score_given_clean[1])
        if self.last_step == "tweedie":
            last = columns[-1]
            last[TransitionColumn.MEAN_FROM_STATE], last[TransitionColumn.MEAN_FROM_OUTPUT] = clean[0][-1], clean[1][-1]
            last[TransitionColumn.MEAN_FROM_STATE_GIVEN_X0], last[TransitionColumn.MEAN_FROM_X0] = 0.0, 1.0
        columns[-1, TransitionColumn.LOG_STD] = -torch.inf
        return columns.float()


def _times(schedule: FlowSDESchedule) -> Tensor:
    """t of every step, float64 ``[K]``."""
    times = schedule.timesteps.double() / schedule.num_train_steps
    # `dataclasses.replace` hands them to the copy, whose other arguments may make another grid.
    times.made_of_a_grid = schedule._given_ticks is None
    return times


# Here, because in the class it would be the default of the argument.
FlowSDESchedule.times = property(_times)  # type: ignore[assignment]
