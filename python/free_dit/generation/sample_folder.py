"""The folder of a sample set: its settings, its images in shards, and a record with hashes that commits each shard."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from free_dit.files import array_bytes, keep_settings, read_arrays, read_json, sha256_of, write_files, write_json
from free_dit.generation.settings import WHERE, GenerateSettings
from free_kernels.validation import check_int, fail

KIND = "free_dit sample set"
MANIFEST = "manifest.json"
SUMS = "SHA256SUMS"
NOT_DRAWN = "not drawn yet"
# In a manifest, the numbers of images that a set had before it was asked for with more.
GROWN = "grown_from"
_DIGEST = re.compile(r"[0-9a-f]{64}")


class SampleFolder:
    """A sample set on disk. A shard counts as drawn if it has a record and its files have the hashes in the record.

    Attributes:
        folder: holds ``manifest.json`` and ``shards/``; images of PNG sets are in ``images/`` with ``labels.txt``.
        settings: of the set.
        num_classes: image i has label i modulo this number.
        ends: index past the last image of every stretch: a set that was asked for again with a larger ``num`` has one
            more. Each is in shards of its own, so that those before stay as they are.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder = Path(folder)
        self.settings = GenerateSettings(**{name: identity[name] for name in GenerateSettings.__dataclass_fields__})
        self.num_classes = check_int(WHERE, "num_classes", identity["num_classes"], 1)
        self.ends = _checked_ends([*identity.get(GROWN, []), self.settings.num])
        # Every record holds this hash: a record of another set is recognised. It is that of the set as it began.
        began = {name: value for name, value in identity.items() if name != GROWN} | {"num": self.ends[0]}
        self.set_id = hashlib.sha256(json.dumps(began, sort_keys=True).encode()).hexdigest()
        size, starts = self.settings.shard, [0, *self.ends[:-1]]
        self._shards = [
            range(first, min(first + size, end))
            for start, end in zip(starts, self.ends, strict=True)
            for first in range(start, end, size)
        ]

    @classmethod
    def begin(cls, folder: Path, settings: GenerateSettings, num_classes: int, facts: dict[str, Any]) -> SampleFolder:
        """Write the manifest of a new set, or open a set of the same settings; a larger ``num`` makes it grow.

        Raises:
            ValueError: the folder holds a set of other settings, or a larger one.
        """
        identity = {"kind": KIND, **facts, "num_classes": num_classes, **asdict(settings)}
        path = Path(folder) / MANIFEST
        if path.exists():
            held = read_json(WHERE, path)
            identity |= {GROWN: held[GROWN]} if GROWN in held else {}
            had = held.get("num")
            if type(had) is int and 0 < had < settings.num and held == identity | {"num": had}:
                # The sums of a complete set are those of all its files.
                (path.parent / SUMS).unlink(missing_ok=True)
                write_json(path, identity | {GROWN: [*held.get(GROWN, []), had]})
                identity[GROWN] = [*held.get(GROWN, []), had]
        keep_settings(WHERE, path, identity, "a sample set")
        samples = cls(folder, identity)
        if settings.format == "png":
            listed, text = samples.folder / "images" / "labels.txt", "".join(f"{y}\n" for y in samples.labels)
            if not listed.exists() or listed.read_text() != text:
                write_files({listed: text.encode()})
        return samples

    @classmethod
    def open(cls, folder: Path) -> SampleFolder:
        """The set in a folder.

        Raises:
            FileNotFoundError: there is no manifest.
            ValueError, TypeError: the manifest is of another kind, or damaged.
        """
        path = Path(folder) / MANIFEST
        manifest = read_json(WHERE, path)
        if manifest.get("kind") != KIND:
            fail(WHERE, str(path), f"of kind {KIND!r}", repr(manifest.get("kind")))
        lacking = sorted({"num_classes", *GenerateSettings.__dataclass_fields__} - manifest.keys())
        if lacking:
            fail(WHERE, str(path), "whole", "one without " + ", ".join(lacking))
        return cls(folder, manifest)

    @property
    def labels(self) -> np.ndarray:
        """int64 ``[num]``."""
        return np.arange(self.settings.num) % self.num_classes

    @property
    def shards(self) -> int:
        """Number of shards."""
        return len(self._shards)

    def images_of(self, shard: int) -> range:
        """Indices of the images of a shard."""
        return self._shards[shard]

    def files_of(self, shard: int) -> list[Path]:
        """Where the images of a shard lie."""
        if self.settings.format != "png":
            return [self.folder / "shards" / f"shard-{shard:06d}.{self.settings.format}"]
        return [self.folder / "images" / f"{index:08d}.png" for index in self.images_of(shard)]

    def record_path(self, shard: int) -> Path:
        """Where the record of a shard lies."""
        return self.folder / "shards" / f"shard-{shard:06d}.json"

    def recorded(self) -> list[int]:
        """Shards that have a record file; its content is not read."""
        names = {path.name for path in (self.folder / "shards").glob("shard-*.json")}
        return [shard for shard in range(self.shards) if self.record_path(shard).name in names]

    def record(self, shard: int) -> dict[str, Any] | None:
        """The record of a shard, or None where there is none, a damaged one, or one of another set."""
        try:
            record = json.loads(self.record_path(shard).read_bytes())
        except (FileNotFoundError, ValueError, RecursionError):
            return None
        number = len(self.images_of(shard))
        names = [str(path.relative_to(self.folder)) for path in self.files_of(shard)]
        expected: dict[str, Callable[[Any], bool]] = {
            "set": lambda value: value == self.set_id,
            "shard": lambda value: value == shard,
            "files": lambda value: isinstance(value, dict) and list(value) == names and _digests(list(value.values())),
            "images": lambda value: _digests(value) and len(value) == number,
            "rounds": lambda value: _numbers(value, number),
            "bias": lambda value: _numbers(value, number),
            "counts": lambda value: _numbers(value, 3),
        }
        if not isinstance(record, dict) or record.keys() != expected.keys():
            return None
        return record if all(holds(record[name]) for name, holds in expected.items()) else None

    def problem(self, shard: int) -> str | None:
        """Why a shard counts as missing; None if its files are unchanged since it was committed."""
        record = self.record(shard)
        if record is None:
            if self.record_path(shard).exists():
                return "its record is damaged or of another set"
            return "it has no record" if any(path.exists() for path in self.files_of(shard)) else NOT_DRAWN
        for path, digest in zip(self.files_of(shard), record["files"].values(), strict=True):
            if not path.is_file():
                return f"{path.name} is gone"
            if sha256_of(path) != digest:
                return f"{path.name} is damaged"
        return None

    def commit(
        self, shard: int, pixels: np.ndarray, counted: dict[str, list[float]], workspace: Path | None = None
    ) -> None:
        """Write the images of a shard, and then its record.

        Args:
            shard: which.
            pixels: uint8 ``[N, H, W, 1 or 3]``; in the format "npy" the samples, float32 ``[N, C, H, W]``.
            counted: ``rounds``, ``bias`` of every image; ``counts``: drafts tested, drafts accepted, target rows.
            workspace: as in :func:`free_dit.files.write_files`.
        """
        paths, images = self.files_of(shard), self.images_of(shard)
        if self.settings.format == "npz":
            contents = [array_bytes({"arr_0": pixels, "arr_1": self.labels[images.start : images.stop]})]
        elif self.settings.format == "npy":
            contents = [_npy(pixels)]
        else:
            contents = [_png(image) for image in pixels]
        record = {
            "set": self.set_id,
            "shard": shard,
            "files": {
                str(path.relative_to(self.folder)): hashlib.sha256(data).hexdigest()
                for path, data in zip(paths, contents, strict=True)
            },
            "images": [hashlib.sha256(image.tobytes()).hexdigest() for image in pixels],
            **counted,
        }
        write_files(dict(zip(paths, contents, strict=True)), workspace)
        write_files({self.record_path(shard): json.dumps(record).encode()}, workspace)

    def read(self, shard: int) -> np.ndarray:
        """Images uint8 ``[N, H, W, 1 or 3]`` of a shard; samples float32 ``[N, C, H, W]`` in the format "npy".

        Raises:
            ValueError: they are not all there, or not what was committed.
        """
        problem = self.problem(shard)
        if problem is not None:
            fail(WHERE, str(self.folder), "complete", f"shard {shard} missing ({problem}); draw it to the end first")
        paths = self.files_of(shard)
        if self.settings.format == "npz":
            pixels = (read_arrays(paths[0]) or {}).get("arr_0")
        elif self.settings.format == "npy":
            pixels = np.load(paths[0], allow_pickle=False)
        else:
            pixels = np.stack([np.asarray(Image.open(path, formats=("PNG",))) for path in paths])
            pixels = pixels[..., None] if pixels.ndim == 3 else pixels
        if pixels is None or pixels.ndim != 4 or len(pixels) != len(self.images_of(shard)):
            fail(WHERE, str(paths[0]), "images [N, H, W, C] of its shard", "others")
        return pixels

    def missing(self) -> list[int]:
        """Shards that are not there or damaged; reads everything."""
        return [shard for shard in range(self.shards) if self.problem(shard) is not None]

    def image_hashes(self) -> list[str]:
        """SHA-256 of the pixels of every image of a complete set, in order."""
        return [digest for record in self._records() for digest in record["images"]]

    def write_sums(self) -> None:
        """The hashes of all files of a complete set, as ``sha256sum --check`` reads them."""
        lines = [f"{digest}  {name}\n" for record in self._records() for name, digest in record["files"].items()]
        write_files({self.folder / SUMS: "".join(lines).encode()})

    def sampling_statistics(self) -> dict[str, Any]:
        """Calls, acceptance and bias bound of a complete set."""
        records, settings = self._records(), self.settings
        rounds, bias = (np.concatenate([record[name] for record in records]) for name in ("rounds", "bias"))
        tested, accepted, rows = np.sum([record["counts"] for record in records], 0).tolist()
        return {
            "call_reduction": settings.steps * settings.num / float(rounds.sum()),
            "acceptance": accepted / tested if tested else None,
            "rows_per_step": rows / (settings.steps * settings.num),
            "bias_bound": float(bias.mean()),
        }

    def _records(self) -> list[dict[str, Any]]:
        records = [self.record(shard) for shard in range(self.shards)]
        missing = sum(record is None for record in records)
        if missing:
            fail(WHERE, str(self.folder), "complete", f"{missing} of {len(records)} shards missing")
        return [record for record in records if record is not None]


def _checked_ends(ends: list[Any]) -> list[int]:
    """Ends of a set's stretches, ascending; else ValueError or TypeError."""
    for before, end in zip([0, *ends], ends, strict=False):
        check_int(WHERE, GROWN, end, before + 1)
    return ends


def _digests(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) and _DIGEST.fullmatch(one) for one in value)


def _numbers(value: Any, count: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) == count
        and all(isinstance(one, int | float) and not isinstance(one, bool) and abs(one) < 1e300 for one in value)
    )


def _npy(samples: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.ascontiguousarray(samples))
    return stream.getvalue()


def _png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(stream, "PNG")
    return stream.getvalue()
