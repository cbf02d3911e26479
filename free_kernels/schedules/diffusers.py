"""``schedule_from_diffusers``: a diffusers scheduler as a table of Gaussian transitions, or why it is none."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch

from free_kernels.constants import TIME_TICKS
from free_kernels.schedules import diffusers_chains as chains
from free_kernels.schedules.gaussian import GaussianSchedule
from free_kernels.validation import check_int, describe, fail

NO_NOISE = "there is no fresh noise in their steps to speculate on"
PAST = "the outputs of the steps before enter a step"
_DDPM = "DDPMScheduler.from_config(scheduler.config)"
_EULER = "EulerAncestralDiscreteScheduler.from_config(scheduler.config)"
_SDE = "algorithm_type='sde-dpmsolver++' and solver_order=1"
_SDE_MULTISTEP = f"DPMSolverMultistepScheduler with {_SDE}"
_FLOW = "FlowMatchEulerDiscreteScheduler with stochastic_sampling=True, or FlowSDESchedule"
_EDM = "none, as networks of EDM have scaled inputs and outputs, which these targets have not"
_UNREAD = "its steps are not read here"
_TREE = "the noise of a step is a difference of a Brownian tree, which depends on the grid"

READERS = {
    "DDPMScheduler": chains.ddpm,
    "DDIMScheduler": chains.ddim,
    "TCDScheduler": chains.tcd,
    "LCMScheduler": chains.lcm,
    "EulerAncestralDiscreteScheduler": chains.euler_ancestral,
    "DPMSolverMultistepScheduler": chains.sde_dpm_solver,
    "FlowMatchEulerDiscreteScheduler": chains.flow_match_euler,
}
_TAKE_ETA = ("DDIMScheduler", "TCDScheduler")
# Why a scheduler is no chain of Gaussian steps, and the nearest that is.
REFUSED = {
    "CosineDPMSolverMultistepScheduler": (f"{_TREE}, and {PAST}", _EDM),
    "DDIMInverseScheduler": (f"they lead from data to noise, and {NO_NOISE}", "DDIMScheduler with eta above 0"),
    "DEISMultistepScheduler": (f"{NO_NOISE}, and {PAST}", _EULER),
    "DPMSolverMultistepInverseScheduler": ("they lead from data to noise", _SDE_MULTISTEP),
    "DPMSolverSDEScheduler": (f"{_TREE}, and a step takes two calls", _EULER),
    "DPMSolverSinglestepScheduler": ("the outputs since the last whole step enter a step", _SDE_MULTISTEP),
    "EDMDPMSolverMultistepScheduler": (f"{PAST} of order 2, or {NO_NOISE}", _EDM),
    "EDMEulerScheduler": (NO_NOISE, _EDM),
    "EulerDiscreteScheduler": (NO_NOISE, _EULER),
    "FlowMatchLCMScheduler": (_UNREAD, _FLOW),
    "FlowMatchHeunDiscreteScheduler": (f"{NO_NOISE}, and a step takes two calls", _FLOW),
    "HeunDiscreteScheduler": (f"{NO_NOISE}, and a step takes two calls", _EULER),
    "IPNDMScheduler": (f"{NO_NOISE}, and {PAST}", _DDPM),
    "KDPM2AncestralDiscreteScheduler": ("a step takes two calls, the second at a state of its own", _EULER),
    "KDPM2DiscreteScheduler": (f"{NO_NOISE}, and a step takes two calls", _EULER),
    "LMSDiscreteScheduler": (f"{NO_NOISE}, and {PAST}", _EULER),
    "LTXEulerAncestralRFScheduler": (_UNREAD, _FLOW),
    "PNDMScheduler": (f"{NO_NOISE}, and {PAST}", _DDPM),
    "SASolverScheduler": (f"{PAST}, and a corrector changes the state before", _SDE_MULTISTEP),
    "UniPCMultistepScheduler": (f"{NO_NOISE}, and {PAST}", _SDE_MULTISTEP),
}
# What only the configurations of other families have. `from_config` hands on values that are not the default.
_FLOW_KEYS = ("stochastic_sampling", "shift", "shift_terminal", "invert_sigmas", "use_dynamic_shifting", "max_shift")
_EDM_KEYS = ("sigma_data",)


def kind_of_scheduler(scheduler: object) -> str:
    """Name of the class that a scheduler's ``step`` is written in: a subclass with another step is another kind."""
    return next((base.__name__ for base in type(scheduler).__mro__ if "step" in vars(base)), type(scheduler).__name__)


