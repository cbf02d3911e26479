#include <algorithm>
#include <cmath>
#include <optional>

#include "../checks.h"
#include "floats.h"

namespace free_kernels {
namespace {

// A row of fewer elements is not worth a thread.
constexpr int64_t kGrain = 1 << 15;
constexpr double kSmallestSquare = 1e-12;

struct Tiling {
  int64_t channels, height, width, patch_height, patch_width;
  int64_t elements() const { return channels * height * width; }
};

// Writes one part's patches of a row: element (token, c, y, x) goes to out[token * stride + (c p + y) q + x].
template <typename T>
void write_patches(const float* state, const float* previous, float factor, const Tiling& tiling,
                   int64_t stride, T* out) {
  const int64_t p = tiling.patch_height, q = tiling.patch_width;
  for (int64_t line = 0; line < tiling.height; line += p)
    for (int64_t column = 0; column < tiling.width; column += q, out += stride)
      for (int64_t c = 0; c < tiling.channels; ++c)
        for (int64_t y = 0; y < p; ++y) {
          const int64_t from = (c * tiling.height + line + y) * tiling.width + column;
          for (int64_t x = 0; x < q; ++x) {
            const float value = previous ? (state[from + x] - previous[from + x]) * factor : state[from + x];
            out[(c * p + y) * q + x] = static_cast<T>(value);
          }
        }
}

Tensor drafter_tokens(const Tensor& feature, const Tensor& previous, const Tensor& state, const Tensor& t,
                      const std::optional<Tensor>& change_rms, int64_t time_unit, int64_t patch_height,
                      int64_t patch_width, int64_t state_at, int64_t unit_at, int64_t scaled_at) {
  constexpr const char* op = "drafter_tokens";
  constexpr ScalarType kFloat = ScalarType::Float;
  STD_TORCH_CHECK(feature.dim() == 3, op, ": feature must have 3 dimensions, got ", feature.dim());
  STD_TORCH_CHECK(state.dim() == 4, op, ": state must have 4 dimensions, got ", state.dim());
  const auto f = feature.sizes(), s = state.sizes();
  const int64_t rows = f[0], tokens = f[1], width = f[2];
  const Tiling tiling{s[1], s[2], s[3], patch_height, patch_width};
  check_tensor(op, "feature", feature, feature.scalar_type(), {rows, tokens, width}, feature);
  check_tensor(op, "state", state, kFloat, {rows, s[1], s[2], s[3]}, feature);
  check_tensor(op, "previous", previous, kFloat, {rows, s[1], s[2], s[3]}, feature);
  check_tensor(op, "t", t, ScalarType::Long, {rows}, feature);
  STD_TORCH_CHECK(patch_height >= 1 && patch_width >= 1 && s[2] % patch_height == 0 &&
                      s[3] % patch_width == 0 && (s[2] / patch_height) * (s[3] / patch_width) == tokens,
                  op, ": patches of ", patch_height, " x ", patch_width, " must tile ", s[2], " x ", s[3],
                  " states in ", tokens, " tokens");
  STD_TORCH_CHECK(time_unit >= 1, op, ": time_unit must be at least 1, got ", time_unit);
  STD_TORCH_CHECK(change_rms.has_value() == (scaled_at >= 0), op,
                  ": change_rms must be given exactly where scaled_at is a place");
  int64_t parts = 0, places = 0;
  for (const int64_t place : {state_at, unit_at, scaled_at})
    if (place >= 0) ++parts, places |= place < 3 ? int64_t{1} << place : 8;
  STD_TORCH_CHECK(parts >= 1 && places == (int64_t{1} << parts) - 1, op,
                  ": state_at, unit_at and scaled_at must be the places 0, 1 ... of those that are taken");
  const int64_t timesteps = change_rms ? change_rms->numel() : 0;
  if (change_rms) check_tensor(op, "change_rms", *change_rms, kFloat, {timesteps}, feature);
  for (int64_t row = 0; change_rms && row < rows; ++row)
    STD_TORCH_CHECK(ints(t)[row] >= 0 && ints(t)[row] / time_unit < timesteps, op, ": t must be in [0, ",
                    timesteps * time_unit, "), got ", ints(t)[row]);

  const int64_t patch_size = tiling.channels * patch_height * patch_width, full = width + parts * patch_size;
  Tensor out = empty_on(feature, {rows, tokens, full}, feature.scalar_type());
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, tokens * full));
  with_floats(op, "feature", feature, [&](const auto* features) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(features)>>;
    T* to = static_cast<T*>(out.mutable_data_ptr());
    torch::stable::parallel_for(0, rows, grain, [&](int64_t from, int64_t end) {
      for (int64_t row = from; row < end; ++row) {
        T* own = to + row * tokens * full;
        for (int64_t token = 0; token < tokens; ++token)
          std::copy_n(features + (row * tokens + token) * width, width, own + token * full);
        const float* now = const_floats(state) + row * tiling.elements();
        const float* before = const_floats(previous) + row * tiling.elements();
        const auto write = [&](int64_t place, const float* other, float factor) {
          write_patches(now, other, factor, tiling, full, own + width + place * patch_size);
        };
        if (state_at >= 0) write(state_at, nullptr, 1.0f);
        if (unit_at >= 0) {
          const double square = sum(tiling.elements(), [&](int64_t e) {
            const float change = now[e] - before[e];
            return change * change;
          });
          const double mean = square / static_cast<double>(tiling.elements());
          write(unit_at, before, static_cast<float>(1.0 / std::sqrt(mean + kSmallestSquare)));
        }
        if (scaled_at >= 0)
          write(scaled_at, before, 1.0f / const_floats(*change_rms)[ints(t)[row] / time_unit]);
      }
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(free_kernels, CPU, library) {
  library.impl("drafter_tokens_cpu", TORCH_BOX(&drafter_tokens));
}

}  // namespace free_kernels
