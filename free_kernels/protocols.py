"""Protocols that schedules, targets, drafters and noise sources satisfy, with the members that they may leave out.

A protocol has the members that every implementation needs. The optional ones are declared in the ``...Defaults`` class
beside it, each with the value that stands where it is left out: a class may inherit the defaults or ignore them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from free_kernels.validation import check_float, fail


class _Defaults:
    """Base of the classes that declare optional members."""

    @classmethod
    def read(cls, holder: object, name: str) -> Any:
        """Member ``name`` of an object that may lack it: its own, or the default of this class."""
        if hasattr(holder, name):
            return getattr(holder, name)
        default = getattr(cls, name)
        return MethodType(default, holder) if isinstance(default, FunctionType) else default


class ScheduleDefaults(_Defaults):
    """Optional members of a :class:`Schedule`.

    Attributes:
        family: which targets it goes with, "diffusion" or "flow" (velocity models).
        num_train_steps: of the targets that it goes with; a target with another number is refused. None: any.
        times: time of every step in the schedule's own unit, ``[K]``, which a guidance interval is given in; None: the
            timesteps.
        shown_timesteps: float32 ``[K]``, what the network is shown where timesteps are not whole numbers, which
            ``timesteps`` then stand for; None: ``timesteps``.
        init_noise_sigma: deviation of the first state.
    """

    family: str = "diffusion"
    num_train_steps: int | None = None
    times: Tensor | None = None
    shown_timesteps: Tensor | None = None
    init_noise_sigma: float = 1.0


@runtime_checkable
class Schedule(Protocol):
    """The Gaussian transitions of a sampler's K steps; row k of everything belongs to step k, 0 being pure noise.

    :class:`ScheduleDefaults` has the optional members.

    Attributes:
        num_steps: K.
        timesteps: int64 ``[K]``, distinct and at least 0, shown to the target and the drafter.
        clip: bound of the predicted clean sample, or infinity.
    """

    num_steps: int

    @property
    def timesteps(self) -> Tensor:
        """Timesteps of the K steps."""
        ...

    @property
    def clip(self) -> float:
        """Bound of the predicted clean sample."""
        ...

    def resolve_variance(self, learns_variance: bool) -> str:
        """The variance type for a target; ``"learned_range"`` makes the variance the network's."""
        ...

    def table(self, variance: str) -> Tensor:
        """Coefficients float32 ``[K, 8]``, columns of :class:`free_kernels.constants.TransitionColumn`."""
        ...


# A packed target call whose features arrive after its output: the output, and what waits for the features.
PackedCall = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Callable[[], Tensor]]]


class TargetDefaults(_Defaults):
    """Optional members of a :class:`Target`.

    Attributes:
        device: where it takes its tensors; None: where the class labels are.
        guidance_channels: how many leading channels guidance mixes; None: all.
        has_null_label: False for a network that cannot be guided.
        family: which schedules it goes with, "diffusion" or "flow"; None: any.
        num_train_steps: of those schedules; None: any.
        showing: ``showing(timesteps, shown) -> Target``, a copy that shows its network ``shown[k]``, float32 ``[K]``,
            where it is called with ``timesteps[k]``, int64 ``[K]``. None: it takes whole timesteps only.
        conditioned: ``conditioned(conditions) -> Target``, for a network with other conditions than class labels: a
            copy for :class:`free_kernels.Conditions` of N images, whose labels are places among them. It has
            ``num_classes`` N, and ``has_null_label`` where there is a null condition, label N. Conditions are stored
            once for an image, however many rows a call has. None: class labels only.
        pooled: float ``[N or N + 1, P]``, for drafters: a vector for each label of such a copy; None: the drafter is
            shown the labels themselves.
        packed_call: ``packed_call(x, t, y) -> (output, wait)`` for all rows of a round at once, where the features
            arrive after the output: ``wait()`` returns them, and is called before the next packed call. None:
            ``features``, then ``head``.
        is_capturable: False where a call waits for the host, so that it cannot be part of a CUDA graph.
    """

    device: Any = None
    guidance_channels: int | None = None
    has_null_label: bool = True
    family: str | None = None
    num_train_steps: int | None = None
    showing: Callable[[Tensor, Tensor], Any] | None = None
    conditioned: Callable[[Any], Any] | None = None
    pooled: Tensor | None = None
    packed_call: PackedCall | None = None
    is_capturable: bool = True

    def hoisted(self, timesteps: Tensor, labels: Tensor) -> Any:
        """A copy with everything that depends on timestep and label only computed once; by default the target itself.

        Args:
            timesteps: int64 ``[K]``, all that will be asked for.
            labels: int64 ``[Y]``, all that will be asked for.
        """
        return self


