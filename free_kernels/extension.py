"""The compiled extension, which is optional and loaded at its first use. Environment variables are read here only.

It has two modules: ``_C`` has the schemas, the CPU ops and :data:`FUNCTIONS`, ``_C_cuda`` the CUDA ops. The second is
loaded only under a CUDA build of torch, whose libraries it needs; without it the first works as before.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch

from free_kernels.tracing import assume_constant_result

NAMESPACE = "free_kernels"
OPS = (
    "pack_drafts",
    "commit_drafts",
    "philox_uniform",
    "philox_normal",
    "philox_round",
    "advance_drafts_cpu",
    "replay_drafts_cpu",
    "keep_rows_cpu",
    "keep_clean_rows_cpu",
    "find_rows_cpu",
    "tally_round_cpu",
    "open_round_cpu",
    "correct_features_cpu",
    "join_rows_cpu",
    "row_errors_cpu",
    "renew_slots_cpu",
    "draft_rows_cpu",
    "open_keyed_round_cpu",
    "advance_from_features_cpu",
    "decide_round_cpu",
    "drafter_tokens_cpu",
    "table_rows_cpu",
    "adaptive_norm_cpu",
    "drafter_network_cpu",
    "final_layer_cpu",
    "couple_cpu",
    "couple_block_cpu",
)
CUDA_OPS = ("pack_drafts", "commit_drafts")
# Of the first module, which are no ops: they take no tensors.
FUNCTIONS = ("build_config", "plan_round")
BACKENDS = ("auto", "reference", "extension")

_hooks: list[Callable[[], None]] = []
_kernels: dict[tuple[str, str], str | None] = {}
_reason: str | None = None
_cuda_reason: str | None = None
_module: Any = None
_cuda_module: Any = None
_loaded = False


def environment_flag(name: str) -> bool:
    """Whether an environment variable is switched on; unset, empty, 0, false, no and off mean no."""
    return os.environ.get(name, "").strip().lower() not in ("", "0", "false", "no", "off")


def when_loaded(hook: Callable[[], None]) -> Callable[[], None]:
    """Run ``hook`` once, as soon as the extension's ops exist; never if there is no extension.

    Fakes are registered this way: an op must exist before its fake, and the extension is loaded at its first use.
    """
    if _loaded and _reason is None:
        hook()
    else:
        _hooks.append(hook)
    return hook


def _import(
    name: str, ops: tuple[str, ...], key: str, how_to_build: str, functions: tuple[str, ...] = ()
) -> tuple[Any, str | None]:
    """A compiled module, which must have ``ops`` for a dispatch key and ``functions``; or None, and the reason."""
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        return None, how_to_build
    except ImportError as error:
        return None, f"importing {name} failed: {error}"
    missing = [op for op in ops if not _has_kernel(op, key)]
    missing += [function for function in functions if not hasattr(module, function)]
    if missing:
        return None, f"{name} is out of date, it lacks {', '.join(missing)}: build it again"
    return module, None


def _load() -> None:
    global _loaded, _module, _reason, _cuda_module, _cuda_reason
    # Set first, so that a failure below is not tried again in this process.
    _loaded = True
    if environment_flag("FREE_KERNELS_NO_EXT"):
        _reason = "the environment variable FREE_KERNELS_NO_EXT is set"
        return
    unbuilt = "it was not built (pip install --no-build-isolation -e . builds it)"
    _module, _reason = _import("free_kernels._C", OPS, "CPU", unbuilt, FUNCTIONS)
    if _reason is not None:
        return
    if torch.version.cuda is None:
        _cuda_reason = f"torch {torch.__version__} is not a CUDA build"
    else:
        unbuilt = "free_kernels._C_cuda was not built (pip install -v --no-build-isolation . says what it lacks)"
        _cuda_module, _cuda_reason = _import("free_kernels._C_cuda", CUDA_OPS, "CUDA", unbuilt)
    while _hooks:
        _hooks.pop(0)()


def _has_kernel(op: str, key: str) -> bool:
    known = hasattr(getattr(torch.ops, NAMESPACE), op)
    return known and torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{op}", key)


@assume_constant_result
def why_no_extension() -> str | None:
    """Why the compiled ops cannot be used in this process, or None if they can."""
    if not _loaded:
        _load()
    return _reason


def has_extension() -> bool:
    """Whether the compiled ops can be used in this process; the first call loads them."""
    return why_no_extension() is None


def compiled_function(name: str) -> Any:
    """One of :data:`FUNCTIONS`, or None if the extension cannot be used in this process."""
    return getattr(_module, name) if has_extension() else None


def build_config() -> dict[str, Any]:
    """What the extension was built from: version, cuda, cuda_arch_list, compiler, torch.

    ``cuda`` says whether the CUDA ops are loaded, and ``cuda_arch_list`` what they were compiled for.

    Raises:
        RuntimeError: there is no extension; the message says why.
    """
    reason = why_no_extension()
    if reason is not None:
        raise RuntimeError(f"build_config: no compiled extension: {reason}")
    arch_list = _cuda_module.cuda_arch_list() if _cuda_module is not None else []
    return {**_module.build_config(), "cuda": _cuda_module is not None, "cuda_arch_list": arch_list}


@assume_constant_result
def why_no_kernel(op: str, device_type: str) -> str | None:
    """Why a compiled op cannot run on a type of device (``"cpu"``, ``"cuda"`` ...), or None if it can."""
    try:
        return _kernels[op, device_type]
    except KeyError:
        pass
    reason = why_no_extension()
    if reason is None:
        key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
        if key is None or not _has_kernel(op, key):
            reason = f"the compiled extension has no {op} for {device_type} tensors"
            if device_type == "cuda" and op in CUDA_OPS and _cuda_reason is not None:
                reason += f": {_cuda_reason}"
    _kernels[op, device_type] = reason
    return reason


def use_extension(op: str, device_type: str, backend: str, public: str | None = None) -> bool:
    """Choose between the compiled op and the reference.

    Args:
        op: name of the op.
        device_type: type of device of the tensors.
        backend: ``"auto"`` (compiled if possible), ``"reference"`` or ``"extension"``.
        public: name of the function that was called, which begins the error messages; that of the op if None.

    Raises:
        ValueError: an unknown backend.
        RuntimeError: ``"extension"`` was asked for and cannot run; the message says why.
    """
    if backend == "auto":
        return why_no_kernel(op, device_type) is None
    if backend == "reference":
        return False
    if backend != "extension":
        raise ValueError(f"{public or op}: backend must be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    reason = why_no_kernel(op, device_type)
    if reason is not None:
        raise RuntimeError(f"{public or op}: backend 'extension' cannot be used: {reason}")
    return True


def raise_from_op(ops: Sequence[str], error: RuntimeError) -> NoReturn:
    """Raise a compiled op's own message as ValueError, without its C++ source line; raise other errors unchanged.

    Args:
        ops: names that may begin its messages: its own and those of ops that it is made of.
        error: what it raised.
    """
    message = re.search(rf"\b(?:{'|'.join(map(re.escape, ops))}): .*", str(error))
    if message is None:
        raise error
    raise ValueError(message[0]) from None
