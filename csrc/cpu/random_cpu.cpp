#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "round_parts.h"

namespace free_kernels {
namespace {

constexpr int64_t kBlocksAtOnce = 64;

// The output words of consecutive blocks, word-major so that every loop over blocks can be vectorised.
struct Words {
  uint32_t word[4][kBlocksAtOnce];
};

// Philox4x32-10 (Salmon et al. 2011) on the counters (first ... first + blocks - 1, step, image, purpose).
void philox(uint64_t seed, uint32_t first, int64_t blocks, uint32_t step, uint32_t image, uint32_t purpose,
            Words& out) {
  for (int64_t i = 0; i < blocks; ++i) {
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    uint32_t c0 = first + static_cast<uint32_t>(i), c1 = step, c2 = image, c3 = purpose;
    for (int round = 0; round < 10; ++round) {
      const uint64_t product0 = uint64_t{0xD2511F53} * c0;
      const uint64_t product1 = uint64_t{0xCD9E8D57} * c2;
      c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ key0;
      c1 = static_cast<uint32_t>(product1);
      c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ key1;
      c3 = static_cast<uint32_t>(product0);
      key0 += 0x9E3779B9;
      key1 += 0xBB67AE85;
    }
    out.word[0][i] = c0;
    out.word[1][i] = c1;
    out.word[2][i] = c2;
    out.word[3][i] = c3;
  }
}

// The top of (0, 1] is reached by rounding, the bottom is 2^-33.
float uniform(uint32_t word) { return std::min(static_cast<float>(word) * 0x1p-32f + 0x1p-33f, 1.0f); }

struct Uniform {
  static void transform(const Words& words, int64_t i, float (&out)[4]) {
    for (int k = 0; k < 4; ++k) out[k] = uniform(words.word[k][i]);
  }
};

struct Normal {
  static void transform(const Words& words, int64_t i, float (&out)[4]) {
    for (int k = 0; k < 4; k += 2) {
      const float radius = std::sqrt(-2.0f * std::log(uniform(words.word[k][i])));
      const float angle = 6.283185307179586f * uniform(words.word[k + 1][i]);
      out[k] = radius * std::cos(angle);
      out[k + 1] = radius * std::sin(angle);
    }
  }
};

// `numel` numbers of one key.
template <typename Law>
void fill(int64_t seed, int64_t image, int64_t step, int64_t round, int64_t purpose, int64_t numel,
          float* out) {
  Words words;
  const auto last = static_cast<uint32_t>(purpose + 256 * round);
  for (int64_t first = 0; first < numel; first += 4 * kBlocksAtOnce) {
    const int64_t count = std::min(numel - first, 4 * kBlocksAtOnce);
    philox(static_cast<uint64_t>(seed), static_cast<uint32_t>(first / 4), (count + 3) / 4,
           static_cast<uint32_t>(step), static_cast<uint32_t>(image), last, words);
    for (int64_t e = 0; e < count; e += 4) {
      float element[4];
      Law::transform(words, e / 4, element);
      std::copy_n(element, std::min<int64_t>(4, count - e), out + first + e);
    }
  }
}

void check_numel(const char* op, int64_t numel) {
  STD_TORCH_CHECK(numel >= 0 && numel <= int64_t{1} << 34, op, ": numel must be in [0, 2**34], got ", numel);
}

template <typename Law>
Tensor draw(const char* op, int64_t seed, const Tensor& images, const Tensor& steps, int64_t purpose,
            int64_t numel, const std::optional<Tensor>& rounds) {
  STD_TORCH_CHECK(images.dim() == 1, op, ": images must have 1 dimension, got ", images.dim());
  const int64_t rows = images.size(0);
  check_tensor(op, "images", images, ScalarType::Long, {rows}, images);
  check_tensor(op, "steps", steps, ScalarType::Long, {rows}, images);
  if (rounds) check_tensor(op, "rounds", *rounds, ScalarType::Long, {rows}, images);
  STD_TORCH_CHECK(purpose >= 0 && purpose < 256, op, ": purpose must be in [0, 256), got ", purpose);
  check_numel(op, numel);

  Tensor out = empty_on(images, {rows, numel}, ScalarType::Float);
  float* values = static_cast<float*>(out.mutable_data_ptr());
  for (int64_t m = 0; m < rows; ++m)
    fill<Law>(seed, ints(images)[m], ints(steps)[m], rounds ? ints(*rounds)[m] : 0, purpose, numel,
              values + m * numel);
  return out;
}

Tensor philox_uniform(int64_t seed, const Tensor& images, const Tensor& steps, int64_t purpose, int64_t numel,
                      const std::optional<Tensor>& rounds) {
  return draw<Uniform>("philox_uniform", seed, images, steps, purpose, numel, rounds);
}

Tensor philox_normal(int64_t seed, const Tensor& images, const Tensor& steps, int64_t purpose, int64_t numel,
                     const std::optional<Tensor>& rounds) {
  return draw<Normal>("philox_normal", seed, images, steps, purpose, numel, rounds);
}

// Purposes, as `free_kernels.constants.Purpose`.
constexpr int64_t kStep = 1, kSlack = 2, kAccept = 3;

}  // namespace

std::tuple<Tensor, Tensor, Tensor> round_numbers(int64_t seed, const Tensor& images, const Tensor& steps,
                                                 const std::vector<int64_t>& latent, bool slack,
                                                 const std::optional<Tensor>& rounds) {
  constexpr const char* op = "philox_round";
  STD_TORCH_CHECK(steps.dim() == 2, op, ": steps must have 2 dimensions, got ", steps.dim());
  const int64_t slots = steps.size(0), length = steps.size(1);
  check_tensor(op, "steps", steps, ScalarType::Long, {slots, length}, steps);
  check_tensor(op, "images", images, ScalarType::Long, {slots}, steps);
  if (rounds) check_tensor(op, "rounds", *rounds, ScalarType::Long, {slots}, steps);
  std::vector<int64_t> shape{slots, length};
  shape.insert(shape.end(), latent.begin(), latent.end());
  int64_t numel = 1;
  for (const int64_t size : latent) numel *= size;
  check_numel(op, numel);
  Tensor noise = empty_on(steps, shape.data(), shape.size(), ScalarType::Float);
  const int64_t slack_numel = slack ? numel : 0;
  if (!slack) shape[2] = 0;
  Tensor other = empty_on(steps, shape.data(), shape.size(), ScalarType::Float);
  Tensor uniform = empty_on(steps, {slots, length}, ScalarType::Float);
  const auto floats = [](const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); };
  for (int64_t row = 0; row < slots * length; ++row) {
    const int64_t slot = row / length, image = ints(images)[slot], step = ints(steps)[row];
    const int64_t round = rounds ? ints(*rounds)[slot] : 0;
    fill<Normal>(seed, image, step, round, kStep, numel, floats(noise) + row * numel);
    fill<Normal>(seed, image, step, round, kSlack, slack_numel, floats(other) + row * slack_numel);
    fill<Uniform>(seed, image, step, round, kAccept, 1, floats(uniform) + row);
  }
  return {noise, other, uniform};
}

namespace {

std::tuple<Tensor, Tensor, Tensor> philox_round(int64_t seed, const Tensor& images, const Tensor& steps,
                                                int64_t numel, bool slack,
                                                const std::optional<Tensor>& rounds) {
  return round_numbers(seed, images, steps, {numel}, slack, rounds);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(free_kernels, CPU, library) {
  library.impl("philox_uniform", TORCH_BOX(&philox_uniform));
  library.impl("philox_normal", TORCH_BOX(&philox_normal));
  library.impl("philox_round", TORCH_BOX(&philox_round));
}

}  // namespace free_kernels
