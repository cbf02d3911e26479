// The module `_C` and its one Python function. Of torch's headers only the version, see stable_abi.h.
#include <pybind11/pybind11.h>
#include <torch/headeronly/version.h>

#include <string>

#ifndef FREE_KERNELS_VERSION
#define FREE_KERNELS_VERSION unknown
#endif
#define FREE_KERNELS_QUOTE_EXPANDED(...) #__VA_ARGS__
#define FREE_KERNELS_QUOTE(...) FREE_KERNELS_QUOTE_EXPANDED(__VA_ARGS__)

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
  config["compiler"] = compiler();
  config["torch"] = TORCH_VERSION;
  return config;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Schemas and CPU ops of free_kernels; importing it registers them with PyTorch.";
  module.def("build_config", &build_config,
             "What was built: version, compiler and the torch version built against.");
}
