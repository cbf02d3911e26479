"""Public names for the quality of sampled digits; the code is in :mod:`free_dit.evaluation`."""

from free_dit.evaluation.bootstrap import frechet_interval
from free_dit.evaluation.digits_classifier import (
    CLASSIFIER,
    Estimate,
    class_accuracy,
    digit_features,
    digits_classifier,
    train_digits_classifier,
)
from free_dit.evaluation.frechet import frechet_distance, frechet_of_moments, weighted_moments

__all__ = [
    "CLASSIFIER",
    "Estimate",
    "class_accuracy",
    "digit_features",
    "digits_classifier",
    "frechet_distance",
    "frechet_interval",
    "frechet_of_moments",
    "train_digits_classifier",
    "weighted_moments",
]