@runtime_checkable
class Target(Protocol):
    """The frozen DiT, split at its top block.

    Both methods are called with tensors on the device of the class labels, or on ``device`` where the target has that
    attribute. :class:`TargetDefaults` has the optional members.

    Attributes:
        latent_shape: of a state: (C, H, W) of an image, (T, A) of T actions, or any other of one dimension at least.
            The first is called its channels, C, which guidance and learned variances count in.
        feature_shape: (T, D).
        num_classes: number of labels; label ``num_classes`` is the null label of classifier-free guidance.
        learns_variance: whether the head has 2C channels, the second half a learned variance.
    """

    latent_shape: tuple[int, ...]
    feature_shape: tuple[int, int]
    num_classes: int
    learns_variance: bool

    def features(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Top-block features ``[R, T, D]`` of states ``[R, *latent_shape]``, timesteps and labels ``[R]``."""
        ...

    def head(self, h: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Network output ``[R, C or 2C, ...]``, like states, of features ``[R, T, D]``."""
        ...


class DrafterDefaults(_Defaults):
    """Optional members of a :class:`Drafter`.

    Attributes:
        is_free: it costs nothing, so its calls are not counted.
        repeats_feature: its output is ``feature``, whatever the state. It is not called: the target's own outputs at
            earlier rows draft, carried along with the state, an image's first step among them; see
            :func:`free_kernels.ops.drafting.replay_drafts`.
        frozen_share: share of the chain, from its first step on, whose rounds the clean samples draft, as with
            ``repeats_feature``: where they are refused no more often than this drafter's drafts, which cost calls. 0
            for a drafter with a memory.
        drafts_first_step: an image's first step, which has no parent feature, is drafted too, from
            ``initial_feature(state) -> [R, T, D]`` and with ``previous`` the state itself.
        calibration: acceptance probabilities ``[bins, A]`` by part of the chain and look-ahead, where
            ``draft_length="auto"`` begins; None: unknown.
    """

    is_free: bool = False
    repeats_feature: bool = False
    frozen_share: float = 0.0
    drafts_first_step: bool = False
    calibration: Any = None

    def hoisted(self, timesteps: Tensor, labels: Tensor) -> Any:
        """As for targets."""
        return self

    def conditioned(self, pooled: Tensor) -> Any:
        """A copy whose labels are rows of ``pooled [M, P]``, what the target says of its conditions; or itself."""
        return self

    def check_target(self, target: Target, where: str = "") -> None:
        """Raise ValueError, in the name of the function ``where``, if made for another target; by default it fits."""

    def new_memory(self, slots: int, branches: int, drafts: int) -> DraftMemory | None:
        """An empty memory for ``branches * slots`` rows, conditional ones first, or None for a drafter without.

        It survives the refusal of up to ``drafts`` calls. Calls take it as the argument ``memory``, with all of its
        rows, may look at the calls remembered there, and add themselves. The caller rewinds it past refused drafts
        before the next round: otherwise discarded noise, which is used again, would steer later drafts, and the images
        would no longer have the target's law.
        """
        return None


@runtime_checkable
class Drafter(Protocol):
    """Predicts the target's next top-block feature.

    A row of its output may depend on that row of its arguments only, which it must not modify: how many rows a call has
    changes from round to round, up to the draft length for each slot and guidance branch. A drafter that remembers
    states of earlier calls has seen the noise of discarded drafts, which is used again: the images would no longer have
    the target's law.

    :class:`DrafterDefaults` has the optional members.
    """

    def __call__(self, feature: Tensor, previous: Tensor, state: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Feature ``[R, T, D]`` at ``state``.

        Args:
            feature: ``[R, T, D]``, the feature (exact or drafted) at ``previous``.
            previous: ``[R, *latent_shape]``, the state one step before ``state``.
            state: ``[R, *latent_shape]``.
            t: int64 ``[R]``, the timestep of ``state``.
            y: int64 ``[R]``, labels.
        """
        ...


@runtime_checkable
class DraftMemory(Protocol):
    """What a drafter remembers of its earlier calls, for each of S trajectories; belongs to one run."""

    def rewind(self, steps: Tensor) -> None:
        """Forget calls without a trace: later calls must not depend on them in any way.

        Args:
            steps: int64 ``[S]``, at least 0: how many of the latest calls each trajectory forgets, in every guidance
                branch; at or above the number of remembered calls empties it.
        """
        ...


class NoiseDefaults(_Defaults):
    """Optional members of a :class:`NoiseSource`.

    Attributes:
        covers_steps: whether the noise of a step is the same in every round, whatever ``rounds`` says.
        philox: a :class:`free_kernels.PhiloxNoise` with the same numbers, which kernels may draw themselves; None:
            there is none.
    """

    covers_steps: bool = False
    philox: Any = None


class NoiseSource(Protocol):
    """Random numbers that depend on the image and the step, not on the batch.

    :class:`NoiseDefaults` has the optional members.
    """

    def normal(
        self, images: Tensor, steps: Tensor, purpose: int, shape: tuple[int, ...], rounds: Tensor | None = None
    ) -> Tensor:
        """Standard normals float32 ``[M, *shape]`` for image indices ``[M]`` at steps ``[M]``.

        ``rounds`` int64 ``[M]`` are part of the key where given: another round, other numbers.
        """
        ...

    def uniform(self, images: Tensor, steps: Tensor, purpose: int, rounds: Tensor | None = None) -> Tensor:
        """Uniforms in (0, 1], float32 ``[M]``."""
        ...


def new_memory(drafter: object, slots: int, branches: int, drafts: int) -> DraftMemory | None:
    """``drafter.new_memory(slots, branches, drafts)``, or None for a drafter without a memory."""
    return DrafterDefaults.read(drafter, "new_memory")(slots, branches, drafts)


def first_drafted_step(drafter: object) -> int:
    """0 for a drafter whose features draft an image's first step, which has no parent feature, else 1."""
    return 0 if DrafterDefaults.read(drafter, "drafts_first_step") else 1


def first_drafted_in_rounds(drafter: object) -> int:
    """The same of the sampler's rounds, where clean samples draft for a drafter that repeats its feature."""
    clean = any(DrafterDefaults.read(drafter, name) for name in ("repeats_feature", "frozen_share"))
    return 0 if clean else first_drafted_step(drafter)


def frozen_steps(where: str, drafter: object, num_steps: int, has_memory: bool) -> int:
    """How many steps of the chain, from the first one on, begin rounds that clean samples draft.

    Raises:
        TypeError: ``frozen_share`` is not a number.
        ValueError: it is not in [0, 1], or not 0 for a drafter with a memory.
    """
    share = check_float(where, "drafter.frozen_share", DrafterDefaults.read(drafter, "frozen_share"), 0.0, 1.0)
    if share and has_memory:
        fail(where, "drafter.frozen_share", "0 for a drafter with a memory, which is called at every step", share)
    if DrafterDefaults.read(drafter, "repeats_feature"):
        return num_steps
    return steps_of_share(share, num_steps)


def steps_of_share(share: float, num_steps: int) -> int:
    """How many of a chain's steps a ``frozen_share`` is: rounded up, so that any above 0 has the first one."""
    # But not up for the rounding of the product.
    return max(1, math.ceil(round(share * num_steps, 6))) if share else 0


def null_label(target: Target) -> int:
    """The label of the unconditional branch."""
    return target.num_classes


def unconditional_labels(target: Target, labels: Tensor) -> Tensor:
    """Labels of the unconditional branch of rows ``[R]``.

    They are the null label; for a network without one their own, so that its two branches are the same.
    """
    return torch.full_like(labels, null_label(target)) if TargetDefaults.read(target, "has_null_label") else labels


def guided_channels(target: Target) -> int:
    """How many leading channels guidance mixes unless the caller says otherwise."""
    channels = TargetDefaults.read(target, "guidance_channels")
    return target.latent_shape[0] if channels is None else channels
