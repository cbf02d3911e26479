"""Philox4x32-10 and Box-Muller inside a kernel: the numbers of ``free_kernels.ops.random``.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from free_kernels.constants import Purpose

PURPOSE_STEP = tl.constexpr(int(Purpose.STEP))
PURPOSE_SLACK = tl.constexpr(int(Purpose.SLACK))
PURPOSE_ACCEPT = tl.constexpr(int(Purpose.ACCEPT))

_TWO_PI = tl.constexpr(2.0 * math.pi)
_TWO_OVER_PI = tl.constexpr(2.0 / math.pi)
# pi / 2 in three parts whose products with 0 ... 4 are exact.
_HALF_PI_HIGH = tl.constexpr(1.5703125)
_HALF_PI_MIDDLE = tl.constexpr(4.837512969970703125e-4)
_HALF_PI_LOW = tl.constexpr(7.54978995489188216e-8)


def seed_words(seed: int) -> tuple[int, int]:
    """Low and high 32 bits of a seed, each as the int32 of the same bits: all seeds have the same argument types."""
    low, high = ((seed >> shift & 0xFFFFFFFF) for shift in (0, 32))
    return low - (low >> 31 << 32), high - (high >> 31 << 32)


@triton.jit
def cos_sin(angle):
    """Cosine and sine of an angle in [0, 2 pi], to about one unit in the last place.

    The library's sine also handles huge arguments, for which it needs memory on the stack.
    """
    quarter = tl.floor(angle * _TWO_OVER_PI + 0.5)
    r = ((angle - quarter * _HALF_PI_HIGH) - quarter * _HALF_PI_MIDDLE) - quarter * _HALF_PI_LOW
    s = r * r
    sine = r + r * s * ((-1.9515295891e-4 * s + 8.3321608736e-3) * s - 1.6666654611e-1)
    cosine = 1.0 - 0.5 * s + s * s * ((2.443315711809948e-5 * s - 1.388731625493765e-3) * s + 4.166664568298827e-2)
    q = quarter.to(tl.int32)
    swap = (q & 1) == 1
    b_cos = tl.where(swap, sine, cosine)
    b_sin = tl.where(swap, cosine, sine)
    return tl.where(((q + 1) & 2) == 2, -b_cos, b_cos), tl.where((q & 2) == 2, -b_sin, b_sin)


@triton.jit
def _uniform(word):
    """(w + 0.5) / 2**32, rounded to float32, in (0, 1]."""
    return tl.minimum(word.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10, 1.0)


@triton.jit
def _normal_pair(word0, word1):
    radius = tl.sqrt_rn(-2.0 * tl.log(_uniform(word0)))
    b_cos, b_sin = cos_sin(_uniform(word1) * _TWO_PI)
    return radius * b_cos, radius * b_sin


@triton.jit
def random_words(c0, key, purpose):
    """Four words for each of the uint32 blocks ``c0``.

    ``key`` is ``(seed_low, seed_high, image, step, round)``: the seed's halves are scalars, the others integers that
    broadcast to ``c0``, taken modulo 2**32.
    """
    seed_low, seed_high, image, step, draw_round = key
    zero = c0 & 0
    return tl.philox_impl(
        c0,
        (zero + step).to(tl.uint32),
        (zero + image).to(tl.uint32),
        (zero + (purpose + 256 * draw_round)).to(tl.uint32),
        seed_low.to(tl.uint32),
        seed_high.to(tl.uint32),
    )


@triton.jit
def uniform_first(zero, key, purpose):
    """Element 0 of ``philox_uniform`` for keys that broadcast to the uint32 ``zero``."""
    word, _, _, _ = random_words(zero, key, purpose)
    return _uniform(word)


@triton.jit
def uniforms(c0, key, purpose):
    """``[..., 4 N]`` elements of ``philox_uniform``, four neighbouring ones for each of the uint32 ``c0 [..., N]``."""
    word0, word1, word2, word3 = random_words(c0, key, purpose)
    even = tl.interleave(_uniform(word0), _uniform(word2))
    return tl.interleave(even, tl.interleave(_uniform(word1), _uniform(word3)))


@triton.jit
def normals(c0, key, purpose):
    """``[..., 4 N]`` elements of ``philox_normal``; as :func:`uniforms`.

    A counter gives four words, so a thread computes four neighbouring elements from one counter.
    """
    word0, word1, word2, word3 = random_words(c0, key, purpose)
    n0, n1 = _normal_pair(word0, word1)
    n2, n3 = _normal_pair(word2, word3)
    return tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))
