"""Schedules: the Gaussian transitions of a sampler's steps."""

from free_kernels.schedules.ddim import DDIMSchedule
from free_kernels.schedules.ddpm import DDPMSchedule
from free_kernels.schedules.diffusers import schedule_from_diffusers
from free_kernels.schedules.flow import FlowSDESchedule
from free_kernels.schedules.gaussian import GaussianSchedule

__all__ = ["DDIMSchedule", "DDPMSchedule", "FlowSDESchedule", "GaussianSchedule", "schedule_from_diffusers"]
