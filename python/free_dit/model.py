"""Public names of the DiT; the code is in :mod:`free_dit.networks.dit`."""

from free_dit.networks.dit import DiT, DiTConfig, dit_config

__all__ = ["DiT", "DiTConfig", "dit_config"]
