// Elementary functions of float32 without branches, so that loops of them become vector instructions.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "vectors.h"

namespace free_kernels {

template <typename To, typename From>
FREE_KERNELS_INLINE To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}

// exp to about one unit in the last place, without a branch: 2^n times a Taylor polynomial of the rest r, |r|
// <= ln 2 / 2, whose remainder is below 2^-27. The result overflows and vanishes where exp does; NaN stays.
FREE_KERNELS_INLINE float exponential(float x) {
  constexpr float kLowest = -104.0f, kHighest = 89.0f;  // beyond, the result is 0 or infinite
  constexpr float kRounder = 0x1.8p23f;                 // adding it leaves an integer in the low bits
  // ln 2 in two parts; products of the first, which has 15 bits, with n are exact.
  constexpr float kLn2High = 0.693145751953125f, kLn2Low = 1.42860682030941723e-6f;
  x = x < kLowest ? kLowest : x;
  x = x > kHighest ? kHighest : x;
  const float shifted = x * 1.44269504088896341f + kRounder;
  const float n = shifted - kRounder;
  const float r = (x - n * kLn2High) - n * kLn2Low;
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = (p * r) * r + r;
  // 2^n as a product of two, because one factor could not be as large or as small as the result.
  const int32_t exponent = bits_as<int32_t>(shifted) - bits_as<int32_t>(kRounder);
  const int32_t half = exponent >> 1;
  const float low = bits_as<float>((static_cast<uint32_t>(half) + 127u) << 23);
  const float high = bits_as<float>((static_cast<uint32_t>(exponent - half) + 127u) << 23);
  return ((1.0f + p) * low) * high;
}

// x times the normal distribution function at x. Below 0 that function is exp(-x^2 / 2) times a polynomial in
// 1 / (1 + 0.28 |x|), fitted to its product with max(|x|, 1/2) within 7.1e-9; above 0 it is one less its
// mirror image.
FREE_KERNELS_INLINE float gelu(float x) {
  const float size = std::fabs(x), t = 1.0f / (1.0f + 0.28f * size);
  float p = -0.106756157f;
  p = p * t + 0.393814534f;
  p = p * t - 0.243504286f;
  p = p * t + 0.274253265f;
  p = p * t + 0.0653195479f;
  p = p * t + 0.116873081f;
  const float beyond = (p * t) * exponential(-0.5f * size * size);
  return x > 0.0f ? x - x * beyond : x * beyond;
}

}  // namespace free_kernels
