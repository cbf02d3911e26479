"""Lossless speculative sampling for Diffusion Transformers."""

from free_kernels import ops
from free_kernels.drafters import DrafterConfig, FeatureDrafter, FrozenDrafter
from free_kernels.noise import PhiloxNoise, Purpose, TensorNoise
from free_kernels.relaxation import Relaxation
from free_kernels.sampler import ancestral_sample, sample
from free_kernels.schedule import DDPMSchedule
from free_kernels.targets import DiffusersDiTTarget, DiTTarget, HookTarget
from free_kernels.types import Drafter, NoiseSource, RoundInfo, SampleResult, SampleStats, Target
from free_kernels.version import __version__

__all__ = [
    "DDPMSchedule",
    "DiTTarget",
    "DiffusersDiTTarget",
    "Drafter",
    "DrafterConfig",
    "FeatureDrafter",
    "FrozenDrafter",
    "HookTarget",
    "NoiseSource",
    "PhiloxNoise",
    "Purpose",
    "Relaxation",
    "RoundInfo",
    "SampleResult",
    "SampleStats",
    "Target",
    "TensorNoise",
    "__version__",
    "ancestral_sample",
    "ops",
    "sample",
]
