// Values of the floating-point dtypes on the CPU.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../tensors.h"

namespace free_kernels {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

inline float* floats(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }
inline const float* const_floats(const Tensor& tensor) {
  return static_cast<const float*>(tensor.const_data_ptr());
}

inline float to_float(double value) { return static_cast<float>(value); }
inline float to_float(float value) { return value; }
inline float to_float(Half value) { return static_cast<float>(value); }
inline float to_float(BFloat16 value) { return static_cast<float>(value); }

// Calls `run` with the data as values of the tensor's dtype.
template <typename Run>
void with_floats(const char* op, const char* name, const Tensor& tensor, const Run& run) {
  const void* data = tensor.const_data_ptr();
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return run(static_cast<const float*>(data));
    case ScalarType::Double:
      return run(static_cast<const double*>(data));
    case ScalarType::Half:
      return run(static_cast<const Half*>(data));
    case ScalarType::BFloat16:
      return run(static_cast<const BFloat16*>(data));
    default:
      STD_TORCH_CHECK(false, op, ": ", name, " must be of a floating-point dtype, got ",
                      torch::headeronly::toString(tensor.scalar_type()));
  }
}

// Whether no value is a NaN or an infinity: those have all exponent bits set. Without a branch in the loop,
// so that it is vectorised.
template <typename Bits, typename T>
bool has_no_full_exponent(const T* values, int64_t count, Bits exponent) {
  static_assert(sizeof(Bits) == sizeof(T));
  Bits full = 0;
  for (int64_t i = 0; i < count; ++i) {
    Bits bits;
    std::memcpy(&bits, values + i, sizeof(bits));
    full |= static_cast<Bits>((bits & exponent) == exponent);
  }
  return full == 0;
}

inline bool is_finite(const float* values, int64_t count) {
  return has_no_full_exponent<uint32_t>(values, count, 0x7F800000);
}
inline bool is_finite(const double* values, int64_t count) {
  return has_no_full_exponent<uint64_t>(values, count, 0x7FF0000000000000);
}
inline bool is_finite(const Half* values, int64_t count) {
  return has_no_full_exponent<uint16_t>(values, count, 0x7C00);
}
inline bool is_finite(const BFloat16* values, int64_t count) {
  return has_no_full_exponent<uint16_t>(values, count, 0x7F80);
}

// A clean sample within its bound; in this order a NaN stays one.
inline float clipped(float clean, float clip) {
  return clean > clip ? clip : (clean < -clip ? -clip : clean);
}

// Sums in float32 of so many elements at most; those of the blocks are added in float64.
constexpr int64_t kSumBlock = 1024, kSumLanes = 16;

template <typename Term>
inline double sum(int64_t count, const Term& term) {
  double total = 0;
  for (int64_t first = 0; first < count; first += kSumBlock) {
    const int64_t end = std::min(count, first + kSumBlock);
    float lanes[kSumLanes] = {};
    int64_t i = first;
    for (; i + kSumLanes <= end; i += kSumLanes)
      for (int64_t lane = 0; lane < kSumLanes; ++lane) lanes[lane] += term(i + lane);
    for (; i < end; ++i) lanes[0] += term(i);
    for (const float lane : lanes) total += lane;
  }
  return total;
}

}  // namespace free_kernels
