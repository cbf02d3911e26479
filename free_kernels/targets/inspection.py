"""What is attached to a network: what makes its law another one is refused by name, all else is told apart."""

from __future__ import annotations

import inspect
import threading
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from free_kernels.validation import fail
from free_kernels.wrappers import is_sharded

# Attributes by which caches of whole steps are told; each is truthy where its cache is on.
_STEP_CACHES = {
    "_is_cached": "a step cache (cache-dit, para_attn, xfuser)",
    "enable_teacache": "TeaCache",
    "accumulated_rel_l1_distance": "TeaCache",
    "mag_ratios": "MagCache",
    "_cache_config": "a cache of diffusers",
}
_CACHE_LIBRARIES = ("cache_dit", "para_attn", "DeepCache", "xfuser")
_PLAIN_VALUES = frozenset((bool, int, float, str, torch.dtype, torch.device, type(None)))
_CONTAINERS = (list, tuple, set, frozenset, dict)
# Containers within containers, so deep, count in what a module is set to.
_SETTING_DEPTH = 3
# Attributes of every module, which a fingerprint has in other forms.
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
# Attributes that a module without hooks and caches has not.
_MARKS = frozenset(("_hf_hook", "_diffusers_hook", *_STEP_CACHES))
_MUTABLE = (dict, list, set, bytearray, Tensor)


class Reached(BaseException):
    """Ends a forward at the feature layer; no Exception, so that a network's own ``except`` lets it pass."""

    def __init__(self, feature: object) -> None:
        self.feature = feature


class StopHere:
    """A forward hook that leaves the call which it was made for, and no other thread's."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()

    def __call__(self, module: nn.Module, given: object, output: object) -> None:
        """Raise :class:`Reached` in the thread that made the hook."""
        if threading.get_ident() == self._thread:
            raise Reached(output)


def _label(name: str, module: nn.Module) -> str:
    return f"{name or 'the module'} ({type(module).__name__})"


def parts_of(module: nn.Module) -> list[nn.Module]:
    """The modules of ``module.modules()``, in its order; every run asks, and the generator takes four times as long."""
    found, ahead = {}, [module]
    while ahead:
        part = ahead.pop()
        if id(part) not in found:
            found[id(part)] = part
            if part._modules:
                ahead += [child for child in reversed(part._modules.values()) if child is not None]
    return list(found.values())


def _named(module: nn.Module, part: nn.Module) -> str:
    """How a message calls one of a module's parts."""
    return next(_label(name, each) for name, each in module.named_modules() if each is part)


def refuse_unsafe(where: str, module: nn.Module) -> list[nn.Module]:
    """Raise ValueError where calls of a module, or of its parts, are not one fixed function of their inputs.

    That is: a sub-module in training mode, weights that hooks move or that are spread over processes, caches of steps.
    The message names the sub-module. Returns the parts, for whoever asks more of them.
    """
    parts = parts_of(module)
    doubtful = {kind for kind in set(map(type, parts)) if _is_doubtful(kind)}
    for part in parts:
        # Every run asks, and most parts of most networks have nothing of all that.
        if part.training or type(part) in doubtful or not _MARKS.isdisjoint(part.__dict__):
            _refuse_unsafe_part(where, module, part)
    return parts


def _is_doubtful(kind: type[nn.Module]) -> bool:
    """Whether a class says by itself that calls of its modules might be unsafe."""
    return is_sharded(kind) or _cache_library(kind) is not None or any(hasattr(kind, mark) for mark in _MARKS)


def _cache_library(kind: type[nn.Module]) -> str | None:
    library = kind.__module__.partition(".")[0]
    return library if library in _CACHE_LIBRARIES else None


