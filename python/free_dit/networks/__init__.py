"""The networks: DiT and SiT, their files, and the schedule of each family."""
