"""Lossless speculative sampling for Diffusion Transformers."""

from free_kernels import ops
from free_kernels.conditions import Conditions
from free_kernels.constants import Purpose
from free_kernels.drafters import DrafterConfig, FeatureDrafter, FrozenDrafter
from free_kernels.protocols import Drafter, NoiseSource, Schedule, Target
from free_kernels.results import RoundInfo, SampleResult, SampleStats
from free_kernels.sampling.api import FinishedImage, SampleIterator, ancestral_sample, sample, sample_iter
from free_kernels.sampling.feasibility import Feasibility, feasibility
from free_kernels.sampling.feasibility_costs import RowCosts
from free_kernels.sampling.memory import MemoryEstimate, estimate_memory
from free_kernels.sampling.noise import PhiloxNoise, TensorNoise
from free_kernels.schedules import (
    DDIMSchedule,
    DDPMSchedule,
    FlowSDESchedule,
    GaussianSchedule,
    schedule_from_diffusers,
)
from free_kernels.steering.relaxation import Relaxation
from free_kernels.targets import (
    DiffusersDiTTarget,
    DiffusersFlowTarget,
    DiTTarget,
    FluxTarget,
    HookTarget,
    PixArtTarget,
    SanaTarget,
    SD3Target,
    SiTTarget,
    TargetCheck,
    check_target,
)
from free_kernels.version import __version__

__all__ = [
    "Conditions",
    "DDIMSchedule",
    "DDPMSchedule",
    "DiTTarget",
    "DiffusersDiTTarget",
    "DiffusersFlowTarget",
    "Drafter",
    "DrafterConfig",
    "Feasibility",
    "FeatureDrafter",
    "FlowSDESchedule",
    "FinishedImage",
    "FluxTarget",
    "FrozenDrafter",
    "GaussianSchedule",
    "HookTarget",
    "MemoryEstimate",
    "NoiseSource",
    "PhiloxNoise",
    "PixArtTarget",
    "Purpose",
    "Relaxation",
    "RoundInfo",
    "RowCosts",
    "SD3Target",
    "SampleIterator",
    "SampleResult",
    "SampleStats",
    "SanaTarget",
    "Schedule",
    "SiTTarget",
    "Target",
    "TargetCheck",
    "TensorNoise",
    "__version__",
    "ancestral_sample",
    "check_target",
    "estimate_memory",
    "feasibility",
    "ops",
    "sample",
    "sample_iter",
    "schedule_from_diffusers",
]
