"""Evaluation of sample sets: figures with intervals, differences between samplers, large sets in resumable shards."""

from free_dit.evaluation.extractors import EXTRACTORS, Extractor, extract, load_extractor
from free_dit.evaluation.generate import GenerateSettings, generate
from free_dit.evaluation.report import EvaluationSettings, evaluate, render
from free_dit.evaluation.sets import ArraySet, ImageSet, Statistics, open_images, open_reference

__all__ = [
    "EXTRACTORS",
    "ArraySet",
    "EvaluationSettings",
    "Extractor",
    "GenerateSettings",
    "ImageSet",
    "Statistics",
    "evaluate",
    "extract",
    "generate",
    "load_extractor",
    "open_images",
    "open_reference",
    "render",
]
