// The ops' schemas, for every device, and the module's one Python function.
#include <pybind11/pybind11.h>
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/version.h>

#include <string>

#ifdef FREE_KERNELS_CUDA
#include "cuda/packing_kernels.h"
#endif

#ifndef FREE_KERNELS_VERSION
#define FREE_KERNELS_VERSION unknown
#endif
#define FREE_KERNELS_QUOTE_EXPANDED(...) #__VA_ARGS__
#define FREE_KERNELS_QUOTE(...) FREE_KERNELS_QUOTE_EXPANDED(__VA_ARGS__)

STABLE_TORCH_LIBRARY(free_kernels, library) {
  library.def(
      "pack_drafts(Tensor states, Tensor lengths, Tensor steps, Tensor labels, Tensor timesteps, int "
      "num_rows, "
      "int? null_label=None) -> (Tensor x, Tensor t, Tensor y, Tensor row_offsets)");
  library.def(
      "commit_drafts(Tensor committed, Tensor next_states, Tensor draft_states, Tensor features, "
      "Tensor row_offsets, Tensor(a!) state, Tensor(b!) previous, Tensor(c!) parent, Tensor(d!) steps, "
      "Tensor(e!) images, Tensor(f!) labels, Tensor(g!) samples, Tensor all_labels, Tensor(h!) queue, "
      "int num_steps) -> ()");
  library.def(
      "philox_uniform(int seed, Tensor images, Tensor steps, int purpose, int numel, Tensor? rounds=None) "
      "-> Tensor");
  library.def(
      "philox_normal(int seed, Tensor images, Tensor steps, int purpose, int numel, Tensor? rounds=None) "
      "-> Tensor");
}

namespace {

namespace py = pybind11;

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

py::dict build_config() {
  py::dict config;
  config["version"] = FREE_KERNELS_QUOTE(FREE_KERNELS_VERSION);
  py::list arch_list;
#ifdef FREE_KERNELS_CUDA
  config["cuda"] = true;
  for (const int arch : free_kernels::cuda_arch_list())
    arch_list.append(std::to_string(arch / 100) + "." + std::to_string(arch / 10 % 10));
#else
  config["cuda"] = false;
#endif
  config["cuda_arch_list"] = arch_list;
  config["compiler"] = compiler();
  config["torch"] = TORCH_VERSION;
  return config;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Compiled ops of free_kernels; importing it registers them with PyTorch.";
  module.def("build_config", &build_config,
             "What was built: version, cuda, cuda_arch_list, compiler and the torch version built against.");
}
