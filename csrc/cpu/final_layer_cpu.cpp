#include <algorithm>
#include <optional>
#include <vector>

#include "../checks.h"
#include "floats.h"
#include "norms.h"
#include "products.h"
#include "round_parts.h"
#include "table_index.h"

namespace free_kernels {
namespace {

// Fewer values are not worth a thread.
constexpr int64_t kGrain = 1 << 14;
// Products of so few values take less time than a call of PyTorch's.
constexpr int64_t kFewProducts = 1 << 17;

// A grid of tokens, each a patch of every channel.
struct Grid {
  int64_t rows, columns, patch_rows, patch_columns, channels;

  int64_t tokens() const { return rows * columns; }
  int64_t values() const { return patch_rows * patch_columns * channels; }
};

// Adds the bias to the values of one row's tokens, [T, patch rows, patch columns, C], and writes them as
// [C, H, W].
void unpatchify(const float* tokens, const float* bias, const Grid& grid, float* out) {
  const int64_t width = grid.columns * grid.patch_columns;
  const int64_t channel_size = grid.rows * grid.patch_rows * width;
  for (int64_t token = 0; token < grid.tokens(); ++token) {
    const float* from = tokens + token * grid.values();
    float* corner =
        out + token / grid.columns * grid.patch_rows * width + token % grid.columns * grid.patch_columns;
    int64_t i = 0;
    for (int64_t row = 0; row < grid.patch_rows; ++row)
      for (int64_t column = 0; column < grid.patch_columns; ++column)
        for (int64_t channel = 0; channel < grid.channels; ++channel, ++i)
          corner[channel * channel_size + row * width + column] =
              from[i] + (bias == nullptr ? 0.0f : bias[i]);
  }
}

// What the head does to one token but for the bias: the sum of `normalized` products with each row of a
// weight.
struct Product {
  const float* weight;
  int64_t values, width, row_stride;
};

FREE_KERNELS_INLINE void product_inline(const Product& a, const float* normalized, float* out) {
  for (int64_t value = 0; value < a.values; ++value) {
    const float* row = a.weight + value * a.row_stride;
    Lanes sums[2] = {};
    int64_t i = 0;
    for (; i + 2 * kLanes <= a.width; i += 2 * kLanes)
      for (int64_t half = 0; half < 2; ++half) {
        Lanes x, w;
        load(x, normalized + i + half * kLanes);
        load(w, row + i + half * kLanes);
        sums[half] += x * w;
      }
    const Lanes both = sums[0] + sums[1];
    float total = 0;
    for (; i < a.width; ++i) total += normalized[i] * row[i];
    for (int64_t lane = 0; lane < kLanes; ++lane) total += both[lane];
    out[value] = total;
  }
}

FREE_KERNELS_INLINE void token_inline(const Token& token, const Product& product, float* scratch,
                                      float* out) {
  norm_inline(token, scratch, scratch + token.width);
  product_inline(product, scratch + token.width, out);
}
void token_any(const Token& token, const Product& product, float* scratch, float* out) {
  token_inline(token, product, scratch, out);
}
#if FREE_KERNELS_HAS_AVX2
FREE_KERNELS_AVX2 void token_avx2(const Token& token, const Product& product, float* scratch, float* out) {
  token_inline(token, product, scratch, out);
}
#else
constexpr auto token_avx2 = token_any;
#endif

Grid check(const Tensor& h, const Tensor& rows, const Tensor& weight, const std::optional<Tensor>& bias,
           double eps, int64_t grid_rows, int64_t patch_rows, int64_t patch_columns) {
  constexpr const char* op = "final_layer";
  constexpr ScalarType dtype = ScalarType::Float;
  STD_TORCH_CHECK(h.dim() == 3, op, ": h must have 3 dimensions, got ", h.dim());
  STD_TORCH_CHECK(rows.dim() == 4, op, ": rows must have 4 dimensions, got ", rows.dim());
  STD_TORCH_CHECK(weight.dim() == 2, op, ": weight must have 2 dimensions, got ", weight.dim());
  const int64_t tokens = h.size(1), width = h.size(2), values = weight.size(0);
  check_tensor(op, "h", h, dtype, {h.size(0), tokens, width}, h);
  STD_TORCH_CHECK(width >= 1, op, ": h must be at least one value wide, got 0");
  STD_TORCH_CHECK(tokens >= 1, op, ": h must have at least one token, got 0");
  STD_TORCH_CHECK(values >= 1, op, ": weight must have at least one row, got 0");
  check_tensor(op, "rows", rows, dtype, {rows.size(0), 2, 1, width}, h);
  check_layout(op, "weight", weight, dtype, {values, width}, h);
  if (bias) check_tensor(op, "bias", *bias, dtype, {values}, h);
  STD_TORCH_CHECK(eps > 0, op, ": eps must be above 0, got ", eps);
  STD_TORCH_CHECK(grid_rows >= 1 && tokens % grid_rows == 0, op, ": grid_rows must divide ", tokens,
                  " tokens, got ", grid_rows);
  STD_TORCH_CHECK(patch_rows >= 1, op, ": patch_rows must be at least 1, got ", patch_rows);
  STD_TORCH_CHECK(patch_columns >= 1 && values % patch_rows == 0 && values / patch_rows % patch_columns == 0,
                  op, ": patches of ", patch_rows, " rows must divide ", values,
                  " values, got patch_columns ", patch_columns);
  return {grid_rows, tokens / grid_rows, patch_rows, patch_columns, values / (patch_rows * patch_columns)};
}

}  // namespace

Tensor final_layer(const Tensor& h, const Tensor& rows, const Tensor& row_of_timestep,
                   const Tensor& row_of_label, const Tensor& t, const Tensor& y, const Tensor& weight,
                   const std::optional<Tensor>& bias, double eps, int64_t grid_rows, int64_t patch_rows,
                   int64_t patch_columns) {
  const Grid grid = check(h, rows, weight, bias, eps, grid_rows, patch_rows, patch_columns);
  const int64_t count = h.size(0), width = h.size(2), tokens = grid.tokens(), all = count * tokens;
  const std::vector<int64_t> index =
      table_index("final_layer", rows, row_of_timestep, row_of_label, t, y, count);
  Tensor out = empty_on(h, {count, grid.channels, grid.rows * patch_rows, grid.columns * patch_columns},
                        ScalarType::Float);
  if (out.numel() == 0) return out;

  const auto token = [&](int64_t i) {
    const float* shift = const_floats(rows) + index[i / tokens] * 2 * width;
    return Token{
        const_floats(h) + i * width, nullptr, nullptr, shift, shift + width, nullptr, nullptr, width, eps};
  };
  const float* added = bias ? const_floats(*bias) : nullptr;
  const int64_t size = tokens * grid.values();
  if (weight.stride(1) == 1 && all * width * grid.values() <= kFewProducts) {
    const Product product{const_floats(weight), grid.values(), width, weight.stride(0)};
    const auto run = has_avx2() ? token_avx2 : token_any;
    std::vector<float> scratch(2 * width), found(size);
    for (int64_t row = 0; row < count; ++row) {
      for (int64_t i = 0; i < tokens; ++i)
        run(token(row * tokens + i), product, scratch.data(), found.data() + i * grid.values());
      unpatchify(found.data(), added, grid, floats(out) + row * size);
    }
    return out;
  }
  const Tensor normalized = empty_on(h, {all, width}, ScalarType::Float);
  float* normalized_values = floats(normalized);
  torch::stable::parallel_for(0, all, std::max<int64_t>(1, kGrain / width), [&](int64_t first, int64_t end) {
    const auto norm = norm_at_hand();
    std::vector<float> sum(width);
    for (int64_t i = first; i < end; ++i) norm(token(i), sum.data(), normalized_values + i * width);
  });
  const Tensor values = times(normalized, weight);
  const float* found = const_floats(values);
  float* results = floats(out);
  torch::stable::parallel_for(0, count, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, size)),
                              [&](int64_t first, int64_t end) {
                                for (int64_t row = first; row < end; ++row)
                                  unpatchify(found + row * size, added, grid, results + row * size);
                              });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(free_kernels, CPU, library) {
  library.impl("final_layer_cpu", TORCH_BOX(&final_layer));
}

}  // namespace free_kernels
