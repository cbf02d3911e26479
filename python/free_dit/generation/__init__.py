"""Large sample sets: drawn in shards by any number of ranks, resumable at any moment, every file with its hash."""

from free_dit.generation.job import generate, to_pixels
from free_dit.generation.store import GenerateSettings, SampleFolder

__all__ = ["GenerateSettings", "SampleFolder", "generate", "to_pixels"]
