"""What a windowed drafter remembers: keys and values of its earlier calls, in a ring for each block."""

from __future__ import annotations

import torch
from torch import Tensor

from free_kernels.ops.attention import append_features, feature_attention, rewind_features
from free_kernels.validation import check_int, fail


class FeatureMemory:
    """Rings of ``C = window - 1 + drafts`` slots, one for keys and one for values of every block.

    A call attends to up to ``window - 1`` earlier ones; the other ``drafts`` slots are for calls that may be refused.
    Holds ``2 depth R C T H Dh`` elements, ``R = branches * slots``: with the shapes of DiT-XL/2 (T = 256, width 1152),
    depth 1, window 4 and 5 drafts that is 9 MiB for each row in bfloat16.

    Satisfies :class:`free_kernels.protocols.DraftMemory`. Nothing here waits for the device, shapes are fixed and every
    tensor is written in place, so calls may be captured in a CUDA graph. Under autograd gradients flow into earlier
    calls, and the graphs of all calls are kept as long as the memory is.

    Args:
        slots: S, trajectories.
        branches: guidance branches; rows are ordered by branch, then slot.
        drafts: the largest number of calls between two rewinds.
        window: W >= 2, steps that a query sees, its own included.
        depth: blocks of the drafter.
        step_shape: (T, H, Dh) of a call's keys.
        like: gives dtype and device.

    Raises:
        ValueError, TypeError: a count below 1 or not an int.
    """

    def __init__(
        self,
        slots: int,
        branches: int,
        drafts: int,
        window: int,
        depth: int,
        step_shape: tuple[int, int, int],
        like: Tensor,
    ) -> None:
        where = "FeatureDrafter.new_memory"
        self.slots = check_int(where, "slots", slots, 1)
        self.branches = check_int(where, "branches", branches, 1)
        self.window, self.depth, self.step_shape = window, depth, step_shape
        rows, self.capacity = slots * branches, window - 1 + check_int(where, "drafts", drafts, 1)
        self._keys, self._values = (
            [like.new_zeros(rows, self.capacity, *step_shape) for _ in range(depth)] for _ in range(2)
        )
        # A pair of counters for each block: an append advances the counters of its block, a rewind those of all.
        self._length = torch.zeros(depth, rows, dtype=torch.int64, device=like.device)
        self._position = torch.zeros_like(self._length)

    def attend(self, block: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention ``[R, T, H, Dh]`` of ``q`` to ``k, v`` and to what is remembered; then remembers ``k, v``."""
        ring = self._keys[block], self._values[block]
        counters = self._length[block], self._position[block]
        mixed = feature_attention(q, k, v, *ring, *counters, window=self.window)
        append_features(*ring, k, v, *counters)
        return mixed

    def rewind(self, steps: Tensor) -> None:
        """Forget the latest ``steps[s]`` calls of slot s, in all branches and blocks.

        Args:
            steps: int64 ``[S]``, at least 0; at or above the number of remembered calls empties the slot.

        Raises:
            ValueError, TypeError: a wrong argument; values are checked on the CPU only.
        """
        expectation = f"int64 [S] = [{self.slots}]"
        if not isinstance(steps, Tensor) or steps.dtype != torch.int64:
            fail("FeatureMemory.rewind", "steps", expectation, steps, TypeError)
        if steps.shape != (self.slots,):
            fail("FeatureMemory.rewind", "steps", expectation, steps)
        rows = steps.repeat(self.depth * self.branches)
        rewind_features(self._length.view(-1), self._position.view(-1), rows, self.capacity)


def check_memory(memory: object, rows: int, window: int, depth: int, step_shape: tuple[int, int, int]) -> None:
    """Raise TypeError unless this is a memory, ValueError unless of a drafter of that shape for ``rows`` rows."""
    expectation = f"None or this drafter's new_memory for {rows} rows"
    if not isinstance(memory, FeatureMemory):
        fail("FeatureDrafter", "memory", expectation, type(memory).__name__, TypeError)
    theirs = memory.slots * memory.branches, memory.window, memory.depth, memory.step_shape
    if theirs != (rows, window, depth, step_shape):
        found = "one for {} rows, window {}, depth {}, (T, H, Dh) = {}".format(*theirs)
        fail("FeatureDrafter", "memory", expectation, found)