def _refuse_unsafe_part(where: str, module: nn.Module, part: nn.Module) -> None:
    held = vars(part)
    # Lists of modules compute nothing: a new one around blocks in evaluation mode is in training mode.
    if part.training and type(part).forward is not nn.Module.forward:
        fail(where, "module", "in evaluation mode (call .eval())", f"{_named(module, part)} in training mode")
    if is_sharded(type(part)):
        fail(where, "module", "whole in each process", f"the sharded {_named(module, part)}")
    if "_hf_hook" in held:
        # They move weights when a sub-module's own forward begins, which is not what is called here.
        found = f"accelerate's {type(held['_hf_hook']).__name__} on {_named(module, part)}"
        fail(where, "module", "without offload hooks (remove_hook_from_module takes them off)", found)
    hooks = getattr(held.get("_diffusers_hook", _NO_HOOKS), "hooks", {"unknown": None})
    if hooks:
        found = f"{', '.join(map(str, hooks))} on {_named(module, part)}"
        fail(where, "module", "without hooks of diffusers, which carry state from call to call", found)
    library = _cache_library(type(part))
    cache = _step_cache(part) if library is None else f"a cache of {library}"
    if cache:
        found = f"{cache} on {_named(module, part)}"
        fail(where, "module", "without a cache of earlier steps, which sampling would bypass", found)


_NO_HOOKS = types.SimpleNamespace(hooks={})


def _step_cache(part: nn.Module) -> str | None:
    held = vars(part)
    for attribute, cache in _STEP_CACHES.items():
        value = held.get(attribute, getattr(type(part), attribute, None))
        if value is not None and not (isinstance(value, bool | int | float) and not value):
            return cache
    return None


def patches(name: str, module: nn.Module) -> list[str]:
    """What has been put onto one module from outside: hooks, another forward, a compiled call."""
    found = []
    if _hooks(module):
        found.append(f"a hook on {_label(name, module)}")
    if "forward" in vars(module):
        found.append(f"another forward of {_label(name, module)}")
    owner = next(base for base in type(module).__mro__ if "forward" in vars(base))
    forward = vars(owner)["forward"]
    if getattr(forward, "__module__", owner.__module__) not in (owner.__module__, None):
        found.append(f"another forward of the class {type(module).__name__}")
    return found


def refuse_outer_patches(where: str, *modules: nn.Module) -> None:
    """Refuse modules with something attached around the whole of a call that is made in parts.

    Raises:
        ValueError: the message says what.
    """
    for module in modules:
        attached = patches("", module)
        if attached:
            wanted = "without hooks or another forward around its whole call, which is made in parts (see HookTarget)"
            fail(where, "module", wanted, attached[0])


def is_replaced(module: nn.Module) -> bool:
    """Whether a module's call does more than its class's forward: hooks, another forward, a compiled call of its own.

    Such a module has to be called; what it is made of says no longer what it computes.
    """
    return bool(patches("", module)) or module._compiled_call_impl is not None


def global_hooks() -> list[Callable[..., Any]]:
    """What is called around every module's forward."""
    hooks = nn.modules.module
    return [*hooks._global_forward_hooks.values(), *hooks._global_forward_pre_hooks.values()]


def suspicions(module: nn.Module) -> list[str]:
    """Why a module's calls might depend on earlier ones; none for a network as its classes define it."""
    found, seen = [], set()
    for name, part in module.named_modules():
        found += patches(name, part)
        if type(part) not in seen:
            seen.add(type(part))
            if _reaches_state(type(part).forward):
                found.append(f"state outside of {type(part).__name__}")
    return found


def _reaches_state(forward: Callable[..., Any]) -> bool:
    """Whether a forward can write to something that outlives its call and is no attribute of its module."""
    function = inspect.unwrap(forward)
    if not isinstance(function, types.FunctionType):
        return False
    cells = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
    used = [function.__globals__.get(name) for name in function.__code__.co_names]
    return any(isinstance(value, _MUTABLE) for value in cells + used)


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def fingerprint(walked: Sequence[nn.Module], weights: Sequence[Tensor]) -> tuple[Any, ...]:
    """Equal as long as a module of these parts is the same network: their hooks, forwards and settings, their weights.

    ``weights`` are those of :func:`tensors_of`.

    Settings are attributes of plain values, in containers too.

    Weights are told by identity, storage and version counter, so that reading them is not needed. Writing through
    ``.data`` leaves the counter as it is: structure that was compared stays compared.
    """
    parts = [_mark(part) for part in walked]
    # What holds for all modules: forwards of classes, hooks on every call.
    forwards = {kind: _forward(kind) for kind in set(map(type, walked))}
    # Those of torch's own tools, such as its counter of operations, only watch.
    around = tuple(id(hook) for hook in global_hooks() if not getattr(hook, "__module__", "").startswith("torch."))
    return parts, forwards, around, tuple([_stamp(weight) for weight in weights])


