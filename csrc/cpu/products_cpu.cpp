// Matrix products of few rows: a drafter's row has as many as the latent has tokens, and PyTorch's own
// product takes as long to begin as these take.
#include <algorithm>

#include "floats.h"
#include "products.h"
#include "vectors.h"

#if FREE_KERNELS_HAS_AVX2

namespace free_kernels {
namespace {

// Rows and vectors of columns whose sums are in registers at a time: 12 of the 16 that AVX2 has.
constexpr int kTileRows = 4, kTileVectors = 3;
constexpr int64_t kTileColumns = kTileVectors * kLanes;
// Products that are added one after the other; the sums of so many are added to those before.
constexpr int64_t kRun = 128;
// Fewer products are not worth a thread.
constexpr int64_t kProductGrain = 1 << 20;

// `left [M, K]`, row by row, and `right [K, N]`, whose rows are `right_stride` values apart.
struct Factors {
  const float *left, *right;
  int64_t rows, inner, columns, right_stride;
};

// Part of `right`: so many values from one of its rows to the next.
struct Part {
  const float* values;
  int64_t stride;
};

// Adds the products of `kRows` rows and `kVectors` vectors of columns over `first <= k < end` to `out`, or
// begins there.
template <int kRows, int kVectors>
FREE_KERNELS_INLINE void tile(const Factors& a, const Part& part, int64_t row, int64_t first, int64_t end,
                              float* out) {
  Lanes sums[kRows][kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) sums[i][j] = Lanes{};
  const float *left = a.left + row * a.inner + first, *values = part.values;
  for (int64_t k = 0; k < end - first; ++k, values += part.stride) {
    Lanes right[kVectors];
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) load(right[j], values + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const float factor = left[i * a.inner + k];
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) sums[i][j] += right[j] * factor;
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      float* to = out + (row + i) * a.columns + j * kLanes;
      if (first > 0) {
        Lanes before;
        load(before, to);
        sums[i][j] += before;
      }
      std::memcpy(to, &sums[i][j], sizeof(Lanes));
    }
}

template <int kVectors>
FREE_KERNELS_INLINE void all_rows(const Factors& a, const Part& part, int64_t first, int64_t end,
                                  float* out) {
  int64_t row = 0;
  for (; row + kTileRows <= a.rows; row += kTileRows)
    tile<kTileRows, kVectors>(a, part, row, first, end, out);
  for (; row < a.rows; ++row) tile<1, kVectors>(a, part, row, first, end, out);
}

// Columns from `column` on, as many as a tile has or as are left.
FREE_KERNELS_AVX2 void product_avx2(const Factors& a, int64_t column, float* out) {
  alignas(sizeof(Lanes)) float copied[kRun * kTileColumns];
  const int64_t last = std::min(a.columns, column + kTileColumns);
  for (int64_t first = 0; first < a.inner; first += kRun) {
    const int64_t end = std::min(a.inner, first + kRun);
    const float* right = a.right + first * a.right_stride;
    if (column + kTileColumns == last) {
      Part part{right + column, a.right_stride};
      // Lines of a matrix whose rows are a power of two apart would drive one another out of the cache.
      if (a.rows > kTileRows) {
        for (int64_t k = 0; k < end - first; ++k)
          std::memcpy(copied + k * kTileColumns, part.values + k * part.stride, kTileColumns * sizeof(float));
        part = {copied, kTileColumns};
      }
      all_rows<kTileVectors>(a, part, first, end, out + column);
      continue;
    }
    int64_t at = column;
    for (; at + kLanes <= last; at += kLanes)
      all_rows<1>(a, {right + at, a.right_stride}, first, end, out + at);
    for (; at < last; ++at)
      for (int64_t row = 0; row < a.rows; ++row) {
        float total = 0;
        for (int64_t k = 0; k < end - first; ++k)
          total += a.left[row * a.inner + first + k] * right[k * a.right_stride + at];
        float* to = out + row * a.columns + at;
        *to = first > 0 ? *to + total : total;
      }
  }
}

}  // namespace

void few_rows_product(const float* left, const float* right, int64_t rows, int64_t inner, int64_t columns,
                      int64_t right_stride, float* out) {
  const Factors factors{left, right, rows, inner, columns, right_stride};
  const int64_t of_tile = std::max<int64_t>(1, rows * inner * kTileColumns);
  const int64_t tiles = (columns + kTileColumns - 1) / kTileColumns;
  torch::stable::parallel_for(0, tiles, std::max<int64_t>(1, kProductGrain / of_tile),
                              [&](int64_t first, int64_t end) {
                                for (int64_t n = first; n < end; ++n)
                                  product_avx2(factors, n * kTileColumns, out);
                              });
}

}  // namespace free_kernels

#endif
