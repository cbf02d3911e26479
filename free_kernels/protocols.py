"""Protocols that targets, drafters and noise sources satisfy, and the results of sampling."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Schedule(Protocol):
    """The Gaussian transitions of a sampler's K steps; row k of everything belongs to step k, 0 being pure noise.

    A schedule may also define ``family`` ("flow" for velocity models; "diffusion" if absent), and where it does
    ``num_train_steps``: a target with other ones is refused.

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


@runtime_checkable
class Target(Protocol):
    """The frozen DiT, split at its top block.

    Both methods are called with tensors on the device of the class labels, or on ``device`` where the target has that
    attribute. A target may also define ``guidance_channels`` (how many leading channels guidance mixes; all if absent),
    ``has_null_label`` (False: it cannot be guided), ``hoisted(timesteps, labels) -> Target`` (a copy with everything
    that depends on (t, y) only computed once), ``family`` (which schedules it goes with, "diffusion" or "flow"; any if
    absent) and ``num_train_steps`` (of those schedules; any if absent).

    Attributes:
        latent_shape: (C, H, W).
        feature_shape: (T, D).
        num_classes: number of labels; label ``num_classes`` is the null label of classifier-free guidance.
        learns_variance: whether the head has 2C channels, the second half a learned variance.
    """

    latent_shape: tuple[int, int, int]
    feature_shape: tuple[int, int]
    num_classes: int
    learns_variance: bool

    def features(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Top-block features ``[R, T, D]`` of states ``[R, C, H, W]`` at timesteps ``[R]`` with labels ``[R]``."""
        ...

    def head(self, h: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Network output ``[R, C or 2C, H, W]`` of features ``[R, T, D]``."""
        ...


@runtime_checkable
class Drafter(Protocol):
    """Predicts the target's next top-block feature.

    A row of its output may depend on that row of its arguments only, which it must not modify: how many rows a call has
    changes from round to round, up to two of each slot and guidance branch. A drafter that remembers states of earlier
    calls has seen the noise of discarded drafts, which is used again: the images would no longer have the target's law.

    A drafter may also define ``check_target(target)`` (raise if made for another one), ``hoisted`` as for targets,
    ``is_free = True`` (it costs nothing, so its calls are not counted),
    ``drafts_first_step = True`` with ``initial_feature(state) -> [R, T, D]``: an image's first step, which has no
    parent feature, is drafted too, from this and with ``previous`` the state itself, and
    ``new_memory(slots, branches, drafts) -> DraftMemory | None``: an empty memory for ``branches * slots`` rows,
    conditional ones first, that survives the refusal of up to ``drafts`` calls. Where that is not None, calls take it
    as the argument ``memory``, with all of its rows, may look at the calls remembered there, and add themselves. The
    caller rewinds it past refused drafts before the next round: otherwise discarded noise, which is used again, would
    steer later drafts, and the images would no longer have the target's law.
    """

    def __call__(self, feature: Tensor, previous: Tensor, state: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Feature ``[R, T, D]`` at ``state``.

        Args:
            feature: ``[R, T, D]``, the feature (exact or drafted) at ``previous``.
            previous: ``[R, C, H, W]``, the state one step before ``state``.
            state: ``[R, C, H, W]``.
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


class NoiseSource(Protocol):
    """Random numbers that depend on the image and the step, not on the batch."""

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


def new_memory(drafter: Drafter, slots: int, branches: int, drafts: int) -> DraftMemory | None:
    """``drafter.new_memory(slots, branches, drafts)`` where the drafter offers it, else None."""
    offer = getattr(drafter, "new_memory", None)
    return offer(slots, branches, drafts) if callable(offer) else None


def first_drafted_step(drafter: object) -> int:
    """0 for a drafter that drafts an image's first step, which has no parent feature, else 1."""
    return 0 if getattr(drafter, "drafts_first_step", False) else 1


def null_label(target: Target) -> int:
    """The label of the unconditional branch."""
    return target.num_classes


def guided_channels(target: Target) -> int:
    """How many leading channels guidance mixes unless the caller says otherwise."""
    return getattr(target, "guidance_channels", target.latent_shape[0])
