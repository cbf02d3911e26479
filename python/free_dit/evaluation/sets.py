"""Sets of images as evaluation reads them: ``.npz`` of the ADM suite, folders of images, drawn sets; batch by batch."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.lib import format as npy

from free_dit.data import load_digits
from free_dit.evaluation.image_folders import WHERE, PngSet, check_class_labels
from free_dit.files import BROKEN
from free_dit.generation import SampleFolder, to_pixels
from free_dit.generation.sample_folder import MANIFEST
from free_kernels.validation import fail

REAL_DIGITS = {"digits-train": "train", "digits-test": "test"}


class ImageSet(Protocol):
    """Images that can be read in order any number of times.

    Attributes:
        source: where they come from.
        count: N.
        labels: int64 ``[N]``, or None.
    """

    source: str
    count: int
    labels: np.ndarray | None

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """uint8 ``[B, H, W, 1 or 3]``, B = ``size`` except for the last."""
        ...


@dataclass(frozen=True)
class Statistics:
    """Mean and covariance of a reference in an extractor's features; enough for the Frechet distance only.

    Attributes:
        source: the file.
        mu: float64 ``[D]``.
        sigma: float64 ``[D, D]``.
    """

    source: str
    mu: np.ndarray
    sigma: np.ndarray


def _check_pixels(source: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
    if dtype != np.uint8 or len(shape) != 4 or shape[-1] not in (1, 3) or not shape[0]:
        fail(WHERE, source, "images uint8 [N, H, W, 1 or 3] with N >= 1", f"{dtype} {list(shape)}")


class ArraySet:
    """Images in memory."""

    def __init__(self, source: str, pixels: np.ndarray, labels: np.ndarray | None = None) -> None:
        _check_pixels(source, pixels.shape, pixels.dtype)
        self.source, self.count, self._pixels = source, len(pixels), pixels
        self.labels = None if labels is None else check_class_labels(source, labels, self.count)

    def batches(self, size: int) -> Iterator[np.ndarray]:  # noqa: D102
        for begin in range(0, self.count, size):
            yield self._pixels[begin : begin + size]


class NpzSet:
    """``arr_0`` of an ``.npz``, read as a stream: one batch of images is in memory at a time."""

    def __init__(self, path: Path) -> None:
        self.source, self._path = str(path), path
        try:
            with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as stream:
                shape, fortran, dtype = self._header(stream)
            with np.load(path, allow_pickle=False) as arrays:
                labels = arrays["arr_1"] if "arr_1" in arrays.files else None
        except BROKEN as error:
            raise ValueError(f"{WHERE}: {path} must be a whole .npz with arr_0 and no objects, got {error}") from error
        _check_pixels(self.source, shape, dtype)
        if fortran:
            fail(WHERE, self.source, "images in C order", "Fortran order")
        self.count, self._shape = shape[0], shape[1:]
        self.labels = None if labels is None else check_class_labels(self.source, labels, self.count)

    @staticmethod
    def _header(stream) -> tuple[tuple[int, ...], bool, np.dtype]:
        version = npy.read_magic(stream)
        return npy.read_array_header_1_0(stream) if version == (1, 0) else npy.read_array_header_2_0(stream)

    def batches(self, size: int) -> Iterator[np.ndarray]:  # noqa: D102
        try:
            with zipfile.ZipFile(self._path) as archive, archive.open("arr_0.npy") as stream:
                self._header(stream)
                for begin in range(0, self.count, size):
                    shape = (min(size, self.count - begin), *self._shape)
                    data = stream.read(int(np.prod(shape)))
                    yield np.frombuffer(data, np.uint8).reshape(shape)
        except BROKEN as error:
            raise ValueError(f"{WHERE}: {self.source} must be a whole .npz, got {error}") from error


class DrawnSet:
    """A set written by :func:`free_dit.generation.generate`; all of its shards must be there, as they were drawn."""

    def __init__(self, folder: Path) -> None:
        self.source, self.drawn = str(folder), SampleFolder.open(folder)
        if self.drawn.settings.format == "npy":
            fail(WHERE, self.source, "a set of images; draw it with --vae", "latents")
        missing = self.drawn.missing()
        if missing:
            total = self.drawn.shards
            fail(WHERE, self.source, "complete", f"{len(missing)} of {total} shards missing; draw it to the end first")
        self.count = self.drawn.settings.num
        self.labels = self.drawn.labels

    def batches(self, size: int) -> Iterator[np.ndarray]:  # noqa: D102
        kept: list[np.ndarray] = []
        for shard in range(self.drawn.shards):
            kept.append(self.drawn.read(shard))
            while sum(map(len, kept)) >= size:
                whole = np.concatenate(kept)
                yield whole[:size]
                kept = [whole[size:]]
        rest = np.concatenate(kept)
        if len(rest):
            yield rest


def open_images(source: str | Path) -> ImageSet:
    """A set of images by path, or ``"digits-train"``, ``"digits-test"`` (the bundled real digits).

    Raises:
        FileNotFoundError: nothing there.
        ValueError: something else there; the message names it.
    """
    path = Path(source)
    if str(source) in REAL_DIGITS and not path.exists():
        data = load_digits(REAL_DIGITS[str(source)])
        return ArraySet(str(source), to_pixels(data.images), data.labels.numpy())
    if path.is_dir():
        return DrawnSet(path) if (path / MANIFEST).is_file() else PngSet(path)
    if not path.is_file():
        raise FileNotFoundError(f"{WHERE}: {source} must be an .npz, a folder, or one of {', '.join(REAL_DIGITS)}")
    if path.suffix != ".npz":
        fail(WHERE, str(path), "an .npz or a folder", f"a file {path.suffix!r}")
    return NpzSet(path)


def open_reference(source: str | Path) -> ImageSet | Statistics:
    """Like :func:`open_images`, or statistics: an ``.npz`` with ``mu [D]`` and ``sigma [D, D]``.

    Raises:
        FileNotFoundError, ValueError: as :func:`open_images`; the statistics are misshapen or not finite.
    """
    path = Path(source)
    if path.suffix == ".npz" and path.is_file():
        try:
            with np.load(path, allow_pickle=False) as arrays:
                # The ADM suite's references hold both images and statistics; images allow all metrics.
                held = {name: arrays[name] for name in ("mu", "sigma") if "arr_0" not in arrays.files}
        except BROKEN as error:
            if not isinstance(error, KeyError):
                raise ValueError(f"{WHERE}: {path} must be a whole .npz without objects, got {error}") from error
            held = {}
        if held:
            mu, sigma = (np.asarray(held[name], np.float64) for name in ("mu", "sigma"))
            right = mu.ndim == 1 and sigma.shape == (len(mu), len(mu)) and np.allclose(sigma, sigma.T)
            if not right or not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
                fail(WHERE, str(path), "finite mu [D] and symmetric sigma [D, D]", f"{mu.shape} and {sigma.shape}")
            return Statistics(str(path), mu, sigma)
    return open_images(source)
