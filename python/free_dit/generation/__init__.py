"""Large sample sets: drawn in shards by any number of ranks, resumable at any moment, every file with its hash."""

from free_dit.generation.draw import generate, to_pixels
from free_dit.generation.sample_folder import DrawSettings, GenerateSettings, SampleFolder

__all__ = ["DrawSettings", "GenerateSettings", "SampleFolder", "generate", "to_pixels"]
