// Residual sum, layer norm, modulation and skip of one token.
//
// Inlined, so that a caller compiled for wider vectors (see vectors.h) has them in that form.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "vectors.h"

namespace free_kernels {

// Sums in float32 of so many values at most; those of the blocks are added in float64.
constexpr int64_t kNormValues = 1024;

// What a token's values are made of; update, gate, skip and gain may be null.
struct Token {
  const float *x, *update, *gate, *shift, *scale, *skip, *gain;
  int64_t width;
  double eps;
};

template <bool squared>
FREE_KERNELS_INLINE void add_centred(Lanes& sums, const float* values, float mean) {
  Lanes lanes;
  load(lanes, values);
  lanes -= mean;
  sums += squared ? lanes * lanes : lanes;
}

// The sum of values less `mean`, or of the squares of that; in several vectors, whose additions do not wait
// for one another.
template <bool squared>
FREE_KERNELS_INLINE double sum_centred(int64_t count, const float* values, float mean) {
  double total = 0;
  for (int64_t first = 0; first < count; first += kNormValues) {
    const int64_t end = std::min(count, first + kNormValues);
    Lanes a = {}, b = {}, c = {}, d = {};
    int64_t i = first;
    for (; i + 4 * kLanes <= end; i += 4 * kLanes) {
      add_centred<squared>(a, values + i, mean);
      add_centred<squared>(b, values + i + kLanes, mean);
      add_centred<squared>(c, values + i + 2 * kLanes, mean);
      add_centred<squared>(d, values + i + 3 * kLanes, mean);
    }
    for (; i + kLanes <= end; i += kLanes) add_centred<squared>(a, values + i, mean);
    const Lanes sums = (a + b) + (c + d);
    double halves[kLanes / 2];
    for (int64_t k = 0; k < kLanes / 2; ++k)
      halves[k] = static_cast<double>(sums[k]) + static_cast<double>(sums[k + kLanes / 2]);
    total += (halves[0] + halves[1]) + (halves[2] + halves[3]);
    for (; i < end; ++i) {
      const float centred = values[i] - mean;
      total += static_cast<double>(squared ? centred * centred : centred);
    }
  }
  return total;
}

// Writes the sum and the result of one token.
FREE_KERNELS_INLINE void norm_inline(const Token& a, float* __restrict sum, float* __restrict out) {
  const int64_t n = a.width;
  if (a.update == nullptr)
    std::copy_n(a.x, n, sum);
  else if (a.gate == nullptr)
    for (int64_t i = 0; i < n; ++i) sum[i] = a.x[i] + a.update[i];
  else
    for (int64_t i = 0; i < n; ++i) sum[i] = a.x[i] + a.gate[i] * a.update[i];
  const double count = static_cast<double>(n);
  const float mean = static_cast<float>(sum_centred<false>(n, sum, 0.0f) / count);
  const double variance = sum_centred<true>(n, sum, mean) / count;
  const float inverse = static_cast<float>(1.0 / std::sqrt(variance + a.eps));
  if (a.gain == nullptr)
    for (int64_t i = 0; i < n; ++i) out[i] = a.shift[i] + a.scale[i] * ((sum[i] - mean) * inverse);
  else
    for (int64_t i = 0; i < n; ++i)
      out[i] = a.shift[i] + a.scale[i] * ((sum[i] - mean) * inverse) + a.gain[i] * a.skip[i];
}

inline void norm_any(const Token& token, float* sum, float* out) { norm_inline(token, sum, out); }
#if FREE_KERNELS_HAS_AVX2
FREE_KERNELS_AVX2 inline void norm_avx2(const Token& token, float* sum, float* out) {
  norm_inline(token, sum, out);
}
#else
constexpr auto norm_avx2 = norm_any;
#endif

// The form for the running CPU.
inline auto norm_at_hand() { return has_avx2() ? norm_avx2 : norm_any; }

}  // namespace free_kernels
