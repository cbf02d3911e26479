"""Large sample sets: drawn in shards by any number of ranks, resumable at any moment, every file with its hash."""

from free_dit.generation.draw import generate, to_pixels
from free_dit.generation.sample_folder import SampleFolder
from free_dit.generation.settings import UNDRAFTED, ChainSettings, DrawSettings, GenerateSettings, sampler_for

__all__ = [
    "UNDRAFTED",
    "ChainSettings",
    "DrawSettings",
    "GenerateSettings",
    "SampleFolder",
    "generate",
    "sampler_for",
    "to_pixels",
]