def is_scheduler(scheduler: object) -> bool:
    """Whether an object has a scheduler's configuration and method."""
    config = getattr(scheduler, "config", None)
    return not isinstance(scheduler, type) and isinstance(config, Mapping) and hasattr(scheduler, "set_timesteps")


def is_gaussian(scheduler: Any) -> bool:
    """Whether a scheduler is read here, its configuration considered; eta apart."""
    kind, config = kind_of_scheduler(scheduler), scheduler.config
    if kind == "DPMSolverMultistepScheduler":
        return str(config.algorithm_type).startswith("sde-") and config.solver_order == 1
    return bool(config.stochastic_sampling) if kind == "FlowMatchEulerDiscreteScheduler" else kind in READERS


def refuse(
    where: str, scheduler: Any, asked: str = "one whose steps are Gaussian given the state and the output"
) -> NoReturn:
    """Raise ValueError with the reason why a scheduler is no chain of Gaussian steps, and the nearest that is."""
    kind, config = kind_of_scheduler(scheduler), scheduler.config
    if kind == "FlowMatchEulerDiscreteScheduler":
        reason, nearest = NO_NOISE, _FLOW
    elif kind == "DPMSolverMultistepScheduler":
        reason, nearest = NO_NOISE, f"{_DDPM}, or {_SDE}"
        if str(config.algorithm_type).startswith("sde-"):
            reason, nearest = f"{PAST} of order {config.solver_order}", "solver_order=1"
    else:
        reason, nearest = REFUSED.get(kind, (f"{_UNREAD}, but those of {', '.join(sorted(READERS))}", None))
    if config.get("use_flow_sigmas") and nearest is not None and nearest != "solver_order=1":
        nearest = f"{_SDE_MULTISTEP}, or {_FLOW}"
    if _FLOW in (nearest or ""):
        # The converted scheduler would take the velocity for a noise, and need not show where it came from.
        nearest += "; never DDPMScheduler, which takes the velocity for a noise"
    remedy = "" if nearest is None else f"; use {nearest}"
    fail(where, "scheduler", f"{asked} ({reason}{remedy})", type(scheduler).__name__)


def check_lineage(where: str, scheduler: Any) -> None:
    """Raise ValueError for a scheduler that ``from_config`` made of one for another family of networks.

    It would take a velocity for a noise, or the other way round. Only what ``from_config`` hands on can tell: a
    configuration of nothing but defaults leaves no trace.
    """
    config, own = scheduler.config, inspect.signature(type(scheduler).__init__).parameters
    foreign = {name: value for name, value in config.items() if name not in own and not name.startswith("_")}
    is_flow = kind_of_scheduler(scheduler) == "FlowMatchEulerDiscreteScheduler" or config.get("use_flow_sigmas")
    for family, names in (("flow matching", () if is_flow else _FLOW_KEYS), ("EDM", _EDM_KEYS)):
        found = [name for name in names if foreign.get(name)]
        if found:
            what = f"one of the network's own family, not converted from {family}"
            fail(where, "scheduler", what, f"{type(scheduler).__name__} with {found[0]} {foreign[found[0]]!r}")
    prediction = config.get("prediction_type")
    if is_flow and prediction not in (None, "flow_prediction"):
        fail(where, "prediction_type", "'flow_prediction' for a scheduler of velocities", prediction)


