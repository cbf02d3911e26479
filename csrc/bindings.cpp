// The module `_C` and its Python functions. Of torch's headers only the version, see stable_abi.h.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/headeronly/version.h>

#include <algorithm>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "steering/plan.h"

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

using Array = py::array_t<double, py::array::c_style | py::array::forcecast>;
using Numbers = std::vector<int64_t>;

std::string described(int64_t value) { return std::to_string(value); }

std::string described(const Numbers& values) {
  std::string text = "[";
  for (const int64_t value : values) text += (text.size() > 1 ? ", " : "") + std::to_string(value);
  return text + "]";
}

// An array by its shape.
std::string described(const Array& array) {
  return described(Numbers(array.shape(), array.shape() + array.ndim()));
}

// The message is made only where it is needed: this stands in every round's way.
template <typename First, typename... More>
void require(bool holds, const char* what, const First& first, const More&... more) {
  if (holds) return;
  std::string got = described(first);
  (got.append(", ").append(described(more)), ...);
  throw py::value_error(std::string("plan_round: ") + what + ", got " + got);
}

py::tuple as_tuple(const free_kernels::Plan& plan) {
  return py::make_tuple(plan.speed, plan.promised, plan.drafts);
}

py::tuple plan_round(Numbers steps, Numbers seen, Numbers room, const Array& fresh, const Array& first,
                     const Array& as_seen, double fresh_factor, double seen_factor,
                     std::optional<double> saved, double behind, Numbers lengths, const Array& seconds,
                     int64_t grain, int64_t images) {
  require(!steps.empty() && seen.size() == steps.size() && room.size() == steps.size(),
          "steps, seen and room must be of the same slots, at least one", steps, seen, room);
  require(fresh.ndim() == 2 && fresh.size() > 0, "fresh must be [K + 1, A]", fresh);
  require(first.ndim() == 1 && as_seen.ndim() == 1 && first.size() == as_seen.size() && first.size() > 0,
          "first and as_seen must be of the same places", first, as_seen);
  require(!lengths.empty() && lengths.front() >= 2, "lengths must be of at least 2 rows", lengths);
  require(std::is_sorted(lengths.begin(), lengths.end()), "lengths must ascend", lengths);
  require(seconds.ndim() == 2 && seconds.shape(1) > 1, "seconds must be [longest + 1, grains + 1]", seconds);
  require(grain >= 1, "grain must be at least 1", grain);
  require(images >= 1, "images must be at least 1", images);
  require(lengths.back() < seconds.shape(0), "lengths must be rows of seconds", lengths, seconds);
  const int64_t most = images + static_cast<int64_t>(steps.size()) * (lengths.back() - 1);
  require((most + grain / 2) / grain < seconds.shape(1), "seconds must be of as many rows as are planned",
          seconds, most, grain);
  const free_kernels::Odds odds{fresh.data(),   fresh.shape(0), fresh.shape(1), first.data(),
                                as_seen.data(), first.size(),   fresh_factor,   seen_factor};
  const free_kernels::Plans plans =
      free_kernels::plan_round({std::move(steps), std::move(seen), std::move(room), odds, saved, behind,
                                std::move(lengths), seconds.data(), seconds.shape(1), grain, images});
  return py::make_tuple(as_tuple(plans.best), as_tuple(plans.shortest));
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() =
      "Schemas and CPU ops of free_kernels, which importing it registers with PyTorch; and plans of drafts.";
  module.def("build_config", &build_config,
             "What was built: version, compiler and the torch version built against.");
  module.def("plan_round", &plan_round, "Drafts of a round; see free_kernels.steering.plan.");
}
