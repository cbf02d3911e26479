"""Schedules: the Gaussian transitions of a sampler's steps."""

from free_kernels.schedules.ddim import DDIMSchedule
from free_kernels.schedules.ddpm import DDPMSchedule
from free_kernels.schedules.flow import FlowSDESchedule

__all__ = ["DDIMSchedule", "DDPMSchedule", "FlowSDESchedule"]