def _mark(part: nn.Module) -> tuple[Any, ...]:
    """What a fingerprint has of one part; every run asks for that of all."""
    held = part.__dict__
    settings = {
        key: value if type(value := held[key]) in _PLAIN_VALUES else _setting(value)
        for key in held.keys() - _OF_EVERY_MODULE
    }
    around = _hooks(part) if part._forward_hooks or part._forward_pre_hooks else ()
    return id(part), type(part), part.training, id(held.get("forward")), around, settings


def _hooks(module: nn.Module) -> tuple[int, ...]:
    """Who is called around a module's forward, but for this library's own hooks, which are there for one call."""
    around = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return tuple([id(hook) for hook in around if not isinstance(hook, StopHere)]) if around else ()


def _forward(kind: type[nn.Module]) -> tuple[int, object]:
    """A class's forward; its code, too, as another function may get the identity of one that is gone."""
    forward = kind.forward
    return id(forward), getattr(forward, "__code__", None)


def _setting(value: Any, depth: int = _SETTING_DEPTH) -> Any:
    """A plain value, or a container's; of anything else the type."""
    kind = type(value)
    if kind in _PLAIN_VALUES:
        return value
    if not depth or not isinstance(value, _CONTAINERS):
        return kind
    if isinstance(value, dict):
        return kind, tuple([(_setting(key, 0), _setting(one, depth - 1)) for key, one in value.items()])
    parts = tuple([_setting(one, depth - 1) for one in value])
    return (kind, frozenset(parts)) if isinstance(value, set | frozenset) else (kind, parts)


def tensors_of(parts: Sequence[nn.Module]) -> list[Tensor]:
    """Parameters of modules, then their buffers; one that modules share comes once."""
    parameters, buffers = {}, {}
    for part in parts:
        if part._parameters:
            parameters |= {id(tensor): tensor for tensor in part._parameters.values() if tensor is not None}
        if part._buffers:
            buffers |= {id(tensor): tensor for tensor in part._buffers.values() if tensor is not None}
    return [*parameters.values(), *buffers.values()]


def _stamp(weight: Tensor) -> tuple[Any, ...]:
    try:
        return id(weight), weight._version, weight.data_ptr(), weight.dtype, weight.device
    except RuntimeError:  # inference tensors count no versions, and some subclasses have no storage
        return id(weight), weight.dtype, weight.device


def attributes(module: nn.Module) -> dict[str, tuple[Any, ...]]:
    """What a module and its parts remember, by name; a change over a call means that the call leaves a trace."""
    remembered = {}
    for name, part in module.named_modules():
        for key, value in vars(part).items():
            if not key.startswith("_") or type(value) in _PLAIN_VALUES:
                remembered[f"{name}.{key}".lstrip(".")] = _trace(value)
        for key, value in part.named_buffers(recurse=False):
            remembered[f"{name}.{key}".lstrip(".")] = _trace(value)
    return remembered


def _trace(value: Any) -> tuple[Any, ...]:
    if type(value) in _PLAIN_VALUES:
        return (value,)
    if isinstance(value, Tensor):
        return _stamp(value)
    return (id(value), len(value)) if isinstance(value, _MUTABLE) else (id(value),)


def is_abstract(weights: Sequence[Tensor]) -> bool:
    """Whether weights have no numbers to compare: they have no storage, or are fake while a graph is traced."""
    from torch._subclasses.fake_tensor import FakeTensor

    if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
        return True
    kinds = set(map(type, weights))
    return any(issubclass(kind, FakeTensor) for kind in kinds) or any([weight.is_meta for weight in weights])
