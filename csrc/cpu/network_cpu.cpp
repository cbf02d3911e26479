#include <algorithm>
#include <vector>

#include "../checks.h"
#include "elementary.h"
#include "floats.h"
#include "norms.h"
#include "products.h"

namespace free_kernels {
namespace {

// Fewer values are not worth a thread.
constexpr int64_t kGrain = 1 << 14;
// Weights before the first block, of a block, and behind the last; modulations of a block and behind the
// last.
constexpr int64_t kFirst = 2, kOfBlock = 8, kLast = 2, kBlockRows = 6, kLastRows = 2;

struct Shape {
  int64_t rows, tokens, width, heads, blocks;

  int64_t all_tokens() const { return rows * tokens; }
};

// Attention among the tokens of a row. `joint [T, 3 W]` is queries, keys and values still without their bias;
// an added bias of the values goes through the weighted mean as it is.
struct Attention {
  const float *joint, *bias;
  Shape shape;

  int64_t depth() const { return shape.width / shape.heads; }
  int64_t padded() const { return (shape.tokens + kLanes - 1) / kLanes * kLanes; }
  int64_t scratch() const { return depth() * padded() + padded() + depth(); }
};

FREE_KERNELS_INLINE void attend_inline(const Attention& a, float* __restrict scratch, float* __restrict out) {
  const int64_t tokens = a.shape.tokens, width = a.shape.width, depth = a.depth(), padded = a.padded();
  float *keys = scratch, *scores = keys + depth * padded, *query = scores + padded;
  const float scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(depth)));
  for (int64_t head = 0; head < a.shape.heads; ++head) {
    const int64_t q_at = head * depth, k_at = width + q_at, v_at = width + k_at;
    // Transposed, so that a query's products with all keys are sums of vectors.
    for (int64_t d = 0; d < depth; ++d) {
      for (int64_t j = 0; j < tokens; ++j)
        keys[d * padded + j] = a.joint[j * 3 * width + k_at + d] + a.bias[k_at + d];
      for (int64_t j = tokens; j < padded; ++j) keys[d * padded + j] = 0.0f;
    }
    for (int64_t i = 0; i < tokens; ++i) {
      const float* q = a.joint + i * 3 * width + q_at;
      for (int64_t d = 0; d < depth; ++d) query[d] = (q[d] + a.bias[q_at + d]) * scale;
      for (int64_t j = 0; j < padded; ++j) scores[j] = 0.0f;
      for (int64_t d = 0; d < depth; ++d)
        for (int64_t j = 0; j < padded; ++j) scores[j] += query[d] * keys[d * padded + j];
      float largest = scores[0], total = 0.0f;
      for (int64_t j = 1; j < tokens; ++j) largest = scores[j] > largest ? scores[j] : largest;
      for (int64_t j = 0; j < padded; ++j) scores[j] = exponential(scores[j] - largest);
      for (int64_t j = 0; j < tokens; ++j) total += scores[j];
      float* mixed = out + i * width + q_at;
      for (int64_t d = 0; d < depth; ++d) mixed[d] = 0.0f;
      for (int64_t j = 0; j < tokens; ++j) {
        const float* v = a.joint + j * 3 * width + v_at;
        for (int64_t d = 0; d < depth; ++d) mixed[d] += scores[j] * v[d];
      }
      const float inverse = 1.0f / total;
      for (int64_t d = 0; d < depth; ++d) mixed[d] = mixed[d] * inverse + a.bias[v_at + d];
    }
  }
}

FREE_KERNELS_INLINE void gelu_inline(int64_t count, const float* bias, float* values) {
  for (int64_t i = 0; i < count; ++i) values[i] = gelu(values[i] + bias[i]);
}

FREE_KERNELS_INLINE void token_inline(Token token, const float* bias, float* __restrict buffer, float* sum,
                                      float* out) {
  if (bias != nullptr) {
    for (int64_t i = 0; i < token.width; ++i) buffer[i] = token.update[i] + bias[i];
    token.update = buffer;
  }
  norm_inline(token, sum, out);
}

// Each of the three for any CPU and for AVX2.
void attend_any(const Attention& attention, float* scratch, float* out) {
  attend_inline(attention, scratch, out);
}
void gelu_any(int64_t count, const float* bias, float* values) { gelu_inline(count, bias, values); }
void token_any(const Token& token, const float* bias, float* buffer, float* sum, float* out) {
  token_inline(token, bias, buffer, sum, out);
}

