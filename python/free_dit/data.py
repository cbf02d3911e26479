"""Image data sets that ship inside well-known packages, so that nothing is downloaded."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class ImageData:
    """Images and labels.

    Attributes:
        images: float32 ``[N, C, H, W]`` in ``[-1, 1]``.
        labels: int64 ``[N]``.
        num_classes: number of classes.
        level_width: distance between two neighbouring grey levels on the ``[-1, 1]`` scale.
    """

    images: torch.Tensor
    labels: torch.Tensor
    num_classes: int
    level_width: float


def load_digits(split: str = "train", held_out: float = 0.2) -> ImageData:
    """scikit-learn's handwritten digits (UCI ML, 1797 images of 8 x 8, 17 grey levels, 10 classes).

    Args:
        split: ``"train"``, ``"test"`` (the same stratified ``held_out`` fraction every time) or ``"all"``.
        held_out: fraction that the test split holds.
    """
    from sklearn.datasets import load_digits as sklearn_digits
    from sklearn.model_selection import train_test_split

    if split not in ("train", "test", "all"):
        raise ValueError(f"load_digits: split must be 'train', 'test' or 'all', got {split!r}")
    raw = sklearn_digits()
    index = np.arange(len(raw.target))
    if split != "all":
        parts = train_test_split(index, test_size=held_out, random_state=0, stratify=raw.target)
        index = parts[0] if split == "train" else parts[1]
    images = torch.from_numpy(raw.images[index]).float().unsqueeze(1) / 8.0 - 1.0
    return ImageData(images, torch.from_numpy(raw.target[index]).long(), num_classes=10, level_width=0.125)


DATASETS = {"digits": load_digits}
