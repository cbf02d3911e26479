"""Files that are there whole or not at all, and arrays that are read without unpickling anything."""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from free_kernels.validation import fail

# What a truncated, overwritten or foreign .npz raises; every member of a .npz carries a checksum.
BROKEN = (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error)


def write_json(path: Path, value: object) -> None:
    """Write ``value`` to ``path``; a crash at any moment leaves the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(where: str, path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: the file holds something else.
    """
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{where}: {path} must be JSON, got {error}; remove it to have it made again") from error
    if not isinstance(value, dict):
        fail(where, str(path), "a JSON object", type(value).__name__)
    return value


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write an ``.npz``; a crash at any moment leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as handle:
            np.savez(handle, **arrays)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_arrays(path: Path) -> dict[str, np.ndarray] | None:
    """All arrays of an ``.npz``, or None where the file is missing, damaged or holds objects."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except BROKEN:
        return None
