"""Evaluation of sample sets: metrics with intervals, differences between samplers."""

from free_dit.evaluation.extractors import EXTRACTORS, Extractor, extract, load_extractor
from free_dit.evaluation.rendering import render
from free_dit.evaluation.report import EvaluationSettings, evaluate
from free_dit.evaluation.sets import ArraySet, ImageSet, Statistics, open_images, open_reference

__all__ = [
    "EXTRACTORS",
    "ArraySet",
    "EvaluationSettings",
    "Extractor",
    "ImageSet",
    "Statistics",
    "evaluate",
    "extract",
    "load_extractor",
    "open_images",
    "open_reference",
    "render",
]
