"""Lossless speculative sampling for Diffusion Transformers."""

from free_kernels import ops
from free_kernels.drafters import DrafterConfig, FeatureDrafter, FrozenDrafter
from free_kernels.noise import PhiloxNoise, Purpose, TensorNoise
from free_kernels.relaxation import Relaxation
from free_kernels.sampler import FinishedImage, SampleIterator, ancestral_sample, sample, sample_iter
from free_kernels.schedule import DDPMSchedule
from free_kernels.targets import DiTTarget
from free_kernels.types import Drafter, NoiseSource, RoundInfo, SampleResult, SampleStats, Target
from free_kernels.version import __version__

__all__ = [
    "DDPMSchedule",
    "DiTTarget",
    "Drafter",
    "DrafterConfig",
    "FeatureDrafter",
    "FinishedImage",
    "FrozenDrafter",
    "NoiseSource",
    "PhiloxNoise",
    "Purpose",
    "Relaxation",
    "RoundInfo",
    "SampleIterator",
    "SampleResult",
    "SampleStats",
    "Target",
    "TensorNoise",
    "__version__",
    "ancestral_sample",
    "ops",
    "sample",
    "sample_iter",
]
