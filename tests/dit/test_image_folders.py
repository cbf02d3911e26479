"""Folders as people have them: the right files, order and labels, or an error that names the file."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from free_dit.evaluation import open_images


def write(path: Path, level: int = 40, depth: type = np.uint8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8), level, depth)).save(path)


def folder(place: Path, names: str | list[str], labels: str | None = None) -> Path:
    """Images whose grey levels are their places in the list."""
    for level, name in enumerate(names.split() if isinstance(names, str) else names):
        write(place / name, level)
    if labels is not None:
        (place / "labels.txt").write_text(labels)
    return place


def levels(place: Path) -> list[int]:
    """Grey level of every image, in the set's order."""
    return np.concatenate(list(open_images(place).batches(3)))[:, 0, 0, 0].tolist()


@pytest.mark.parametrize(
    ("names", "order", "labels"),
    [
        ("cat/0.png dog/0.png .ipynb_checkpoints/0.png __MACOSX/cat/0.png cat/._0.png", [0, 1], [0, 1]),
        ("val/cat/0.png val/dog/0.png", [0, 1], [0, 1]),
        ("a/b/val/7/0.png a/b/val/30/0.png", [1, 0], [30, 7]),
        ("cat/0.png cat/1.png", [0, 1], [0, 0]),
        ("cat/0.PNG dog/0.Png", [0, 1], [0, 1]),
        ("10/0.png 9/0.png 9/1.png", [0, 1, 2], [10, 9, 9]),
        ("0.png 1.png", [0, 1], None),
    ],
)
def test_what_is_read(tmp_path, names, order, labels):
    images = open_images(folder(tmp_path, names))
    assert images.count == len(order)
    assert levels(tmp_path) == order
    assert (None if images.labels is None else images.labels.tolist()) == labels


def test_jpeg_beside_png(tmp_path):
    """Flat images survive JPEG to the level."""
    assert levels(folder(tmp_path, "0.png 1.jpg 2.JPEG")) == [0, 1, 2]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("cat/0.png cat/1.png dog/0.png stray.png", "stray.png must be in as many folders as the others, such as "),
        ("cat/0.png cat/1.png dog/deep/0.png", "dog/deep/0.png must be in as many folders as the others, such as "),
        ("train/cat/0.png val/cat/0.png", "train/cat/0.png must be in a folder for each class, of one split"),
        ("val/cat/a/0.png val/dog/b/0.png", "val/cat/a/0.png must be in a folder for each class, of one split"),
        ("0.png 1.webp", "1.webp must be PNG or JPEG, as images are read"),
        ("0.png 1.TIFF", "1.TIFF must be PNG or JPEG, as images are read"),
        ("1/0.png 01/0.png", "must be of one folder for each class, got 01 and 1"),
    ],
)
def test_what_is_refused_by_name(tmp_path, names, message):
    with pytest.raises(ValueError, match=f"^evaluate: .*{re.escape(message)}"):
        open_images(folder(tmp_path, names))


def test_sixteen_bits_are_rounded_to_eight(tmp_path):
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(values).save(tmp_path / "0.png")
    found = next(open_images(tmp_path).batches(1))[0, ..., 0]
    np.testing.assert_array_equal(found, np.round(values / 65535 * 255).astype(np.uint8))


def test_linked_folders_and_files_are_followed(tmp_path):
    real = folder(tmp_path / "real", "0.png")
    write(tmp_path / "set" / "bird" / "0.png", 9)
    (tmp_path / "set" / "cat").symlink_to(real)
    (tmp_path / "set" / "bird" / "1.png").symlink_to(real / "0.png")
    images = open_images(tmp_path / "set")
    assert images.labels.tolist() == [0, 0, 1]
    assert levels(tmp_path / "set") == [9, 0, 0]
    (tmp_path / "set" / "bird" / "2.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(ValueError, match=r"2\.png must be an existing file, got a link without a target"):
        open_images(tmp_path / "set")
    (tmp_path / "set" / "bird" / "2.png").unlink()
    (tmp_path / "set" / "cow").symlink_to(tmp_path / "set")
    with pytest.raises(ValueError, match="set/cow must be linked without a circle"):
        open_images(tmp_path / "set")


def test_labels_are_of_the_files_that_they_are_meant_for(tmp_path):
    lines = "\n".join(map(str, range(12)))
    padded = folder(tmp_path / "padded", [f"{i:02d}.png" for i in range(12)], lines)
    assert open_images(padded).labels.tolist() == levels(padded) == list(range(12))
    # Beyond nine files names without zeros sort as 0, 1, 10, 11, 2: whose order the lines are in is not known.
    plain = folder(tmp_path / "plain", [f"{i}.png" for i in range(12)], lines)
    with pytest.raises(ValueError, match=r"labels\.txt must be for names that sort alike .*got 11\.png before 2\.png"):
        open_images(plain)
    named = "\n".join(f"{i}.png {i}" for i in range(12))
    folder(plain, [], named)
    assert open_images(plain).labels.tolist() == levels(plain) == [0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9]
    few = folder(tmp_path / "few", [f"{i}.png" for i in range(9)], "\n".join("876543210"))
    assert open_images(few).labels.tolist() == list(range(8, -1, -1))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("0\n1\n", r"be labels of integers at least 0, \[3\], got int64 \[2\]"),
        ("0\n1\nx\n", "hold an integer a line, got invalid literal"),
        ("0\n1\n-1\n", r"be labels of integers at least 0, \[3\]"),
        ("a.png 0\nb.png 1\n", "be of one line for each file, got none for c.png"),
        ("a.png 0\nb.png 1\nc.png 2\nc.png 3\n", "be of one line for each file, got others"),
        ("a.png 0\nb.png 1\n2\n", "be of one line for each file, got none for c.png"),
    ],
)
def test_labels_that_do_not_fit_are_named(tmp_path, labels, message):
    with pytest.raises(ValueError, match=rf"^evaluate: .*labels\.txt must {message}"):
        open_images(folder(tmp_path, "a.png b.png c.png", labels))


def test_images_of_other_shapes_are_named(tmp_path):
    folder(tmp_path, "0.png")
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "1.png")
    with pytest.raises(ValueError, match=r"1\.png must be of the others' shape \[8, 8, 1\], got \[4, 4, 1\]"):
        list(open_images(tmp_path).batches(9))
