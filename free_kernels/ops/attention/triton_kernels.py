"""The kernel of ``feature_attention``: online softmax over a step's own keys and those in its ring.

One program for each block of queries of one head, as in FlashAttention-2 (arXiv 2307.08691). The valid slots of a ring
are consecutive, except that they may go on from its end to its start. So the keys are ``length * T`` consecutive rows
from the oldest valid slot on: the kernel needs no table of slots and reads no slot that is not valid.
"""

from __future__ import annotations

from collections.abc import Iterable

import triton
import triton.language as tl
from triton import knobs


def _interpreted_range(start: int, end: tl.tensor, step: int) -> Iterable[int]:
    """``range``. The interpreter keeps ``end`` in an array of one element, which Triton 3.6 cannot make an int."""
    return range(start, end.handle.data.item(), int(step))


key_range = _interpreted_range if knobs.runtime.interpret else tl.range


@triton.jit
def _load(p_rows, o_d, mask, HEAD_DIM: tl.constexpr, FULL: tl.constexpr, MASKED: tl.constexpr):
    """Rows ``[B, D]`` at pointers ``p_rows [B]``. FULL: all columns are below HEAD_DIM. MASKED: rows need ``mask``."""
    p = p_rows[:, None] + o_d[None, :]
    if FULL:
        if MASKED:
            return tl.load(p, mask=mask[:, None], other=0.0)
        return tl.load(p)
    columns = (o_d < HEAD_DIM)[None, :]
    if MASKED:
        return tl.load(p, mask=mask[:, None] & columns, other=0.0)
    return tl.load(p, mask=columns, other=0.0)


@triton.jit
def _attend(
    b_acc, b_rest, b_max, b_sum, b_q, b_q_rest, p_k, p_v, stride_k, stride_v, first, ring, num_keys, scale,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    EVEN: tl.constexpr, WRAP: tl.constexpr,
):  # fmt: skip
    """Add ``num_keys`` keys, from row ``first`` of a ring of ``ring`` rows on, to the online softmax.

    A head is split into BLOCK_D + BLOCK_E columns, both powers of two: 72 columns as 64 + 16 are 80 multiplications a
    row instead of the 128 of one padded block. EVEN: every block of keys is full and does not cross the ring's end.
    """
    o_d = tl.arange(0, BLOCK_D)
    for i_n in key_range(0, num_keys, BLOCK_N):
        if EVEN:
            i_first = first + i_n
            if WRAP:
                i_first = tl.where(i_first >= ring, i_first - ring, i_first)
            o_n = i_first + tl.arange(0, BLOCK_N)
            used = o_n >= 0
        else:
            o_n = i_n + tl.arange(0, BLOCK_N)
            used = o_n < num_keys
            o_n += first
            if WRAP:
                o_n = tl.where(o_n >= ring, o_n - ring, o_n)
        p_k_rows = p_k + o_n.to(tl.int64) * stride_k
        p_v_rows = p_v + o_n.to(tl.int64) * stride_v

        b_k = _load(p_k_rows, o_d, used, HEAD_DIM, True, not EVEN)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        if BLOCK_E > 0:
            o_e = BLOCK_D + tl.arange(0, BLOCK_E)
            b_k_rest = _load(p_k_rows, o_e, used, HEAD_DIM, BLOCK_D + BLOCK_E == HEAD_DIM, not EVEN)
            b_s = tl.dot(b_q_rest, tl.trans(b_k_rest), b_s, input_precision="ieee")
        if not EVEN:
            b_s = tl.where(used[None, :], b_s, float("-inf"))

        # Every block has at least one key in use, so the maximum is finite and no exponent is inf - inf.
        b_new = tl.maximum(b_max, tl.max(b_s, 1) * scale)
        b_p = tl.math.exp2(b_s * scale - b_new[:, None])
        b_decay = tl.math.exp2(b_max - b_new)
        b_sum = b_sum * b_decay + tl.sum(b_p, 1)
        b_max = b_new

        b_v = _load(p_v_rows, o_d, used, HEAD_DIM, True, not EVEN)
        b_p = b_p.to(b_v.dtype)
        b_acc = tl.dot(b_p, b_v, b_acc * b_decay[:, None], input_precision="ieee")
        if BLOCK_E > 0:
            b_v_rest = _load(p_v_rows, o_e, used, HEAD_DIM, BLOCK_D + BLOCK_E == HEAD_DIM, not EVEN)
            b_rest = tl.dot(b_p, b_v_rest, b_rest * b_decay[:, None], input_precision="ieee")
    return b_acc, b_rest, b_max, b_sum


