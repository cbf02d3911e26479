#include <algorithm>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../checks.h"
#include "floats.h"
#include "norms.h"

namespace free_kernels {
namespace {

// Fewer values are not worth a thread.
constexpr int64_t kGrain = 1 << 15;

// Data of a tensor of one of three dtypes, of which float32 values are read.
class Floats {
 public:
  explicit Floats(const Tensor& tensor) : data_(tensor.const_data_ptr()), dtype_(tensor.scalar_type()) {}
  Floats() : data_(nullptr), dtype_(ScalarType::Float) {}

  // `count` values from `first` on, where they are or converted into `buffer`; null without a tensor.
  const float* read(int64_t first, int64_t count, float* buffer) const {
    if (dtype_ == ScalarType::Half) return convert(static_cast<const Half*>(data_) + first, count, buffer);
    if (dtype_ == ScalarType::BFloat16)
      return convert(static_cast<const BFloat16*>(data_) + first, count, buffer);
    return data_ == nullptr ? nullptr : static_cast<const float*>(data_) + first;
  }

 private:
  template <typename T>
  static const float* convert(const T* values, int64_t count, float* buffer) {
    for (int64_t i = 0; i < count; ++i) buffer[i] = static_cast<float>(values[i]);
    return buffer;
  }

  const void* data_;
  ScalarType dtype_;
};

struct Places {
  int64_t gate, shift, scale, gain;
};

// The call's data: R rows of T tokens, K modulations of each row.
struct Call {
  Floats x, update, modulations, skip;
  int64_t rows, tokens, width, count, update_rows;
  Places at;
  double eps;
};

// Tokens [first, end) of all rows' tokens.
template <typename T>
void norm_tokens(const Call& call, int64_t first, int64_t end, T* sums, T* outs) {
  constexpr bool kNarrow = !std::is_same_v<T, float>;
  const int64_t width = call.width;
  const auto norm = norm_at_hand();
  // Four modulations of a row; x, update, skip and both results of a token.
  std::vector<float> buffer(9 * width);
  const auto at = [&](int64_t index) { return buffer.data() + index * width; };
  Token token{};
  token.width = width;
  token.eps = call.eps;
  for (int64_t i = first; i < end; ++i) {
    const int64_t row = i / call.tokens;
    if (i == first || i % call.tokens == 0) {
      const auto modulation = [&](int64_t place, int64_t index) {
        return place < 0 ? nullptr
                         : call.modulations.read((row * call.count + place) * width, width, at(index));
      };
      token.gate = modulation(call.at.gate, 0);
      token.shift = modulation(call.at.shift, 1);
      token.scale = modulation(call.at.scale, 2);
      token.gain = modulation(call.at.gain, 3);
    }
    token.x = call.x.read(i * width, width, at(4));
    token.update = call.update.read((call.update_rows == 1 ? i % call.tokens : i) * width, width, at(5));
    token.skip = call.skip.read(i * width, width, at(6));
    if constexpr (kNarrow) {
      norm(token, at(7), at(8));
      std::copy_n(at(7), width, sums + i * width);
      std::copy_n(at(8), width, outs + i * width);
    } else {
      norm(token, sums + i * width, outs + i * width);
    }
  }
}

std::tuple<Tensor, Tensor> adaptive_norm(const Tensor& x, const std::optional<Tensor>& update,
                                         const Tensor& modulations, const std::optional<Tensor>& skip,
                                         int64_t gate_at, int64_t shift_at, int64_t scale_at, int64_t gain_at,
                                         double eps) {
  constexpr const char* op = "adaptive_norm";
  STD_TORCH_CHECK(x.dim() == 3, op, ": x must have 3 dimensions, got ", x.dim());
  STD_TORCH_CHECK(modulations.dim() == 3, op, ": modulations must have 3 dimensions, got ",
                  modulations.dim());
  const auto sizes = x.sizes();
  const int64_t rows = sizes[0], tokens = sizes[1], width = sizes[2], count = modulations.size(1);
  const ScalarType dtype = x.scalar_type();
  const auto check = [&](const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape) {
    const ScalarType own = tensor.scalar_type();
    STD_TORCH_CHECK(own == ScalarType::Float || own == ScalarType::Half || own == ScalarType::BFloat16, op,
                    ": ", name, " must be float32, float16 or bfloat16, got ",
                    torch::headeronly::toString(own));
    check_tensor(op, name, tensor, own, shape, x);
  };
  check("x", x, {rows, tokens, width});
  STD_TORCH_CHECK(width >= 1, op, ": x must be at least one value wide, got 0");
  check("modulations", modulations, {rows, count, width});
  const int64_t update_rows = update && update->dim() == 3 && update->size(0) == 1 ? 1 : rows;
  if (update) check("update", *update, {update_rows, tokens, width});
  STD_TORCH_CHECK(gate_at >= -1 && gate_at < count, op, ": gate_at must be in [-1, ", count, "), got ",
                  gate_at);
  STD_TORCH_CHECK(shift_at >= 0 && shift_at < count, op, ": shift_at must be in [0, ", count, "), got ",
                  shift_at);
  STD_TORCH_CHECK(scale_at >= 0 && scale_at < count, op, ": scale_at must be in [0, ", count, "), got ",
                  scale_at);
  STD_TORCH_CHECK(gain_at >= -1 && gain_at < count, op, ": gain_at must be in [-1, ", count, "), got ",
                  gain_at);
  STD_TORCH_CHECK(gate_at < 0 || update.has_value(), op, ": update must be given where gate_at is a place");
  STD_TORCH_CHECK(skip.has_value() == (gain_at >= 0), op,
                  ": skip must be given exactly where gain_at is a place");
  if (skip) check_tensor(op, "skip", *skip, dtype, {rows, tokens, width}, x);
  STD_TORCH_CHECK(eps > 0, op, ": eps must be above 0, got ", eps);

  Tensor sum = empty_on(x, {rows, tokens, width}, dtype), out = empty_on(x, {rows, tokens, width}, dtype);
  const Call call{Floats(x),
                  update ? Floats(*update) : Floats(),
                  Floats(modulations),
                  skip ? Floats(*skip) : Floats(),
                  rows,
                  tokens,
                  width,
                  count,
                  update_rows,
                  {gate_at, shift_at, scale_at, gain_at},
                  eps};
  with_floats(op, "x", x, [&](const auto* values) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(values)>>;
    T *sums = static_cast<T*>(sum.mutable_data_ptr()), *outs = static_cast<T*>(out.mutable_data_ptr());
    torch::stable::parallel_for(
        0, rows * tokens, std::max<int64_t>(1, kGrain / width),
        [&](int64_t first, int64_t end) { norm_tokens(call, first, end, sums, outs); });
  });
  return {sum, out};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(free_kernels, CPU, library) {
  library.impl("adaptive_norm_cpu", TORCH_BOX(&adaptive_norm));
}

}  // namespace free_kernels
