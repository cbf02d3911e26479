"""Attention of drafted features to remembered ones, and the memory of these."""

from free_kernels.ops.attention.api import append_features, feature_attention, rewind_features

__all__ = ["append_features", "feature_attention", "rewind_features"]
