"""Image data sets that are part of well-known packages, so that nothing is downloaded."""

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


# One photograph for each class, from the wheels of scikit-image and scikit-learn.
PHOTOGRAPHS = (
    "astronaut",
    "chelsea",
    "coffee",
    "rocket",
    "hubble_deep_field",
    "immunohistochemistry",
    "retina",
    "motorcycle",
    "china",
    "flower",
)
SMALLEST_CROP, LARGEST_CROP = 48, 160


def _photograph(name: str) -> np.ndarray:
    """uint8 ``[H, W, 3]``."""
    if name in ("china", "flower"):
        from sklearn.datasets import load_sample_image

        return np.asarray(load_sample_image(f"{name}.jpg"))
    from skimage import data

    return np.asarray(data.stereo_motorcycle()[0] if name == "motorcycle" else getattr(data, name)())


def load_photographs(split: str = "train", size: int = 32, crops_per_class: int = 2000) -> ImageData:
    """Random square crops of ten photographs, one class each: real natural images without a download.

    A crop's side is log-uniform in [48, 160] pixels; it is scaled to ``size`` by area and mirrored half of the time.
    The test split crops the right fifth of every photograph, the train split the rest, so that they share no pixel.

    Args:
        split: ``"train"`` or ``"test"`` (a tenth as many crops).
        size: side of the images.
        crops_per_class: crops of each photograph in the train split.
    """
    from PIL import Image

    if split not in ("train", "test"):
        raise ValueError(f"load_photographs: split must be 'train' or 'test', got {split!r}")
    count = crops_per_class if split == "train" else max(1, crops_per_class // 10)
    images = np.empty((len(PHOTOGRAPHS), count, size, size, 3), np.uint8)
    for label, name in enumerate(PHOTOGRAPHS):
        pixels = _photograph(name)
        border = pixels.shape[1] * 4 // 5
        part = Image.fromarray(np.ascontiguousarray(pixels[:, :border] if split == "train" else pixels[:, border:]))
        generator = np.random.default_rng([label, split == "test"])
        largest = min(LARGEST_CROP, *part.size)
        sides = np.exp(generator.uniform(np.log(min(SMALLEST_CROP, largest)), np.log(largest), count))
        corners, mirrored = generator.uniform(size=(count, 2)), generator.uniform(size=count) < 0.5
        for index in range(count):
            side = int(sides[index])
            left, top = (
                int(share * (extent - side + 1)) for share, extent in zip(corners[index], part.size, strict=True)
            )
            crop = part.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BOX)
            images[label, index] = np.asarray(crop)[:, ::-1] if mirrored[index] else np.asarray(crop)
    values = torch.from_numpy(images).flatten(0, 1).permute(0, 3, 1, 2).float() / 127.5 - 1.0
    labels = torch.arange(len(PHOTOGRAPHS)).repeat_interleave(count)
    return ImageData(values.contiguous(), labels, num_classes=len(PHOTOGRAPHS), level_width=2.0 / 255.0)


DATASETS = {"digits": load_digits, "photographs": load_photographs}