def schedule_from_diffusers(
    scheduler: Any,
    num_steps: int | None = None,
    *,
    eta: float | None = None,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
    mu: float | None = None,
) -> GaussianSchedule:
    """The steps of a diffusers scheduler after ``set_timesteps``, where they are Gaussian given state and output.

    These are: ``DDPMScheduler`` (every ``variance_type`` but "learned" and "fixed_large_log"), ``DDIMScheduler`` with
    eta above 0, ``EulerAncestralDiscreteScheduler``, ``DPMSolverMultistepScheduler`` with an "sde-" algorithm of order
    1, ``TCDScheduler`` with eta above 0, ``LCMScheduler``, and ``FlowMatchEulerDiscreteScheduler`` with
    ``stochastic_sampling``. Each transition is computed in float64 from the scheduler's own tables. One timestep at -1,
    which rounding appends to some "trailing" grids, is left out.

    A scheduler that scales its state before the network has it (``scale_model_input``) becomes the chain of the scaled
    state, which is the state itself after the last step. The networks of flow schedulers are flow targets: their ticks
    are 1 / 100 000 of the time, and a timestep is shown to the nearest tick.

    Args:
        scheduler: the scheduler; it is read, not changed.
        num_steps: K; None where ``timesteps`` or ``sigmas`` are given.
        eta: share of noise in [0, 1] of DDIM (default 0, which is refused) and TCD (default 0.3), as their ``step``
            takes it.
        timesteps: K timesteps for ``set_timesteps`` of schedulers that take them.
        sigmas: K noise levels, likewise.
        mu: shift of ``use_dynamic_shifting``, likewise.

    Returns:
        The schedule, for :func:`free_kernels.sample` and :func:`free_kernels.ancestral_sample`.

    Raises:
        TypeError: not a scheduler.
        ValueError: a scheduler whose steps depend on more than state and output, or have no noise; a setting without a
            transition here; an argument that the scheduler does not take. The message says which and why.
    """
    where = "schedule_from_diffusers"
    if not is_scheduler(scheduler):
        fail(where, "scheduler", "a diffusers scheduler", describe(scheduler), TypeError)
    kind, config = kind_of_scheduler(scheduler), scheduler.config
    if not is_gaussian(scheduler):
        refuse(where, scheduler)
    check_lineage(where, scheduler)
    if config.get("thresholding") and kind != "TCDScheduler":
        reason = "False: its bound is a quantile of the whole image, and transitions here act on each element"
        fail(where, "thresholding", reason, True)
    if eta is not None and kind not in _TAKE_ETA:
        fail(where, "eta", f"None for {kind}, whose step has none", eta)
    read_from = _with_timesteps(
        where, scheduler, {"num_inference_steps": num_steps, "timesteps": timesteps, "sigmas": sigmas, "mu": mu}
    )
    read = READERS[kind](read_from, where, *((eta,) if kind in _TAKE_ETA else ()))
    return _schedule(type(scheduler).__name__, read, config)


def _with_timesteps(where: str, scheduler: Any, given: dict[str, Any]) -> Any:
    """A copy of a scheduler, its timesteps set."""
    given = {name: value for name, value in given.items() if value is not None}
    if "num_inference_steps" in given:
        check_int(where, "num_steps", given["num_inference_steps"], 1, scheduler.config.num_train_timesteps)
    elif not given.keys() & {"timesteps", "sigmas"}:
        fail(where, "num_steps", "an int where neither timesteps nor sigmas are given", None, TypeError)
    taken = inspect.signature(scheduler.set_timesteps).parameters
    for name in given:
        if name not in taken:
            fail(where, name, f"None for {type(scheduler).__name__}, which takes none", given[name])
    scheduler = copy.deepcopy(scheduler)
    try:
        scheduler.set_timesteps(**given)
    except (ValueError, TypeError, AssertionError) as error:
        shown = ", ".join(f"{name}={describe(value)}" for name, value in given.items())
        raise ValueError(f"{where}: arguments must be what the scheduler takes, got {shown}: {error}") from error
    return scheduler


def _schedule(name: str, read: chains.Read, config: Any) -> GaussianSchedule:
    """The schedule of what was read; timesteps that are not whole are shown beside whole ones."""
    columns, shown, family, train = read.chain.columns(), None, "diffusion", None
    if read.is_flow:
        timesteps, family, train = chains.flow_ticks(read.timesteps, config.num_train_timesteps), "flow", TIME_TICKS
    else:
        timesteps = read.timesteps.floor().long()
        if not torch.equal(timesteps.double(), read.timesteps):
            shown = read.timesteps.float()
    clip = float(config.clip_sample_range) if read.clip else float("inf")
    return GaussianSchedule(name, timesteps, columns, clip, read.variance, family, train, shown, read.init_noise_sigma)
