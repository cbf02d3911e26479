"""How an op is declared: one named tuple of arguments, one fake, and one implementation for each kind of device.

The fields of the tuple, in their order, are the op's schema; every implementation takes the tuple whole.
"""

from __future__ import annotations

import importlib
import string
import typing
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from free_kernels.extension import NAMESPACE, raise_from_op, use_extension, when_loaded
from free_kernels.ops.fields import Open, Written
from free_kernels.ops.triton_runtime import use_triton

LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
_TYPES = {Tensor: "Tensor", int: "int", float: "float", bool: "bool"}
_TYPES |= {kind | None: f"{name}?" for kind, name in _TYPES.items()} | {list[Tensor]: "Tensor[]"}


def schema_of(arguments: type) -> str:
    """The arguments of a schema, in parentheses, from the fields of a named tuple and their types."""
    kinds, written = typing.get_type_hints(arguments, include_extras=True), iter(string.ascii_lowercase)

    def declare(field: str) -> str:
        kind = kinds[field]
        if kind in (Written, Written | None):
            return f"Tensor({next(written)}!){'' if kind == Written else '?'} {field}"
        return f"{'SymInt' if kind == Open else _TYPES[kind]} {field}"

    return f"({', '.join(map(declare, arguments._fields))})"


def with_gradient(name: str, arguments: Any, backend: str) -> str:
    """The backend of a call that autograd may record: only references can be differentiated.

    Raises:
        RuntimeError: a kernel was asked for by name, and a tensor needs a gradient.
    """
    if not torch.is_grad_enabled() or backend == "reference":
        return backend
    parts = (one for part in arguments for one in (part if isinstance(part, list) else [part]))
    if not any(isinstance(part, Tensor) and part.requires_grad for part in parts):
        return backend
    if backend in ("extension", "triton"):
        raise RuntimeError(
            f"{name}: backend {backend!r} cannot be used: it has no gradient, which the tensors need; call it within "
            "torch.no_grad() or take backend='reference'"
        )
    return "reference" if backend == "auto" else backend


