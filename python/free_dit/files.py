"""Files written atomically, JSON, and arrays read without unpickling."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from free_kernels.validation import fail

# Errors of a truncated, overwritten or foreign .npz; every member of a .npz has a checksum.
BROKEN = (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error)


def write_files(files: Mapping[Path, bytes], workspace: Path | None = None) -> None:
    """Write files in order; after a crash at any moment, also of the machine, each is the old file or the new one.

    On return all files and the entries of their folders are on the disk.

    Args:
        files: contents by path; folders are made.
        workspace: an existing folder of this process on the same file system, where files are written before they are
            renamed; the folder of each file if None.

    Raises:
        OSError: names the file that could not be written; those before it are whole.
    """
    for path, data in files.items():
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp") if workspace is None else workspace / path.name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as handle:
                handle.write(data)
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(temporary, path)
        except OSError as error:
            # The error of a failed write (a full disk) does not name the file.
            error.filename, error.filename2 = str(path), None
            raise
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()
    for folder in dict.fromkeys(path.parent for path in files):
        _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    """Flush a folder, which holds the names of its files, to disk; POSIX only."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        error.filename = str(folder)
        raise
    finally:
        os.close(handle)


def json_bytes(value: object) -> bytes:
    """Indented JSON without NaN, the format of all JSON files of this package."""
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()


def plain(value: Any, digits: int = 6) -> Any:
    """The value in types of JSON: arrays as lists, floats rounded to ``digits``, NaN and infinities as null."""
    if is_dataclass(value):
        value = asdict(value)  # type: ignore[arg-type]
    if isinstance(value, dict):
        return {str(key): plain(item, digits) for key, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [plain(item, digits) for item in value]
    if isinstance(value, (float, np.floating)):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value


def write_json(path: Path, value: object) -> None:
    """Write ``value`` to ``path``; a crash at any moment leaves the old file or the new one."""
    write_files({path: json_bytes(value)})


def read_json(where: str, path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: the file holds something else.
    """
    try:
        value = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: {path} must be JSON, got {error}; remove it to have it made again") from error
    if not isinstance(value, dict):
        fail(where, str(path), "a JSON object", type(value).__name__)
    return value


def keep_settings(where: str, path: Path, settings: dict[str, Any], held: str) -> None:
    """Write the settings of a folder into it, or compare them with those that an earlier run wrote.

    Args:
        where: the caller, for errors.
        path: a file in the folder.
        settings: plain values.
        held: what the folder holds, for errors.

    Raises:
        ValueError: the folder has other settings.
    """
    if not path.exists():
        write_json(path, settings)
        return
    kept = read_json(where, path)
    changed = sorted(name for name in settings.keys() | kept.keys() if settings.get(name) != kept.get(name))
    if changed:
        shown = ", ".join(f"{name} {kept.get(name)!r} (now {settings.get(name)!r})" for name in changed)
        advice = "choose another --out or remove it"
        raise ValueError(f"{where}: {path.parent} must hold {held} of the same settings, got {shown}; {advice}")


def array_bytes(arrays: dict[str, np.ndarray]) -> bytes:
    """The bytes of an ``.npz``; equal arrays give equal bytes."""
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write an ``.npz``; a crash at any moment leaves the old file or the new one."""
    write_files({path: array_bytes(arrays)})


def read_arrays(path: Path) -> dict[str, np.ndarray] | None:
    """All arrays of an ``.npz``, or None where the file is missing, damaged or holds objects."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except BROKEN:
        return None


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's contents."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def sha256_of_state(state: Mapping[str, torch.Tensor], begin: bytes = b"") -> str:
    """SHA-256 of the names and values of a state dict, after some other bytes."""
    digest = hashlib.sha256(begin)
    for name, value in sorted(state.items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
