"""The head of a DiT: adaptive layer norm, a linear layer and unpatchify."""

from free_kernels.ops.final_layer.api import FinalLayerArguments, final_layer

__all__ = ["FinalLayerArguments", "final_layer"]