#if FREE_KERNELS_HAS_AVX2
FREE_KERNELS_AVX2 void attend_avx2(const Attention& attention, float* scratch, float* out) {
  attend_inline(attention, scratch, out);
}
FREE_KERNELS_AVX2 void gelu_avx2(int64_t count, const float* bias, float* values) {
  gelu_inline(count, bias, values);
}
FREE_KERNELS_AVX2 void token_avx2(const Token& token, const float* bias, float* buffer, float* sum,
                                  float* out) {
  token_inline(token, bias, buffer, sum, out);
}
#else
constexpr auto attend_avx2 = attend_any;
constexpr auto gelu_avx2 = gelu_any;
constexpr auto token_avx2 = token_any;
#endif

// Calls `run(first, end)` for parts of `count` things of `size` values each, on all threads.
template <typename Run>
void in_parts(int64_t count, int64_t size, const Run& run) {
  torch::stable::parallel_for(0, count, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, size)), run);
}

Tensor attend(const Tensor& joint, const Tensor& bias, const Shape& shape) {
  Tensor mixed = empty_on(joint, {shape.all_tokens(), shape.width}, ScalarType::Float);
  const float *given = const_floats(joint), *added = const_floats(bias);
  float* out = floats(mixed);
  const int64_t size = shape.tokens * shape.width;
  in_parts(shape.rows, 3 * size, [&](int64_t first, int64_t end) {
    Attention attention{nullptr, added, shape};
    std::vector<float> scratch(attention.scratch());
    for (int64_t row = first; row < end; ++row) {
      attention.joint = given + row * 3 * size;
      (has_avx2() ? attend_avx2 : attend_any)(attention, scratch.data(), out + row * size);
    }
  });
  return mixed;
}

void gelu_in_place(const Tensor& hidden, const Tensor& bias) {
  const int64_t width = hidden.size(1);
  const float* added = const_floats(bias);
  float* values = floats(hidden);
  in_parts(hidden.size(0), width, [&](int64_t first, int64_t end) {
    for (int64_t token = first; token < end; ++token)
      (has_avx2() ? gelu_avx2 : gelu_any)(width, added, values + token * width);
  });
}

// What a norm leaves: the residual stream, and what the next layer takes of it.
struct Stream {
  Tensor x, normalized;
};

// Places among a row's modulations; negative: none.
struct Places {
  int64_t gate, shift, gain;
};

Stream normalize(const Tensor& x, const Tensor& update, const Tensor* bias, const Tensor* skip,
                 const Tensor& modulations, const Places& at, const Shape& shape, double eps) {
  const int64_t width = shape.width, count = modulations.size(1), updates = update.size(0);
  Stream found{empty_on(x, {shape.all_tokens(), width}, ScalarType::Float),
               empty_on(x, {shape.all_tokens(), width}, ScalarType::Float)};
  const float *xs = const_floats(x), *given = const_floats(update), *rows = const_floats(modulations);
  const float *added = bias == nullptr ? nullptr : const_floats(*bias),
              *skipped = skip == nullptr ? nullptr : const_floats(*skip);
  float *sums = floats(found.x), *outs = floats(found.normalized);
  in_parts(shape.all_tokens(), width, [&](int64_t first, int64_t end) {
    std::vector<float> buffer(width);
    for (int64_t i = first; i < end; ++i) {
      const float* row = rows + i / shape.tokens * count * width;
      const auto modulation = [&](int64_t place) { return place < 0 ? nullptr : row + place * width; };
      const Token token{xs + i * width,
                        given + i % updates * width,
                        modulation(at.gate),
                        modulation(at.shift),
                        modulation(at.shift + 1),
                        skipped == nullptr ? nullptr : skipped + i * width,
                        modulation(at.gain),
                        width,
                        eps};
      (has_avx2() ? token_avx2 : token_any)(token, added, buffer.data(), sums + i * width, outs + i * width);
    }
  });
  return found;
}

