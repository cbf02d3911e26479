"""A diffusion policy of the project's own: a control task, its planner, a DiT that imitates it, and its evaluation."""
