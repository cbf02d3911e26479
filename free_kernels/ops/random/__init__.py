"""Random numbers by key: Philox, the same on every device."""

from free_kernels.ops.random.api import philox_normal, philox_round, philox_uniform

__all__ = ["philox_normal", "philox_round", "philox_uniform"]
