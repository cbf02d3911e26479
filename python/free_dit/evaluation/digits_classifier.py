"""A small classifier of digits: its features, and the share of sampled digits that it reads as their label.

Distances in its features are no FID and compare with nothing outside this project.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from free_dit.bundled import MODELS
from free_dit.data import load_digits
from free_dit.evaluation.intervals import Estimate, check_level, share_interval
from free_dit.training.loop import iteration_seed
from free_kernels.checkpoint import load_checkpoint
from free_kernels.validation import describe, fail

FEATURES = 16
_EPOCHS, _BATCH, _PEAK_RATE, _SEED = 20, 64, 4e-3, 0


class DigitsClassifier(nn.Module):
    """Reads 8 x 8 digits: two convolutions, a hidden layer of 16 features, 10 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(16, 32, 3, padding=1, stride=2),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(32 * 4 * 4, FEATURES),
        )
        self.classes = nn.Linear(FEATURES, 10)

    def features(self, images: Tensor) -> Tensor:
        """Hidden layer before its nonlinearity, ``[N, 16]``, of images ``[N, 1, 8, 8]``."""
        return self.body(images)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[N, 10]`` of images ``[N, 1, 8, 8]``."""
        return self.classes(nn.functional.silu(self.features(images)))


CLASSIFIER = MODELS / "digits_classifier" / "classifier.safetensors"
CLASSIFIER_KIND = "digits_classifier"


@lru_cache(maxsize=1)
def digits_classifier() -> DigitsClassifier:
    """The bundled classifier. Its weights are in a file, because training would differ between machines."""
    tensors, _ = load_checkpoint(CLASSIFIER, CLASSIFIER_KIND)
    # On the meta device the constructor draws no random numbers, so the random state of the caller does not change.
    with torch.device("meta"):
        classifier = DigitsClassifier()
    classifier.load_state_dict(tensors, strict=True, assign=True)
    return classifier.eval().requires_grad_(False)


def train_digits_classifier() -> DigitsClassifier:
    """The classifier that is bundled: trained on the training split in a few seconds, from the same seed every time.

    Training images get the noise of one grey level, as those of the sampled DiT do: real digits have 17 levels, sampled
    ones do not, and features that depend on the levels would measure only that difference.
    """
    data = load_digits("train")
    with iteration_seed(_SEED, 0):
        classifier = DigitsClassifier()
    steps = _EPOCHS * (len(data.labels) // _BATCH)
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _PEAK_RATE, total_steps=steps)
    with torch.enable_grad():
        for step in range(steps):
            with iteration_seed(_SEED, step + 1):
                rows = torch.randint(len(data.labels), (_BATCH,))
                images = data.images[rows] + data.level_width * (torch.rand(_BATCH, 1, 8, 8) - 0.5)
            loss = nn.functional.cross_entropy(classifier(images), data.labels[rows], label_smoothing=0.05)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    return classifier.eval().requires_grad_(False)


def _check_images(where: str, images: object) -> Tensor:
    if not isinstance(images, Tensor):
        fail(where, "images", "a tensor [N, 1, 8, 8]", type(images).__name__, TypeError)
    if images.ndim != 4 or tuple(images.shape[1:]) != (1, 8, 8) or not len(images) or not images.is_floating_point():
        fail(where, "images", "floating point [N, 1, 8, 8] with N >= 1", images)
    if not bool(images.isfinite().all()):
        fail(where, "images", "finite", f"{int((~images.isfinite()).sum())} elements that are not")
    return images.detach().float().cpu().clamp(-1, 1)


@torch.no_grad()
def digit_features(images: Tensor) -> np.ndarray:
    """Features of the classifier, the inputs of :func:`free_dit.evaluation.frechet.frechet_distance`.

    Args:
        images: ``[N, 1, 8, 8]``; clamped to ``[-1, 1]``.

    Returns:
        float64 ``[N, 16]``.

    Raises:
        ValueError, TypeError: ``images`` has another shape or is not finite.
    """
    return digits_classifier().features(_check_images("digit_features", images)).double().numpy()


@torch.no_grad()
def class_accuracy(images: Tensor, labels: Tensor, level: float = 0.95) -> Estimate:
    """Share of images that the classifier reads as their label, with Wilson's score interval (JASA 22, 1927).

    Args:
        images: ``[N, 1, 8, 8]``; clamped to ``[-1, 1]``.
        labels: int64 ``[N]`` in ``[0, 10)``.
        level: confidence level, in (0, 1).

    Raises:
        ValueError, TypeError: an argument has another shape or range.
    """
    where = "class_accuracy"
    images, level = _check_images(where, images), check_level(where, level)
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
        fail(where, "labels", f"int64 [{len(images)}]", describe(labels))
    return share_interval((digits_classifier()(images).argmax(1) == labels.cpu()).numpy(), level)
