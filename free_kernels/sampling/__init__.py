"""The samplers: one job, its rounds, the speculative loop and the ancestral one."""
