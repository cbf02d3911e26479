// The target's Gaussian of one row on the CPU: the network's output as float32, guided, and the mean and the
// deviation of the next state, a block of elements at a time, so that what lies between stays in the first
// cache.
//
// All functions are inlined, so that a caller compiled for wider vectors (see vectors.h) has them in that
// form.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "elementary.h"
#include "vectors.h"

namespace free_kernels {

enum class OutputKind { kFloat, kDouble, kHalf, kBFloat16 };

// What is the same for all rows of a call. A row has C H W elements.
struct Transition {
  OutputKind kind;   // of the output
  bool learned;      // the output has variance channels behind those of the prediction
  int64_t elements;  // C H W
  int64_t guided;    // leading elements that guidance mixes; 0 without an unconditional branch
  float scale;       // of guidance
  float clip;        // bound of the clean sample; infinite: none
};

// Columns of a transition table, as `free_kernels.constants.TransitionColumn`.
struct Columns {
  float mean_from_state, mean_from_output, log_std, log_std_slope;
  float x0_from_state, x0_from_output, mean_from_x0, mean_from_state_given_x0;
};
static_assert(sizeof(Columns) == 8 * sizeof(float));

// One row's output: pointers to its first element of the conditional and the unconditional branch.
struct OutputRow {
  const char* conditional;
  const char* unconditional;  // null without guidance
};

FREE_KERNELS_INLINE int64_t element_bytes(OutputKind kind) {
  return kind == OutputKind::kFloat ? 4 : kind == OutputKind::kDouble ? 8 : 2;
}

// float16 to float32, exactly: subnormal numbers are integers times 2^-24, others change the exponent's bias
// by 112, infinities and NaN by as much again.
FREE_KERNELS_INLINE float from_half(uint16_t half) {
  const uint32_t magnitude = half & 0x7fffu;
  const uint32_t wide = magnitude << 13;
  const uint32_t bias = magnitude >= 0x7c00u ? 224u << 23 : 112u << 23;
  const uint32_t small = bits_as<uint32_t>(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  const uint32_t value = magnitude < 0x0400u ? small : wide + bias;
  return bits_as<float>(value | (static_cast<uint32_t>(half) & 0x8000u) << 16);
}

// Elements [first, first + count) of a branch: where they lie if they are float32, else converted in
// `buffer`.
FREE_KERNELS_INLINE const float* branch_block(OutputKind kind, const char* row, int64_t first, int64_t count,
                                              float* __restrict buffer) {
  if (kind == OutputKind::kFloat) return reinterpret_cast<const float*>(row) + first;
  if (kind == OutputKind::kBFloat16) {
    const auto* given = reinterpret_cast<const uint16_t*>(row) + first;
    for (int64_t i = 0; i < count; ++i) buffer[i] = bits_as<float>(static_cast<uint32_t>(given[i]) << 16);
  } else if (kind == OutputKind::kHalf) {
    const auto* given = reinterpret_cast<const uint16_t*>(row) + first;
    for (int64_t i = 0; i < count; ++i) buffer[i] = from_half(given[i]);
  } else {
    const auto* given = reinterpret_cast<const double*>(row) + first;
    for (int64_t i = 0; i < count; ++i) buffer[i] = static_cast<float>(given[i]);
  }
  return buffer;
}

// The prediction of elements [first, first + count), guided, count <= kBlock: a pointer into the output or to
// `buffer`.
FREE_KERNELS_INLINE const float* prediction_block(const Transition& transition, const OutputRow& row,
                                                  int64_t first, int64_t count, float* __restrict buffer) {
  float other[kBlock], converted[kBlock];
  const float* conditional = branch_block(transition.kind, row.conditional, first, count, converted);
  int64_t mixed = transition.guided - first;
  if (mixed > count) mixed = count;
  if (mixed <= 0) {
    if (conditional != converted) return conditional;
    std::memcpy(buffer, converted, count * sizeof(float));
    return buffer;
  }
  const float* unconditional = branch_block(transition.kind, row.unconditional, first, mixed, other);
  const float scale = transition.scale, rest = 1.0f - transition.scale;
  // Interpolation starts from the nearer end, as torch.lerp does.
  if (std::fabs(scale) < 0.5f) {
    for (int64_t i = 0; i < mixed; ++i)
      buffer[i] = unconditional[i] + scale * (conditional[i] - unconditional[i]);
  } else {
    for (int64_t i = 0; i < mixed; ++i)
      buffer[i] = conditional[i] - (conditional[i] - unconditional[i]) * rest;
  }
  for (int64_t i = mixed; i < count; ++i) buffer[i] = conditional[i];
  return buffer;
}

// The mean of elements [first, first + count), count <= kBlock; `state` points to the row's first element.
FREE_KERNELS_INLINE void mean_block(const Transition& transition, const Columns& columns,
                                    const OutputRow& row, const float* state, int64_t first, int64_t count,
                                    float* __restrict mean) {
  float buffer[kBlock];
  const float* prediction = prediction_block(transition, row, first, count, buffer);
  const float* x = state + first;
  const float clip = transition.clip;
  if (clip == std::numeric_limits<float>::infinity()) {
    const float a = columns.mean_from_state, b = columns.mean_from_output;
    for (int64_t i = 0; i < count; ++i) mean[i] = a * x[i] + b * prediction[i];
    return;
  }
  const float a = columns.x0_from_state, b = columns.x0_from_output;
  const float c = columns.mean_from_state_given_x0, d = columns.mean_from_x0;
  for (int64_t i = 0; i < count; ++i) {
    float x0 = a * x[i] + b * prediction[i];
    // A NaN compares as false and stays.
    x0 = x0 < -clip ? -clip : x0;
    x0 = x0 > clip ? clip : x0;
    mean[i] = c * x[i] + d * x0;
  }
}

// The deviation of elements [first, first + count), count <= kBlock.
FREE_KERNELS_INLINE void deviation_block(const Transition& transition, const Columns& columns,
                                         const OutputRow& row, int64_t first, int64_t count,
                                         float* __restrict deviation) {
  if (!transition.learned) {
    const float fixed = std::exp(columns.log_std);
    for (int64_t i = 0; i < count; ++i) deviation[i] = fixed;
    return;
  }
  float buffer[kBlock];
  const float* v = branch_block(transition.kind, row.conditional, transition.elements + first, count, buffer);
  const float c = columns.log_std, d = columns.log_std_slope;
  for (int64_t i = 0; i < count; ++i) deviation[i] = exponential(c + d * v[i]);
}

}  // namespace free_kernels