# Triton would make a Python constant, which has no method ``to``, of a 1 (one head, one token). Alignment is in ALIGN.
_PLAIN = ["tokens", "heads", "capacity", "window", "stride_q_token", "stride_k_token", "stride_v_token"]


@triton.jit(do_not_specialize=_PLAIN)
def feature_attention_kernel(
    p_q, p_k, p_v, p_cache_k, p_cache_v, p_length, p_position, p_out,
    stride_q_row, stride_q_token, stride_q_head, stride_k_row, stride_k_token, stride_k_head,
    stride_v_row, stride_v_token, stride_v_head, tokens, heads, capacity, window, scale,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    EVEN: tl.constexpr, CACHED: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """``softmax(scale q k^T) v`` for one block of queries of one head, with powers of 2: ``scale`` has a factor log2 e.

    ALIGN: a number of elements that divides every stride. Without it the compiler would not know that strides such as
    72 allow 16-byte accesses.
    """
    blocks = tl.cdiv(tokens, BLOCK_M)
    i_m = tl.program_id(0) % blocks
    i_head = tl.program_id(0) // blocks
    i_row = (i_head // heads).to(tl.int64)
    i_head = (i_head % heads).to(tl.int64)
    stride_q_token = tl.multiple_of(stride_q_token.to(tl.int64), ALIGN)
    stride_k_token = tl.multiple_of(stride_k_token.to(tl.int64), ALIGN)
    stride_v_token = tl.multiple_of(stride_v_token.to(tl.int64), ALIGN)
    p_q += tl.multiple_of(i_row * stride_q_row + i_head * stride_q_head, ALIGN)
    p_k += tl.multiple_of(i_row * stride_k_row + i_head * stride_k_head, ALIGN)
    p_v += tl.multiple_of(i_row * stride_v_row + i_head * stride_v_head, ALIGN)

    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    p_q_rows = p_q + o_m.to(tl.int64) * stride_q_token
    b_q = _load(p_q_rows, o_d, o_m < tokens, HEAD_DIM, True, True)
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    b_q_rest = b_q
    b_rest = 0.0
    if BLOCK_E > 0:
        o_e = BLOCK_D + tl.arange(0, BLOCK_E)
        b_q_rest = _load(p_q_rows, o_e, o_m < tokens, HEAD_DIM, BLOCK_D + BLOCK_E == HEAD_DIM, True)
        b_rest = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    # fmt: off
    b_acc, b_rest, b_max, b_sum = _attend(
        b_acc, b_rest, b_max, b_sum, b_q, b_q_rest, p_k, p_v, stride_k_token, stride_v_token, 0, 0, tokens, scale,
        HEAD_DIM, BLOCK_N, BLOCK_D, BLOCK_E, EVEN, False,
    )
    if CACHED:
        # Counters of CUDA tensors are not checked; brought into range, they cannot cause reads outside the ring.
        length = tl.load(p_length + i_row).to(tl.int32)
        length = tl.minimum(tl.maximum(length, 0), tl.minimum(capacity, window - 1))
        oldest = (tl.load(p_position + i_row) % capacity).to(tl.int32) - length + 1
        oldest = (oldest + 2 * capacity) % capacity
        o_cache = tl.multiple_of((i_row * capacity * tokens * heads + i_head) * HEAD_DIM, ALIGN)
        stride_cache = (heads * HEAD_DIM).to(tl.int64)
        b_acc, b_rest, b_max, b_sum = _attend(
            b_acc, b_rest, b_max, b_sum, b_q, b_q_rest, p_cache_k + o_cache, p_cache_v + o_cache, stride_cache,
            stride_cache, oldest * tokens, capacity * tokens, length * tokens, scale,
            HEAD_DIM, BLOCK_N, BLOCK_D, BLOCK_E, EVEN, True,
        )
    # fmt: on
    p_out += tl.multiple_of((i_row * tokens * heads + i_head) * HEAD_DIM, ALIGN)
    p_rows = p_out + o_m.to(tl.int64)[:, None] * (heads * HEAD_DIM)
    b_inverse = 1.0 / b_sum[:, None]
    tl.store(p_rows + o_d[None, :], (b_acc * b_inverse).to(p_out.dtype.element_ty), mask=(o_m < tokens)[:, None])
    if BLOCK_E > 0:
        mask = (o_m < tokens)[:, None] & (o_e < HEAD_DIM)[None, :]
        tl.store(p_rows + o_e[None, :], (b_rest * b_inverse).to(p_out.dtype.element_ty), mask=mask)
