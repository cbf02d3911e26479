"""What DiT families share: blocks with adaLN-Zero, whose modulations depend on (timestep, label) only."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from free_kernels.conditioning import ConditioningTable, ShowsTimesteps, TimestepTable, table_fits
from free_kernels.protocols import TargetDefaults
from free_kernels.targets.check import Rows, TargetCheck, checked, compare_paths
from free_kernels.targets.fused_head import FusedHead, HeadParts, fused_head, is_differentiating
from free_kernels.targets.inspection import is_replaced, refuse_outer_patches, refuse_unsafe
from free_kernels.validation import fail
from free_kernels.wrappers import Seen

# Shift, scale and gate of attention and of the MLP; shift and scale of the head.
BLOCK_CHUNKS, HEAD_CHUNKS = 6, 2


def _as_it_is(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


class BlockParts(NamedTuple):
    """The four maps ``[R, T, D] -> [R, T, D]`` of a block."""

    norm1: Callable[[Tensor], Tensor]
    attention: Callable[[Tensor], Tensor]
    norm2: Callable[[Tensor], Tensor]
    mlp: Callable[[Tensor], Tensor]


def run_blocks(blocks: Sequence[BlockParts], h: Tensor, modulations: Tensor) -> Tensor:
    """Tokens ``[R, T, D]`` through blocks whose modulations ``[R, 6 depth, 1, D]`` are at hand, scales with 1 added."""
    rows = modulations.unbind(1)
    for index, block in enumerate(blocks):
        shift1, scale1, gate1, shift2, scale2, gate2 = rows[BLOCK_CHUNKS * index : BLOCK_CHUNKS * (index + 1)]
        h = torch.addcmul(h, gate1, block.attention(torch.addcmul(shift1, block.norm1(h), scale1)))
        h = torch.addcmul(h, gate2, block.mlp(torch.addcmul(shift2, block.norm2(h), scale2)))
    return h


def stack_block_modulations(rows: Sequence[Tensor]) -> Tensor:
    """Outputs ``[M, 6 D]`` of each block's modulation layer as ``[M, 6 depth, 1, D]``, with 1 added to the scales."""
    stacked = torch.stack([row.unflatten(1, (BLOCK_CHUNKS, 1, -1)) for row in rows], 1)
    stacked[:, :, 1] += 1
    stacked[:, :, 4] += 1
    return stacked.flatten(1, 2)