// The shape of a call whose arguments fit one another.
Shape check(const Tensor& feature, const Tensor& tokens, const Tensor& modulations,
            const std::vector<Tensor>& weights, int64_t heads, double eps) {
  constexpr const char* op = "drafter_network";
  constexpr ScalarType dtype = ScalarType::Float;
  STD_TORCH_CHECK(feature.dim() == 3, op, ": feature must have 3 dimensions, got ", feature.dim());
  STD_TORCH_CHECK(tokens.dim() == 3, op, ": tokens must have 3 dimensions, got ", tokens.dim());
  STD_TORCH_CHECK(modulations.dim() == 3, op, ": modulations must have 3 dimensions, got ",
                  modulations.dim());
  const int64_t rows = feature.size(0), count = feature.size(1), features = feature.size(2),
                inputs = tokens.size(2);
  const int64_t width = modulations.size(2),
                depth = (static_cast<int64_t>(weights.size()) - kFirst - kLast) / kOfBlock;
  check_tensor(op, "feature", feature, dtype, {rows, count, features}, feature);
  check_tensor(op, "tokens", tokens, dtype, {rows, count, inputs}, feature);
  const int64_t own = kBlockRows * depth + kLastRows, modulated = modulations.size(1) == own ? own : own + 1;
  check_tensor(op, "modulations", modulations, dtype, {rows, modulated, width}, feature);
  STD_TORCH_CHECK(depth >= 1 && kFirst + kOfBlock * depth + kLast == static_cast<int64_t>(weights.size()), op,
                  ": weights must be 4 and 8 for each block, got ", weights.size());
  STD_TORCH_CHECK(heads >= 1 && width >= heads && width % heads == 0, op, ": heads must divide the width ",
                  width, ", got ", heads);
  STD_TORCH_CHECK(eps > 0, op, ": eps must be above 0, got ", eps);
  const auto check_layer = [&](int64_t at, int64_t outputs, int64_t given) {
    check_layout(op, "a weight", weights[at], dtype, {outputs, given}, feature);
    check_tensor(op, "a bias", weights[at + 1], dtype, {outputs}, feature);
  };
  check_layout(op, "the first weight", weights[0], dtype, {width, inputs}, feature);
  check_tensor(op, "the first bias", weights[1], dtype, {1, count, width}, feature);
  for (int64_t block = 0; block < depth; ++block) {
    const int64_t at = kFirst + kOfBlock * block,
                  hidden = weights[at + 4].dim() == 2 ? weights[at + 4].size(0) : 0;
    check_layer(at, 3 * width, width);
    check_layer(at + 2, width, width);
    check_layer(at + 4, hidden, width);
    check_layer(at + 6, width, hidden);
  }
  check_layer(kFirst + kOfBlock * depth, features, width);
  return {rows, count, width, heads, depth};
}

Tensor drafter_network(const Tensor& feature, const Tensor& tokens, const Tensor& modulations,
                       std::vector<Tensor> weights, int64_t heads, double eps) {
  const Shape shape = check(feature, tokens, modulations, weights, heads, eps);
  const int64_t inputs = tokens.size(2), features = feature.size(2), all = shape.all_tokens();
  Tensor out = empty_on(feature, {shape.rows, shape.tokens, features}, ScalarType::Float);
  if (all == 0) return out;

  const Tensor entered = times(matrix(tokens, all, inputs, inputs, 1), weights[0]);
  const Tensor positions = matrix(weights[1], shape.tokens, shape.width, shape.width, 1);
  Stream stream = normalize(entered, positions, nullptr, nullptr, modulations, {-1, 0, -1}, shape, eps);
  const Tensor embedded = stream.x;
  for (int64_t block = 0; block < shape.blocks; ++block) {
    const Tensor* layers = weights.data() + kFirst + kOfBlock * block;
    const int64_t first = kBlockRows * block, behind = first + kBlockRows;
    const Tensor mixed = attend(times(stream.normalized, layers[0]), layers[1], shape);
    stream = normalize(stream.x, times(mixed, layers[2]), &layers[3], nullptr, modulations,
                       {first + 2, first + 3, -1}, shape, eps);
    const Tensor hidden = times(stream.normalized, layers[4]);
    gelu_in_place(hidden, layers[5]);
    const bool skips = block == shape.blocks - 1 && modulations.size(1) > behind + kLastRows;
    stream = normalize(stream.x, times(hidden, layers[6]), &layers[7], skips ? &embedded : nullptr,
                       modulations, {behind - 1, behind, skips ? behind + kLastRows : -1}, shape, eps);
  }
  const Tensor change = times(stream.normalized, weights[weights.size() - 2]);
  const float *parent = const_floats(feature), *changes = const_floats(change),
              *bias = const_floats(weights.back());
  float* results = floats(out);
  in_parts(all, features, [&](int64_t first, int64_t end) {
    for (int64_t token = first; token < end; ++token)
      for (int64_t i = 0, at = token * features; i < features; ++i)
        results[at + i] = parent[at + i] + (changes[at + i] + bias[i]);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(free_kernels, CPU, library) {
  library.impl("drafter_network_cpu", TORCH_BOX(&drafter_network));
}

}  // namespace free_kernels
