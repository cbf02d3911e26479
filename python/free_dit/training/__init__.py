"""Training of DiT, SiT and drafters: one loop for all, losses, trajectories, data-parallel processes."""
