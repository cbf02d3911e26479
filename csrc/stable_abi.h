// The part of PyTorch that an extension may use and still load under later releases: its stable ABI as
// of 2.10. Sources take it from here, so that the macro is set in all of them. Those with pybind11 include
// none of it: before 2.13 torch's own copy of pybind11 refuses to be compiled beside the macro.
#pragma once

#ifdef TORCH_VERSION
#error "stable_abi.h must come before any header of torch"
#endif
#define TORCH_TARGET_VERSION 0x020a000000000000

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#include <torch/headeronly/util/shim_utils.h>
