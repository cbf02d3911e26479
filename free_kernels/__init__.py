"""Lossless speculative sampling for Diffusion Transformers."""

from free_kernels import ops
from free_kernels.ddim_schedule import DDIMSchedule
from free_kernels.drafters import DrafterConfig, FeatureDrafter, FrozenDrafter
from free_kernels.flow_schedule import FlowSDESchedule
from free_kernels.noise import PhiloxNoise, Purpose, TensorNoise
from free_kernels.relaxation import Relaxation
from free_kernels.sampler import FinishedImage, SampleIterator, ancestral_sample, sample, sample_iter
from free_kernels.schedule import DDPMSchedule
from free_kernels.targets import DiffusersDiTTarget, DiTTarget, HookTarget, SiTTarget
from free_kernels.types import Drafter, NoiseSource, RoundInfo, SampleResult, SampleStats, Schedule, Target
from free_kernels.version import __version__

__all__ = [
    "DDIMSchedule",
    "DDPMSchedule",
    "DiTTarget",
    "DiffusersDiTTarget",
    "Drafter",
    "DrafterConfig",
    "FeatureDrafter",
    "FlowSDESchedule",
    "FinishedImage",
    "FrozenDrafter",
    "HookTarget",
    "NoiseSource",
    "PhiloxNoise",
    "Purpose",
    "Relaxation",
    "RoundInfo",
    "SampleIterator",
    "SampleResult",
    "SampleStats",
    "Schedule",
    "SiTTarget",
    "Target",
    "TensorNoise",
    "__version__",
    "ancestral_sample",
    "ops",
    "sample",
    "sample_iter",
]
