"""The kernel of ``table_rows``."""

from __future__ import annotations

import triton
import triton.language as tl


# Timesteps and labels may begin anywhere in a buffer.
@triton.jit(do_not_specialize_on_alignment=["p_t", "p_y"])
def table_kernel(p_rows, p_row_of_timestep, p_row_of_label, p_t, p_y, p_out, numel, BLOCK: tl.constexpr):
    """A block of one row."""
    blocks = tl.cdiv(numel, BLOCK)
    i_row = (tl.program_id(0) // blocks).to(tl.int64)
    o = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(p_row_of_timestep + tl.load(p_t + i_row)) + tl.load(p_row_of_label + tl.load(p_y + i_row))
    b_row = tl.load(p_rows + row * numel + o, mask=o < numel)
    tl.store(p_out + i_row * numel + o, b_row, mask=o < numel)
