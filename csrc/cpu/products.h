// Matrix products: of few rows by our own loop, of many by PyTorch.
#pragma once

#include <cstdint>

#include "../tensors.h"
#include "floats.h"
#include "vectors.h"

// Behind the others: it takes its declarations from the stable ABI of the version that these ask for.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

namespace free_kernels {

// A tensor's data as a matrix, from its first element on: the shim adds the offset to the tensor's own.
inline Tensor matrix(const Tensor& tensor, int64_t rows, int64_t columns, int64_t row_stride,
                     int64_t column_stride) {
  const int64_t sizes[] = {rows, columns}, strides[] = {row_stride, column_stride};
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(tensor.get(), 2, sizes, strides, 0, &handle));
  return Tensor(handle);
}

// With more rows, or larger weights, what PyTorch's product takes to begin is small beside what it takes.
constexpr int64_t kMostRows = 32, kMostWeights = 1 << 17;

// `left [M, K]`, contiguous, times `right [K, N]`, whose rows are contiguous and `right_stride` values apart;
// for CPUs with AVX2.
void few_rows_product(const float* left, const float* right, int64_t rows, int64_t inner, int64_t columns,
                      int64_t right_stride, float* out);

// `rows [M, K]`, contiguous, times the transpose of `weight [N, K]`.
inline Tensor times(const Tensor& rows, const Tensor& weight) {
  const auto sizes = weight.sizes();
  Tensor product = empty_on(rows, {rows.size(0), sizes[0]}, ScalarType::Float);
#if FREE_KERNELS_HAS_AVX2
  const bool few = rows.size(0) <= kMostRows && sizes[0] * sizes[1] <= kMostWeights && sizes[1] > 0;
  if (few && weight.stride(0) == 1 && has_avx2()) {
    few_rows_product(const_floats(rows), const_floats(weight), rows.size(0), sizes[1], sizes[0],
                     weight.stride(1), floats(product));
    return product;
  }
#endif
  const Tensor turned = matrix(weight, sizes[1], sizes[0], weight.stride(1), weight.stride(0));
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(product.get(), rows.get(), turned.get()));
  return product;
}

}  // namespace free_kernels
