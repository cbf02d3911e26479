"""Sampling by several processes: images, or rows of a round, or both."""

from free_kernels.distributed.api import sample, sample_mesh

__all__ = ["sample", "sample_mesh"]
