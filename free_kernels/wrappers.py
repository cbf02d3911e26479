"""What stands around a network: wrappers that are seen through, and wrappers that are refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from free_kernels.validation import fail

# Wrappers that hold the network under `module` and add nothing to its call in one process.
_PLAIN = ("DistributedDataParallel", "DataParallel", "AveragedModel")
_SHARDED = ("FullyShardedDataParallel", "FSDPModule")


class Seen(NamedTuple):
    """A network behind its wrappers.

    Attributes:
        module: whose parts may be called.
        whole: whose call is what the caller asked to sample; ``module``, or a wrapper that takes part in the call.
        compiler: compiles a function as the caller had the network compiled; None where it is not.
    """

    module: nn.Module
    whole: nn.Module
    compiler: Callable[[Callable[..., Any]], Callable[..., Any]] | None


def class_names(kind: type) -> set[str]:
    """Names of a class and its bases; wrappers are told by them, so that their libraries need not be imported."""
    return {base.__name__ for base in kind.__mro__}


def is_sharded(kind: type[nn.Module]) -> bool:
    """Whether modules of a class have weights that are spread over processes, by FSDP of either version."""
    return bool(class_names(kind).intersection(_SHARDED))


def see_through(where: str, module: Any) -> Seen:
    """The network behind torch.compile, DistributedDataParallel, DataParallel, AveragedModel and PeftModel.

    Raises:
        ValueError: its weights are spread over processes.
        TypeError: a wrapper of another kind.
    """
    whole, compiler = module, None
    while isinstance(module, nn.Module):
        if is_sharded(type(module)):
            fail(
                where,
                "module",
                "whole in each process (gather the weights of a sharded one into an unwrapped copy)",
                type(module).__name__,
            )
        if "_orig_mod" in module._modules:
            context = getattr(module, "dynamo_ctx", None)
            compiler, inner = context if callable(context) else torch.compile, module._orig_mod
        elif class_names(type(module)).intersection(_PLAIN):
            inner = module.module
        elif type(module).__module__.partition(".")[0] == "peft" and hasattr(module, "get_base_model"):
            # Adapters sit in the layers, but some kinds add to the inputs as well: the truth is the wrapper's call.
            inner = module.get_base_model()
            module = inner
            continue
        else:
            break
        whole = inner if whole is module else whole
        module = inner
    if isinstance(module, nn.Module) and module._compiled_call_impl is not None:
        compiler = compiler or torch.compile
    return Seen(module, whole, compiler)


def kind_of(module: object) -> str:
    """A module's class, for an error message; of a wrapper of another kind also where the network is."""
    children = dict(module.named_children()) if isinstance(module, nn.Module) else {}
    inner = next((name for name in ("module", "model", "ema_model", "base_model") if name in children), None)
    return type(module).__name__ + (f" (of a wrapper, pass its .{inner})" if inner else "")


def first_output(output: object) -> Tensor:
    """The prediction among what a network returns: itself, the first of several, or the ``sample`` of diffusers."""
    if isinstance(output, tuple | list):
        output = output[0]
    return getattr(output, "sample", output) if not isinstance(output, Tensor) else output
