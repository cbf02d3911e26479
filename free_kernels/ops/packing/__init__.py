"""Packing drafts of many images into one call, and committing its outcome."""

from free_kernels.ops.packing.api import commit_drafts, pack_drafts

__all__ = ["commit_drafts", "pack_drafts"]
