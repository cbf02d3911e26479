"""The samplers that a policy may decide by: the ordinary one, speculative ones, and DDIM."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from free_dit.networks.policy import NUM_STEPS, policy_schedule
from free_dit.policy.target import PolicyTarget
from free_kernels import DDIMSchedule, PhiloxNoise, SampleResult, ancestral_sample, sample
from free_kernels.protocols import Drafter
from free_kernels.validation import check_choice, check_float, check_int

# Draws a chunk for each observation history ``[N, history, O]``.
Decide = Callable[[Tensor, PhiloxNoise], SampleResult]


@dataclass(frozen=True)
class Method:
    """A way to draw a chunk of actions.

    Attributes:
        kind: ``"ordinary"`` (DDPM, 100 steps), ``"lossless"`` and ``"relaxed"`` (the same chain, speculated) or
            ``"ddim"`` (without noise).
        num_steps: K.
        draft_length: rows of a round, for the speculative ones.
        relaxation: strength, for ``"relaxed"``.
    """

    kind: str = "ordinary"
    num_steps: int = NUM_STEPS
    draft_length: int = 1
    relaxation: float = 0.0

    def __post_init__(self) -> None:
        check_choice("Method", "kind", self.kind, KINDS)
        check_int("Method", "num_steps", self.num_steps, 1, NUM_STEPS)
        check_int("Method", "draft_length", self.draft_length, 1, self.num_steps)
        check_float("Method", "relaxation", self.relaxation, 0.0)

    @property
    def name(self) -> str:
        """A short name; also of files."""
        return f"ddim-{self.num_steps}" if self.kind == "ddim" else self.kind


KINDS = ("ordinary", "lossless", "relaxed", "ddim")


def methods(draft_length: int, relaxation: float) -> tuple[Method, ...]:
    """Those of a comparison, the ordinary sampler first."""
    return (
        Method(),
        Method("lossless", draft_length=draft_length),
        Method("relaxed", draft_length=draft_length, relaxation=relaxation),
        Method("ddim", 10),
        Method("ddim", 16),
    )


def decider(method: Method, target: PolicyTarget, drafter: Drafter | str) -> Decide:
    """How a method draws; without noise in its steps DDIM takes the initial states only."""
    if method.kind == "ddim":
        # As diffusers' DDIMScheduler spaces them, which is what policies are run with.
        schedule = DDIMSchedule(
            method.num_steps,
            num_train_steps=NUM_STEPS,
            timestep_spacing="leading",
            clip_denoised=True,
            beta_schedule="squaredcos_cap_v2",
        )
        return lambda observations, noise: ancestral_sample(target, observations, schedule=schedule, noise=noise)
    ordinary = policy_schedule(method.num_steps)
    if method.kind == "ordinary":
        return lambda observations, noise: ancestral_sample(target, observations, schedule=ordinary, noise=noise)
    settings = {"drafter": drafter, "draft_length": method.draft_length, "relaxation": method.relaxation}
    return lambda observations, noise: sample(target, observations, schedule=ordinary, noise=noise, **settings)


def chunks(decide: Decide, observations: Tensor, seed: int, keys: Tensor) -> tuple[Tensor, SampleResult]:
    """Chunks ``[N, horizon, A]`` whose noise depends on ``seed`` and ``keys [N]`` only, clipped to [-1, 1]."""
    result = decide(observations, PhiloxNoise(seed, image_keys=keys))
    return result.samples.clamp(-1, 1), result
