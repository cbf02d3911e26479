"""Checkpoint files: safetensors with a JSON metadata entry, written atomically and read with named errors."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

METADATA_KEY = "free_kernels"
Module = TypeVar("Module", bound=torch.nn.Module)
# Exceptions that reading a file of arbitrary bytes can raise.
_UNREADABLE = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, SafetensorError)


class CheckpointError(ValueError):
    """A checkpoint file is broken, truncated or of another kind."""


@contextmanager
def plain_defaults() -> Iterator[None]:
    """Float32 and the CPU as torch's defaults, for modules that are built as they were saved."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)


@contextmanager
def reading(where: str, path: object, expectation: str) -> Iterator[None]:
    """Turn whatever wrong content leads to into a :class:`CheckpointError` that names the file."""
    try:
        yield
    except CheckpointError:
        raise
    except _UNREADABLE as error:
        found = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{where}: {path} must hold {expectation}, got {found}") from error


def save_checkpoint(path: str | os.PathLike[str], tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write tensors and JSON metadata to ``path``; a crash at any moment leaves the old file or the new one.

    Raises:
        OSError: the path cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(contiguous, temporary, metadata={METADATA_KEY: json.dumps(metadata)})
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except SafetensorError as error:  # safetensors reports a full disk or a missing permission this way
        raise OSError(f"save_checkpoint: cannot write {path}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors and metadata of a file whose metadata says ``"kind": kind``.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: not a safetensors file, truncated, without our metadata, or of another kind.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"load_checkpoint: path must be an existing file, got {path}")
    try:
        # safetensors 0.8.0 turns an interrupt within a read into a ValueError; signals reach the main thread only.
        stopped = threading.Event()
        with ThreadPoolExecutor(1) as reader:
            try:
                tensors, metadata = reader.submit(_read, path, stopped).result()
            finally:
                stopped.set()
    except _UNREADABLE as error:
        raise CheckpointError(f"load_checkpoint: {path} must be a complete safetensors file, got {error}") from error
    if not isinstance(metadata, dict) or metadata.get("kind") != kind:
        found = metadata.get("kind") if isinstance(metadata, dict) else None
        raise CheckpointError(f"load_checkpoint: {path} must be a checkpoint of kind {kind!r}, got {found!r}")
    return tensors, metadata


def _read(path: Path, stopped: threading.Event) -> tuple[dict[str, Tensor], Any]:
    """All tensors of a safetensors file, and our entry of its metadata; fewer once nobody waits for them."""
    with safe_open(path, framework="pt") as handle:
        metadata = json.loads((handle.metadata() or {}).get(METADATA_KEY, "null"))
        names = (name for name in handle.keys() if not stopped.is_set())  # noqa: SIM118
        return {name: handle.get_tensor(name) for name in names}, metadata


def load_weights(module: torch.nn.Module, tensors: dict[str, Tensor], source: object) -> None:
    """``load_state_dict(strict=True)`` with one clear error for missing, unexpected, misshapen or integer tensors."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise CheckpointError(f"load_weights: {source} must hold floating-point weights, got {name} {tensor.dtype}")
    try:
        module.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, strict=True)
    except RuntimeError as error:
        raise CheckpointError(f"load_weights: {source} does not fit {type(module).__name__}: {error}") from error


class _Uninitialised(TorchFunctionMode):
    """Parameters as they are allocated: to draw values on the meta device would start PyTorch's compiler (2.13)."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return function(*args, **kwargs)


def load_module(build: Callable[[], Module], tensors: dict[str, Tensor], source: object) -> Module:
    """The module that ``build`` makes, with these weights.

    It is of float32 and on the CPU, whatever torch's defaults. It is first built without memory and compared with the
    weights: a config of any size costs nothing unless it is theirs.

    Raises:
        CheckpointError: ``build`` fails, or makes a module of other weights.
    """
    with reading("load_module", source, "a config of its own weights"):
        with torch.device("meta"), _Uninitialised():
            wanted = {name: tuple(value.shape) for name, value in build().state_dict().items()}
        found = {name: tuple(value.shape) for name, value in tensors.items()}
        differing = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        if differing:
            first = differing[0]
            raise ValueError(
                f"{len(differing)} of other shapes, {first}: {found.get(first)} instead of {wanted.get(first)}"
            )
        with plain_defaults():
            module = build()
    load_weights(module, tensors, source)
    return module


def check_depth(depth: int, tensors: dict[str, Tensor]) -> None:
    """Raise ValueError for more blocks than there are weights: they would be built one by one before being compared."""
    if depth > len(tensors):
        raise ValueError(f"depth must be at most the number of weights {len(tensors)}, got {depth}")
