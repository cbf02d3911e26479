"""Other libraries' pipelines on top of the samplers; each needs its library installed, and is imported by name."""
