// Names, devices, data and allocation of tensors through the stable ABI. Compiled into both modules.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>

#include "stable_abi.h"

namespace free_kernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline const int64_t* ints(const Tensor& tensor) {
  return static_cast<const int64_t*>(tensor.const_data_ptr());
}
inline int64_t* mutable_ints(const Tensor& tensor) {
  return static_cast<int64_t*>(tensor.mutable_data_ptr());
}

int32_t device_type(const Tensor& tensor);
std::string device_name(const Tensor& tensor);
bool same_device(const Tensor& a, const Tensor& b);

// Contiguous and uninitialised, on the device of another tensor.
Tensor empty_on(const Tensor& device_of, const int64_t* shape, size_t dim, ScalarType dtype);
inline Tensor empty_on(const Tensor& device_of, std::initializer_list<int64_t> shape, ScalarType dtype) {
  return empty_on(device_of, shape.begin(), shape.size(), dtype);
}

}  // namespace free_kernels
