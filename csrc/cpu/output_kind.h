// The kind of a network's output from its dtype.
#pragma once

#include "../tensors.h"
#include "transition.h"

namespace free_kernels {

inline OutputKind output_kind(const char* op, ScalarType dtype) {
  if (dtype == ScalarType::Float) return OutputKind::kFloat;
  if (dtype == ScalarType::Double) return OutputKind::kDouble;
  if (dtype == ScalarType::Half) return OutputKind::kHalf;
  STD_TORCH_CHECK(dtype == ScalarType::BFloat16, op,
                  ": output must be float32, float64, float16 or bfloat16, got ",
                  torch::headeronly::toString(dtype));
  return OutputKind::kBFloat16;
}

}  // namespace free_kernels