class AdaLNTarget(ShowsTimesteps, TargetDefaults):
    """Base of the adapters for DiT families; a :class:`free_kernels.protocols.Target` once a family fills it in.

    A family gives ``dtype``, ``device`` and the methods below that raise, and calls :meth:`recheck` at the end of its
    constructor. Blocks are run by their parts, so that modulations can be made once, where that gives what the module's
    own call gives; else they are called as they are, and ``self.blocks`` is None.

    Args:
        name: of the class, for error messages.
        seen: the network behind its wrappers, in evaluation mode.
        blocks: its blocks' parts; None where a block has others than the family's.
        compile: run blocks and head through ``torch.compile``.

    Raises:
        ValueError: the module cannot be sampled (:func:`free_kernels.check_target` has the reasons), or cannot be
            compiled block by block.
    """

    # Must equal the schedule's `family`.
    family = "diffusion"
    latent_shape: tuple[int, ...]
    feature_shape: tuple[int, int]
    num_classes: int
    learns_variance: bool

    def __init__(self, name: str, seen: Seen, blocks: list[BlockParts] | None, compile: bool) -> None:
        if not isinstance(compile, bool):
            fail(name, "compile", "a bool", compile, TypeError)
        if compile and blocks is None:
            fail(name, "compile", "False for blocks with parts of another kind", compile)
        self.module: Any = seen.module
        self.blocks = blocks
        self.compile = compile or seen.compiler is not None
        self._name, self._whole, self._parts = name, seen.whole, blocks
        self._must_compile_parts = compile
        self._block_table: ConditioningTable | None = None
        self._final_table: ConditioningTable | None = None
        self._fused_head: FusedHead | None = None
        self._time_tables: list[TimestepTable] | None = None
        # Of a hoisted copy: looking it up in the module takes as long as a small op.
        self._tabled_dtype: torch.dtype | None = None
        # A copy made by `hoisted` shares these, and so what has been compiled.
        compiled = (seen.compiler or torch.compile) if self.compile else _as_it_is
        self._run_blocks = compiled(run_blocks)
        self._run_head = compiled(self._modulated_head)
        self._run_plain_blocks = compiled(self._plain_blocks) if seen.compiler else self._plain_blocks

    def recheck(self, where: str) -> TargetCheck:
        """Compare with the module's own call unless that has been done of this very network, and take what agrees.

        Raises:
            ValueError: as :func:`free_kernels.check_target`.
        """
        walked = refuse_unsafe(where, self._whole)
        refuse_outer_patches(where, self._whole, self.module)
        key = type(self), self._parts is None, *self.convention()
        found = checked(key, self, self._whole, walked, lambda: self._showing_whole().compare(where))
        if found.path == "blocks" and self._must_compile_parts:
            fail(where, "compile", "False for blocks whose own forward does more than their parts", True)
        self.blocks = self._parts if found.path == "hoisted" else None
        return found

    def compare(self, where: str) -> TargetCheck:
        """The comparison itself, made anew."""
        return compare_paths(where, "module", self, self._whole)

    def own(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Output of the module's own call, as ``head`` gives it."""
        raise NotImplementedError

    def convention(self) -> tuple[int, ...]:
        """What the module is shown besides (x, t, y), as far as a caller chooses it."""
        return ()

    def check_convention(self, where: str, rows: Rows, own: Tensor) -> None:
        """Raise ValueError where the output of rows near pure noise says that the family is another."""

    def paths(self) -> list[str]:
        """Ways to run the blocks, the preferred one first: by their parts, if all that is called so is untouched."""
        if self._parts is None or any(is_replaced(module) for module in self._left_out()):
            return ["blocks"]
        return ["hoisted", "blocks"]

    def on_path(self, path: str, t: Tensor, y: Tensor) -> AdaLNTarget:
        """A copy hoisted for timesteps and labels that takes one of the ways, nothing compiled."""
        clone = copy.copy(self)
        clone.blocks = self._parts if path == "hoisted" else None
        clone._run_blocks, clone._run_head = run_blocks, clone._modulated_head
        clone._run_plain_blocks = clone._plain_blocks
        return clone.tabled(t, y)

    def heavy_parts(self) -> list[nn.Module]:
        """Attention and MLP of every block, in order; none unless blocks are run by them and nothing is compiled."""
        compiled = self.compile or any(part._compiled_call_impl is not None for part in self._whole.modules())
        if self._whole is not self.module or compiled or self.paths()[0] != "hoisted":
            return []
        parts = [part for block in self._parts for part in (block.attention, block.mlp)]
        return parts if all(isinstance(part, nn.Module) for part in parts) else []

    def with_heavy_parts(self, parts: Sequence[Callable[[Tensor], Tensor]]) -> AdaLNTarget:
        """A copy whose blocks have these in their place."""
        clone, pairs = copy.copy(self), zip(parts[::2], parts[1::2], strict=True)
        clone.blocks = [
            block._replace(attention=attention, mlp=mlp)
            for block, (attention, mlp) in zip(self._parts, pairs, strict=True)
        ]
        return clone

    def _left_out(self) -> list[nn.Module]:
        """Modules that running the blocks by their parts does not call."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """The module's dtype."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """The module's device."""
        raise NotImplementedError

    @property
    def _by_parts(self) -> bool:
        """Whether blocks without tables are run by their parts: where timesteps are hoisted for them, or compiled."""
        return self.blocks is not None and (self._time_tables is not None or self.compile)

    def features(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Top-block features ``[R, T, D]``."""
        h = self._embed(self._cast(x))
        if self._block_table is not None:
            return self._run_blocks(self.blocks, h, self._block_table(t, y))
        if self._by_parts:
            return self._run_blocks(self.blocks, h, self._block_modulations(t, y))
        return self._run_plain_blocks(h, *self._block_inputs(t, y))

    def head(self, h: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Network output ``[R, C or 2C, H, W]``."""
        h = self._cast(h)
        if self._final_table is not None:
            fused = self._usable_head()
            return self._run_head(h, self._final_table(t, y)) if fused is None else fused(h, t, y)
        return self._run_head(h, self._final_modulations(t, y)) if self._by_parts else self._plain_head(h, t, y)

    def _usable_head(self) -> FusedHead | None:
        """The head in one call, where it may be called now: it has no derivative, and computes in float32."""
        fused = self._fused_head
        return None if fused is None or is_differentiating() or torch.is_autocast_enabled("cpu") else fused

    def drafting_head(self) -> FusedHead | None:
        """The head in one call, where :meth:`head` is nothing else; for as long as the caller's modes stay."""
        own = type(self).head is AdaLNTarget.head and "head" not in self.__dict__
        return self._usable_head() if own else None

    def _cast(self, given: Tensor) -> Tensor:
        """In the module's dtype."""
        dtype = self._tabled_dtype or self.dtype
        return given if given.dtype == dtype else given.to(dtype)

    def _showing_whole(self) -> AdaLNTarget:
        clone = copy.copy(self)
        clone._shown_table = None
        return clone

    def hoisted(self, timesteps: Tensor, labels: Tensor) -> AdaLNTarget:
        """A copy on which what depends on (t, y) only is computed once.

        All adaLN modulations, where they fit into the memory allowed for them; else the embeddings of the timesteps.

        Raises:
            ValueError: the module has changed since it was compared, and can no longer be sampled.
        """
        self.recheck(self._name)
        return self.tabled(timesteps, labels)

    def tabled(self, timesteps: Tensor, labels: Tensor) -> AdaLNTarget:
        """As :meth:`hoisted`, of a target that has been compared with its module just now."""
        clone = copy.copy(self)
        clone._tabled_dtype = self.dtype
        if self.blocks is not None:
            chunks = BLOCK_CHUNKS * len(self.blocks) + HEAD_CHUNKS
            if table_fits(timesteps, labels, chunks * self.feature_shape[1] * self.dtype.itemsize):
                clone._block_table = ConditioningTable(self._block_modulations, timesteps, labels)
                clone._final_table = ConditioningTable(self._final_modulations, timesteps, labels)
                parts = None if self.compile else self._head_parts()
                clone._fused_head = None if parts is None else fused_head(parts, clone._final_table)
                return clone
        embedders = range(len(self._time_embedders()))
        clone._time_tables = [
            TimestepTable(lambda t, index=index: self._time_embedding(index, t), timesteps) for index in embedders
        ]
        return clone

    def _time_embedding(self, index: int, t: Tensor) -> Tensor:
        """``[R, D]`` of the family's ``index``-th timestep embedder."""
        if self._time_tables is None:
            return self._time_embedders()[index](self._timestep(t))
        return self._time_tables[index](t)

    def _time_embedders(self) -> list[Callable[[Tensor], Tensor]]:
        """The maps from timesteps ``[R]`` to ``[R, D]``."""
        raise NotImplementedError

    def _embed(self, x: Tensor) -> Tensor:
        """States ``[R, C, H, W]`` to tokens ``[R, T, D]``, positions added."""
        raise NotImplementedError

    def _block_inputs(self, t: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        """What blocks are called with besides the tokens."""
        raise NotImplementedError

    def _plain_blocks(self, h: Tensor, *inputs: Tensor) -> Tensor:
        """Tokens through the blocks as they are."""
        raise NotImplementedError

    def _plain_head(self, h: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The head as it is."""
        raise NotImplementedError

    def _modulated_head(self, h: Tensor, modulations: Tensor) -> Tensor:
        """The head with its modulations ``[R, 2, 1, D]``."""
        raise NotImplementedError

    def _head_parts(self) -> HeadParts | None:
        """The head's parts, where :meth:`_modulated_head` is made of such."""
        return None

    def _block_modulations(self, t: Tensor, y: Tensor) -> Tensor:
        """``[M, 6 depth, 1, D]``: shift, 1 + scale, gate of attention and MLP, block by block."""
        raise NotImplementedError

    def _final_modulations(self, t: Tensor, y: Tensor) -> Tensor:
        """``[M, 2, 1, D]``: shift and 1 + scale of the head."""
        raise NotImplementedError
