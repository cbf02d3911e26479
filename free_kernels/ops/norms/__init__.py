"""What lies between two layers of a block: residual sum, layer norm and modulation."""

from free_kernels.ops.norms.api import NormArguments, adaptive_norm

__all__ = ["NormArguments", "adaptive_norm"]
