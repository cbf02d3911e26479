"""Folders of images as evaluation reads them: which files count, in which order, and of which class each is."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np

from free_dit.generation.sample_folder import MANIFEST
from free_kernels.validation import fail

WHERE = "evaluate"
LABELS = "labels.txt"
READ = (".png", ".jpg", ".jpeg")
# Images that are not read: a folder that holds some would be evaluated without them.
_OTHERS = (".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".avif", ".heic", ".jp2", ".jxl")


def check_class_labels(source: str, labels: np.ndarray, count: int) -> np.ndarray:
    """Labels as int64 ``[count]``, at least 0."""
    if labels.shape != (count,) or labels.dtype.kind not in "iu" or labels.min() < 0:
        fail(WHERE, source, f"labels of integers at least 0, [{count}]", f"{labels.dtype} {list(labels.shape)}")
    return labels.astype(np.int64)


def _hidden(name: str) -> bool:
    """Whether an entry is not the user's own: notebooks' checkpoints, thumbnails, what archives of macOS add."""
    return name.startswith(".") or name == "__MACOSX"


def image_files(folder: Path) -> list[Path]:
    """Images anywhere below a folder, in the order of their names' characters; through links, without hidden files.

    Raises:
        ValueError: an image of a format that is not read, a link without a target, or folders linked in a circle.
    """
    found: list[Path] = []

    def walk(place: Path, above: tuple[str, ...]) -> None:
        here = os.path.realpath(place)
        if here in above:
            fail(WHERE, str(place), "linked without a circle", f"a link to {here}")
        for entry in sorted(place.iterdir()):
            if _hidden(entry.name):
                continue
            suffix = entry.suffix.lower()
            if entry.is_dir():
                walk(entry, (*above, here))
            elif suffix in _OTHERS:
                fail(WHERE, str(entry), "PNG or JPEG, as images are read", f"a file {entry.suffix!r}")
            elif suffix in READ:
                if not entry.exists():
                    fail(WHERE, str(entry), "an existing file", "a link without a target")
                found.append(entry)

    walk(folder, ())
    return sorted(found)


class PngSet:
    """A folder of PNG or JPEG, all at one depth, in the order of their names' characters.

    Labels come from ``labels.txt`` or from subfolders (their names where they are integers, else their sorted places);
    otherwise there are none. Where all images are below one folder, such as ``val/``, classes are the folders in it. A
    line of ``labels.txt`` is an integer, in the files' order, or a file's path and an integer.

    Raises:
        ValueError: no images; images at unlike depths, deeper than classes, or in several splits; labels that do not
            fit the files, or whose order could be meant in two ways. The message names a file.
    """

    def __init__(self, folder: Path) -> None:
        self.source, self._folder = str(folder), folder
        self._paths = image_files(folder)
        self.count = len(self._paths)
        if not self.count:
            fail(WHERE, self.source, f"a folder of PNG or one with {MANIFEST}", "a folder without either")
        self.labels = self._labels()

    def _labels(self) -> np.ndarray | None:
        parts = [path.relative_to(self._folder).parts for path in self._paths]
        depths = [len(part) for part in parts]
        if min(depths) != max(depths):
            odd, other = (self._paths[depths.index(depth)] for depth in sorted({*depths}, key=depths.count)[:2])
            fail(WHERE, str(odd), f"in as many folders as the others, such as {other}", "another depth")
        listed = self._folder / LABELS
        if listed.is_file():
            return self._listed(listed)
        if depths[0] == 1:
            return None
        # Folders that hold everything, such as one split's.
        level = next(i for i in range(depths[0]) if i == depths[0] - 2 or len({part[i] for part in parts}) > 1)
        if level != depths[0] - 2:
            wanted = "in a folder for each class, of one split; give that folder"
            fail(WHERE, str(self._paths[0]), wanted, f"{depths[0] - level} levels")
        return self._numbered([part[level] for part in parts])

    def _numbered(self, names: list[str]) -> np.ndarray:
        distinct = sorted(set(names))
        whole = all(name.isdecimal() for name in distinct)
        order = {name: int(name) if whole else place for place, name in enumerate(distinct)}
        for one, other in pairwise(distinct):
            if list(order.values()).count(order[one]) > 1:
                fail(WHERE, str(self._folder), "of one folder for each class", f"{one} and {other}")
        return np.array([order[name] for name in names], np.int64)

    def _listed(self, listed: Path) -> np.ndarray:
        lines = [line.rsplit(maxsplit=1) for line in listed.read_text().splitlines() if line.strip()]
        names = [path.relative_to(self._folder).as_posix() for path in self._paths]
        try:
            values = [int(line[-1]) for line in lines]
        except ValueError as error:
            raise ValueError(f"{WHERE}: {listed} must hold an integer a line, got {error}") from error
        if any(len(line) == 2 for line in lines):
            return self._by_name(listed, lines, values, names)
        for before, after in pairwise(names):
            if _natural(before) > _natural(after):
                wanted = "for names that sort alike as text and by number, or have a file's name in every line"
                fail(WHERE, str(listed), wanted, f"{before} before {after}")
        return check_class_labels(str(listed), np.array(values, np.int64), self.count)

    def _by_name(self, listed: Path, lines: list[list[str]], values: list[int], names: list[str]) -> np.ndarray:
        given = {line[0]: value for line, value in zip(lines, values, strict=True) if len(line) == 2}
        lacking = next((name for name in names if name not in given), None)
        if lacking is not None or len(given) != len(lines):
            fail(WHERE, str(listed), "of one line for each file", f"none for {lacking}" if lacking else "others")
        return check_class_labels(str(listed), np.array([given[name] for name in names], np.int64), self.count)

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """uint8 ``[B, H, W, 1 or 3]``, B = ``size`` except for the last."""
        shape: tuple[int, ...] | None = None
        for begin in range(0, self.count, size):
            images = []
            for path in self._paths[begin : begin + size]:
                images.append(_pixels(path))
                shape = shape or images[-1].shape
                if images[-1].shape != shape:
                    fail(WHERE, str(path), f"of the others' shape {list(shape)}", str(list(images[-1].shape)))
            yield np.stack(images)


def _natural(name: str) -> list[str | int]:
    """A key that sorts numbers within names by value: text and numbers in turn."""
    return [int(piece) if place % 2 else piece for place, piece in enumerate(re.split(r"([0-9]+)", name))]


def _pixels(path: Path) -> np.ndarray:
    """uint8 ``[H, W, 1 or 3]``; 16 bits of grey are rounded to the nearest of 256 levels."""
    from PIL import Image

    kind = "PNG" if path.suffix.lower() == ".png" else "JPEG"
    try:
        with Image.open(path, formats=(kind,)) as image:
            if image.mode.startswith("I"):
                deep = np.asarray(image).astype(np.int64)
                pixels = ((deep + 128) // 257).clip(0, 255).astype(np.uint8)
            else:
                pixels = np.asarray(image if image.mode == "L" else image.convert("RGB"))
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{WHERE}: {path} must be a {kind}, got {error}") from error
    return pixels[..., None] if pixels.ndim == 2 else pixels
