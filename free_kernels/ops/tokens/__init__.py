"""The tokens that a learned drafter takes in: parent feature and patches of the latest states side by side."""

from free_kernels.ops.tokens.api import TokenArguments, drafter_tokens

__all__ = ["TokenArguments", "drafter_tokens"]
