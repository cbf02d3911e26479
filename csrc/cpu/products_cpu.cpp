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
// Products that are added one after the other; the sums of so many are added to those before.
constexpr int64_t kRun = 128;
// Fewer products are not worth a thread.
constexpr int64_t kProductGrain = 1 << 20;

// `left [M, K]`, row by row, and `right [K, N]`, its rows so many values apart.
struct Factors {
  const float *left, *right;
  int64_t inner, columns, right_stride;
};

// Adds the products of `kRows` rows and `kVectors` vectors of columns over `first <= k < end` to `out`, or
// begins there.
template <int kRows, int kVectors>
FREE_KERNELS_INLINE void tile(const Factors& a, int64_t row, int64_t column, int64_t first, int64_t end,
                              float* out) {
  Lanes sums[kRows][kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) sums[i][j] = Lanes{};
  for (int64_t k = first; k < end; ++k) {
    Lanes right[kVectors];
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) load(right[j], a.right + k * a.right_stride + column + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const float left = a.left[(row + i) * a.inner + k];
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) sums[i][j] += right[j] * left;
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      float* to = out + (row + i) * a.columns + column + j * kLanes;
      if (first > 0) {
        Lanes before;
        load(before, to);
        sums[i][j] += before;
      }
      std::memcpy(to, &sums[i][j], sizeof(Lanes));
    }
}

template <int kVectors>
FREE_KERNELS_INLINE void rows_of_vectors(const Factors& a, int64_t row, int64_t last, int64_t column,
                                         int64_t first, int64_t end, float* out) {
  for (; row + kTileRows <= last; row += kTileRows)
    tile<kTileRows, kVectors>(a, row, column, first, end, out);
  for (; row < last; ++row) tile<1, kVectors>(a, row, column, first, end, out);
}

// Rows `first_row <= i < last_row` of the product.
FREE_KERNELS_AVX2 void product_avx2(const Factors& a, int64_t first_row, int64_t last_row, float* out) {
  for (int64_t first = 0; first < a.inner; first += kRun) {
    const int64_t end = std::min(a.inner, first + kRun);
    int64_t column = 0;
    for (; column + kTileVectors * kLanes <= a.columns; column += kTileVectors * kLanes)
      rows_of_vectors<kTileVectors>(a, first_row, last_row, column, first, end, out);
    for (; column + kLanes <= a.columns; column += kLanes)
      rows_of_vectors<1>(a, first_row, last_row, column, first, end, out);
    for (; column < a.columns; ++column)
      for (int64_t row = first_row; row < last_row; ++row) {
        float total = 0;
        for (int64_t k = first; k < end; ++k)
          total += a.left[row * a.inner + k] * a.right[k * a.right_stride + column];
        float* to = out + row * a.columns + column;
        *to = first > 0 ? *to + total : total;
      }
  }
}

}  // namespace

void few_rows_product(const float* left, const float* right, int64_t rows, int64_t inner, int64_t columns,
                      int64_t right_stride, float* out) {
  const Factors factors{left, right, inner, columns, right_stride};
  const int64_t of_row = std::max<int64_t>(1, inner * columns);
  // Whole tiles, where there are more.
  const int64_t grain =
      (std::max<int64_t>(1, kProductGrain / of_row) + kTileRows - 1) / kTileRows * kTileRows;
  torch::stable::parallel_for(0, rows, grain,
                              [&](int64_t first, int64_t end) { product_avx2(factors, first, end, out); });
}

}  // namespace free_kernels

#endif