class Op:
    """One op of ``torch.ops.free_kernels``.

    Args:
        name: the op's.
        arguments: named tuple of the op's arguments.
        reference: plain PyTorch; takes the tuple. It is the op's CPU implementation, except for a compiled op.
        fake: outputs without values; takes the tuple.
        triton: ``"folder.function"``: a function of ``free_kernels.ops.<folder>.triton_launch``, which takes the tuple
            and is the op's CUDA implementation; imported when it is first called. Empty for a compiled op, whose schema
            and implementations the extension registers: it exists once the extension is loaded.
        outputs: what the schema returns.
        check: raises an error for wrong arguments of a compiled op; takes the tuple.
        public: name of the function that users call, which begins a compiled op's messages; ``name`` if empty.
        parts: public names of ops that a compiled op is made of, whose messages it passes on.
    """

    def __init__(
        self,
        name: str,
        arguments: type,
        reference: Callable[[Any], Any],
        fake: Callable[[Any], Any],
        triton: str = "",
        outputs: str = "Tensor",
        check: Callable[[Any], None] | None = None,
        public: str = "",
        parts: tuple[str, ...] = (),
    ) -> None:
        self.public = public or name
        self._speaking = self.public, *parts
        self.name, self.arguments, self.reference, self.fake, self.check = name, arguments, reference, fake, check
        self.folder, _, self._function = triton.partition(".")
        self.overload: Any = None
        # Set once "auto" has found a compiled op for CPU tensors: asking again would take longer than a small op.
        self.known_for_cpu = False
        if not triton:
            when_loaded(self._take_schema)
            return
        LIBRARY.define(f"{name}{schema_of(arguments)} -> {outputs}", tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(name, lambda *fields: self.reference(arguments(*fields)), "CPU")
        LIBRARY.impl(name, lambda *fields: self.triton(arguments(*fields)), "CUDA")
        self._take_schema()

    def _take_schema(self) -> None:
        self.overload = getattr(getattr(torch.ops, NAMESPACE), self.name).default
        fake, arguments = self.fake, self.arguments
        torch.library.register_fake(self.overload, lambda *fields: fake(arguments(*fields)), lib=LIBRARY)

    def triton(self, arguments: Any) -> Any:
        """The launch itself."""
        module = importlib.import_module(f"free_kernels.ops.{self.folder}.triton_launch")
        return getattr(module, self._function)(arguments)

    def runs_triton(self, tensor: Tensor, backend: str) -> bool:
        """Whether a backend of the op means Triton; see :func:`~free_kernels.ops.triton_runtime.use_triton`."""
        return use_triton(self.name, self.folder, tensor.device, backend)

    def launch(self, arguments: Any, tensor: Tensor) -> Any:
        """Run in Triton: as an op on a GPU; for CPU tensors, whose op is the reference, in the interpreter."""
        return self.triton(arguments) if tensor.is_cpu else self.overload(*arguments)

    def is_ready(self, tensor: Tensor, backend: str) -> bool:
        """Whether ``"auto"`` has found the compiled op before and nothing else could be asked for.

        A graph in the making does not look: what was found would be its guard. Autograd may need the reference.
        """
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return False
        return self.known_for_cpu and backend == "auto" and tensor.is_cpu

    def run_compiled(self, arguments: Any) -> Any:
        """Run a compiled op, which is there.

        Raises:
            ValueError: it refuses its arguments.
        """
        try:
            return self.overload(*arguments)
        except RuntimeError as error:
            # The op has made the same checks; these word the message.
            if self.check is not None:
                self.check(arguments)
            raise_from_op(self._speaking, error)

    def __call__(self, arguments: Any, tensor: Tensor, backend: str) -> Any:
        """Run with a backend: ``"auto"``, ``"reference"``, and ``"triton"`` or ``"extension"``.

        Args:
            arguments: the named tuple.
            tensor: one of its tensors, whose device decides.
            backend: one of the op's.

        Raises:
            ValueError: ``backend`` is unknown, or the compiled op refuses its arguments.
            RuntimeError: the backend was asked for by name and cannot be used; the message says why.
        """
        if self.is_ready(tensor, backend):
            return self.run_compiled(arguments)
        backend = with_gradient(self.public, arguments, backend)
        if self.folder:
            in_triton = self.runs_triton(tensor, backend)
            return self.launch(arguments, tensor) if in_triton else self.reference(arguments)
        if use_extension(self.name, tensor.device.type, backend, self.public):
            if not torch.compiler.is_compiling() and backend == "auto" and tensor.is_cpu:
                self.known_for_cpu = True
            return self.run_compiled(arguments)
        if self.check is not None:
            self.check(arguments)
        return self.reference(arguments)


class KernelOp:
    """An op with a Triton kernel and a compiled CPU one, which is an op of its own whose name ends in ``_cpu``.

    Args:
        name: the op's.
        arguments: named tuple of the op's arguments.
        reference: plain PyTorch; takes the tuple.
        fake: outputs without values; takes the tuple.
        check: raises an error for wrong arguments; takes the tuple.
        folder: of ``free_kernels.ops``, whose ``triton_launch`` has a function with the op's name.
        outputs: what the schema returns.
    """

    def __init__(
        self,
        name: str,
        arguments: type,
        reference: Callable[[Any], Any],
        fake: Callable[[Any], Any],
        check: Callable[[Any], None],
        *,
        folder: str,
        outputs: str = "Tensor",
    ) -> None:
        self.triton = Op(name, arguments, reference, fake, f"{folder}.{name}", outputs)
        self.compiled = Op(f"{name}_cpu", arguments, reference, fake, check=check, public=name)
        self.check, self.public = check, name

    def __call__(self, arguments: Any, tensor: Tensor, backend: str) -> Any:
        """Run with a backend: ``"auto"``, ``"reference"``, ``"extension"`` or ``"triton"``.

        Args:
            arguments: the named tuple.
            tensor: one of its tensors, whose device decides.
            backend: of the op.

        Raises:
            ValueError, TypeError: a wrong argument.
            RuntimeError: the backend cannot be used; the message says why.
        """
        if self.compiled.is_ready(tensor, backend):
            return self.compiled.run_compiled(arguments)
        backend = with_gradient(self.public, arguments, backend)
        if backend in ("auto", "triton") and self.triton.runs_triton(tensor, backend):
            self.check(arguments)
            return self.triton.launch(arguments, tensor)
        return self.compiled(arguments, tensor, backend)
