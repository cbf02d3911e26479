// The module `_C_cuda` and its one Python function.
#include <pybind11/pybind11.h>

#include <string>

#include "packing_kernels.h"

namespace {

namespace py = pybind11;

py::list arch_list() {
  py::list names;
  for (const int arch : free_kernels::cuda_arch_list())
    names.append(std::to_string(arch / 100) + "." + std::to_string(arch / 10 % 10));
  return names;
}

}  // namespace

PYBIND11_MODULE(_C_cuda, module) {
  module.doc() =
      "CUDA ops of free_kernels for the schemas of `_C`; importing it registers them with PyTorch.";
  module.def("cuda_arch_list", &arch_list,
             "Architectures that the kernels were compiled for, as \"9.0\" ...");
}
