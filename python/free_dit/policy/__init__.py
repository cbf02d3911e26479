"""A diffusion policy of the project's own: a control task, its planner, a DiT that imitates it, and its evaluation."""

from free_dit.policy.pair import load_bundled_policy

__all__ = ["load_bundled_policy"]
