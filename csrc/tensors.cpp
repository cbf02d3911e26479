#include "tensors.h"

#include <vector>

namespace free_kernels {

int32_t device_type(const Tensor& tensor) {
  int32_t type;
  STD_TORCH_CHECK(aoti_torch_get_device_type(tensor.get(), &type) == 0, "cannot read a tensor's device");
  return type;
}

std::string device_name(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  return (tensor.is_cuda() ? "cuda:" : "device ") + std::to_string(tensor.get_device_index());
}

bool same_device(const Tensor& a, const Tensor& b) {
  return device_type(a) == device_type(b) && a.get_device_index() == b.get_device_index();
}

Tensor empty_on(const Tensor& device_of, const int64_t* shape, size_t dim, ScalarType dtype) {
  std::vector<int64_t> strides(dim, 1);
  for (size_t i = dim; i-- > 1;) strides[i - 1] = strides[i] * shape[i];
  // The dispatcher's aten::empty costs about a microsecond more than this direct call.
  AtenTensorHandle handle;
  const auto shim_dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(dim), shape, strides.data(),
                                                  shim_dtype, device_type(device_of),
                                                  device_of.get_device_index(), &handle));
  return Tensor(handle);
}

}  // namespace free_kernels
