"""DiT models, data, drafter training and comparison on top of :mod:`free_kernels`."""

from free_dit.bundled import load_bundled
from free_dit.networks.dit import DiT, DiTConfig, dit_config

__all__ = ["DiT", "DiTConfig", "dit_config", "load_bundled"]
