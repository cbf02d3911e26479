#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <vector>

#include "../checks.h"
#include "floats.h"

namespace free_kernels {
namespace {

// Rows of fewer elements are not worth a thread.
constexpr int64_t kGrain = 1 << 15;
constexpr int64_t kColumns = 8;

// Sums in float32 of so many elements at most; those of the blocks are added in float64.
constexpr int64_t kBlock = 1024, kLanes = 16;

template <typename Term>
double sum(int64_t count, const Term& term) {
  double total = 0;
  for (int64_t first = 0; first < count; first += kBlock) {
    const int64_t end = std::min(count, first + kBlock);
    float lanes[kLanes] = {};
    int64_t i = first;
    for (; i + kLanes <= end; i += kLanes)
      for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += term(i + lane);
    for (; i < end; ++i) lanes[0] += term(i);
    for (const float lane : lanes) total += lane;
  }
  return total;
}

struct Guidance {
  float scale;
  int64_t channels;
  bool off() const { return scale == 1.0f; }
};

struct Shape {
  int64_t slots, length, channels, pixels, outputs, rows, width;
  int64_t state() const { return channels * pixels; }
  int64_t output() const { return outputs * pixels; }
};

// As torch.lerp, whose formula is the more accurate one on either side of one half.
float lerp(float from, float to, float weight) {
  return weight < 0.5f ? from + weight * (to - from) : to - (to - from) * (1 - weight);
}

// The guided output of a row in float32.
template <typename T>
void read_output(const T* output, int64_t row, const Shape& shape, const Guidance& guidance, float* out) {
  const T* conditional = output + row * shape.output();
  for (int64_t e = 0; e < shape.output(); ++e) out[e] = to_float(conditional[e]);
  if (guidance.off()) return;
  const T* unconditional = output + (shape.rows + row) * shape.output();
  for (int64_t e = 0; e < guidance.channels * shape.pixels; ++e)
    out[e] = lerp(to_float(unconditional[e]), out[e], guidance.scale);
}

// Mean, deviation and next state of one step, from coefficients of free_kernels.constants.TransitionColumn.
void transition(const float* state, const float* output, const float* column, const float* noise, float clip,
                const Shape& shape, float* mean, float* std, float* next) {
  const int64_t count = shape.state();
  if (std::isinf(clip)) {
    for (int64_t e = 0; e < count; ++e) mean[e] = column[0] * state[e] + column[1] * output[e];
  } else {
    for (int64_t e = 0; e < count; ++e) {
      const float clean = column[4] * state[e] + column[5] * output[e];
      // In this order a NaN stays one.
      const float clipped = clean > clip ? clip : (clean < -clip ? -clip : clean);
      mean[e] = column[7] * state[e] + column[6] * clipped;
    }
  }
  if (shape.outputs == shape.channels) {
    std::fill_n(std, count, std::exp(column[2]));
  } else {
    for (int64_t e = 0; e < count; ++e) std[e] = std::exp(column[2] + column[3] * output[count + e]);
  }
  for (int64_t e = 0; e < count; ++e) next[e] = mean[e] + std[e] * noise[e];
}

struct Drafting {
  float *states, *mean, *std;
  const float *noise, *columns, *asked;
  const int64_t *rows, *replaced;
  float* share;
  int64_t first, end;
  Guidance guidance;
  float clip;
};

// The secant through two rows: `output` is the latest row's and becomes what their line says at `state`.
template <typename T>
float follow(const float* state, int64_t latest, int64_t replaced, const Drafting& drafting, const T* output,
             const Shape& shape, float* said, float* older) {
  const float* here = drafting.asked + latest * shape.state();
  const float* there = drafting.asked + replaced * shape.state();
  const double along =
      sum(shape.state(), [&](int64_t e) { return (state[e] - here[e]) * (here[e] - there[e]); });
  const double length = sum(shape.state(), [&](int64_t e) {
    const float way = here[e] - there[e];
    return way * way;
  });
  const float share = std::clamp(
      static_cast<float>(along / std::max(length, double{std::numeric_limits<float>::min()})), -1.0f, 1.0f);
  read_output(output, replaced, shape, drafting.guidance, older);
  for (int64_t e = 0; e < shape.output(); ++e) said[e] += share * (said[e] - older[e]);
  return share;
}

template <typename T>
void advance_slot(int64_t slot, const Drafting& drafting, const T* output, const Shape& shape,
                  float* scratch) {
  const int64_t size = shape.state(), drafts = shape.length - 1;
  float* said = scratch;
  for (int64_t j = drafting.first; j < drafting.end; ++j) {
    const int64_t row = drafting.rows[slot * shape.width + j];
    if (row < 0) continue;
    const int64_t place = slot * shape.length + j, draft = slot * drafts + j;
    float* state = drafting.states + place * size;
    read_output(output, row, shape, drafting.guidance, said);
    const int64_t replaced = drafting.replaced ? drafting.replaced[slot * shape.width + j] : -1;
    if (replaced >= 0)
      drafting.share[slot * (drafting.end - drafting.first) + j - drafting.first] =
          follow(state, row, replaced, drafting, output, shape, said, said + shape.output());
    transition(state, said, drafting.columns + place * kColumns, drafting.noise + place * size, drafting.clip,
               shape, drafting.mean + draft * size, drafting.std + draft * size, state + size);
  }
}

float* floats(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }
const float* const_floats(const Tensor& tensor) { return static_cast<const float*>(tensor.const_data_ptr()); }

Tensor advance_drafts(const Tensor& states, const Tensor& mean, const Tensor& std, const Tensor& noise,
                      const Tensor& columns, const Tensor& output, const Tensor& rows, int64_t first,
                      int64_t end, const std::optional<Tensor>& asked, const std::optional<Tensor>& replaced,
                      double guidance_scale, int64_t guidance_channels, double clip) {
  constexpr const char* op = "advance_drafts";
  constexpr ScalarType kFloat = ScalarType::Float, kLong = ScalarType::Long;
  STD_TORCH_CHECK(states.dim() == 5, op, ": states must have 5 dimensions, got ", states.dim());
  STD_TORCH_CHECK(output.dim() == 4, op, ": output must have 4 dimensions, got ", output.dim());
  STD_TORCH_CHECK(rows.dim() == 2, op, ": rows must have 2 dimensions, got ", rows.dim());
  const auto s = states.sizes();
  const int64_t branches = guidance_scale == 1.0 ? 1 : 2, outputs = output.size(1);
  const Shape shape{s[0], s[1], s[2], s[3] * s[4], outputs, output.size(0) / branches, rows.size(1)};
  check_tensor(op, "states", states, kFloat, {s[0], s[1], s[2], s[3], s[4]}, states);
  check_tensor(op, "mean", mean, kFloat, {s[0], s[1] - 1, s[2], s[3], s[4]}, states);
  check_tensor(op, "std", std, kFloat, {s[0], s[1] - 1, s[2], s[3], s[4]}, states);
  check_tensor(op, "noise", noise, kFloat, {s[0], s[1], s[2], s[3], s[4]}, states);
  check_tensor(op, "columns", columns, kFloat, {s[0], s[1], kColumns}, states);
  check_tensor(op, "output", output, output.scalar_type(), {branches * shape.rows, outputs, s[3], s[4]},
               states);
  STD_TORCH_CHECK(outputs == s[2] || outputs == 2 * s[2], op, ": output must have ", s[2], " or ", 2 * s[2],
                  " channels, got ", outputs);
  check_tensor(op, "rows", rows, kLong, {s[0], shape.width}, states);
  STD_TORCH_CHECK(0 <= first && first <= end && end <= std::min(s[1] - 1, shape.width), op,
                  ": first and end must be in order in [0, ", std::min(s[1] - 1, shape.width), "], got ",
                  first, " and ", end);
  STD_TORCH_CHECK(0 <= guidance_channels && guidance_channels <= s[2], op,
                  ": guidance_channels must be in [0, ", s[2], "], got ", guidance_channels);
  STD_TORCH_CHECK(asked.has_value() == replaced.has_value(), op,
                  ": asked and replaced must be given together");
  if (asked) {
    check_tensor(op, "asked", *asked, kFloat, {shape.rows, s[2], s[3], s[4]}, states);
    check_tensor(op, "replaced", *replaced, kLong, {s[0], shape.width}, states);
  }
  for (int64_t slot = 0; slot < s[0]; ++slot)
    for (int64_t j = first; j < end; ++j) {
      const int64_t place = slot * shape.width + j;
      const int64_t row = ints(rows)[place], older = replaced ? ints(*replaced)[place] : -1;
      STD_TORCH_CHECK(row < shape.rows && older < shape.rows, op, ": rows and replaced must be below ",
                      shape.rows, ", got ", std::max(row, older));
    }

  Tensor share = empty_on(states, {s[0], asked ? end - first : 0}, kFloat);
  if (asked) std::fill_n(floats(share), s[0] * (end - first), 0.0f);
  const Drafting drafting{floats(states),
                          floats(mean),
                          floats(std),
                          const_floats(noise),
                          const_floats(columns),
                          asked ? const_floats(*asked) : nullptr,
                          ints(rows),
                          replaced ? ints(*replaced) : nullptr,
                          floats(share),
                          first,
                          end,
                          {static_cast<float>(guidance_scale), guidance_channels},
                          static_cast<float>(clip)};
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, shape.state() * (end - first)));
  with_floats(op, "output", output, [&](const auto* values) {
    torch::stable::parallel_for(0, s[0], grain, [&](int64_t from, int64_t to) {
      std::vector<float> scratch(2 * shape.output());
      for (int64_t slot = from; slot < to; ++slot)
        advance_slot(slot, drafting, values, shape, scratch.data());
    });
  });
  return share;
}

void keep_rows(const Tensor& states, const Tensor& features, const Tensor& output, const Tensor& row_offsets,
               const Tensor& committed, const Tensor& lengths, const Tensor& steps, const Tensor& at,
               const Tensor& turn, const Tensor& held_states, const Tensor& held_features,
               const std::optional<Tensor>& held_output) {
  constexpr const char* op = "keep_rows";
  constexpr ScalarType kFloat = ScalarType::Float, kLong = ScalarType::Long;
  STD_TORCH_CHECK(states.dim() == 5, op, ": states must have 5 dimensions, got ", states.dim());
  STD_TORCH_CHECK(features.dim() == 3, op, ": features must have 3 dimensions, got ", features.dim());
  STD_TORCH_CHECK(output.dim() == 4, op, ": output must have 4 dimensions, got ", output.dim());
  STD_TORCH_CHECK(at.dim() == 3, op, ": at must have 3 dimensions, got ", at.dim());
  STD_TORCH_CHECK(held_features.dim() == 6, op, ": held_features must have 6 dimensions, got ",
                  held_features.dim());
  const auto s = states.sizes(), f = features.sizes(), o = output.sizes();
  const int64_t slots = s[0], generations = at.size(0), places = at.size(2), rows = places - 1;
  const int64_t branches = held_features.size(0);
  STD_TORCH_CHECK(generations >= 1 && rows >= 1 && branches >= 1 && f[0] % branches == 0, op,
                  ": at must be [G, S, M + 1] with G and M at least 1, and features [B R, T, D]");
  const int64_t packed = f[0] / branches;
  check_tensor(op, "states", states, kFloat, {slots, s[1], s[2], s[3], s[4]}, states);
  check_tensor(op, "features", features, features.scalar_type(), {f[0], f[1], f[2]}, states);
  check_tensor(op, "output", output, output.scalar_type(), {f[0], o[1], s[3], s[4]}, states);
  check_tensor(op, "row_offsets", row_offsets, kLong, {slots + 1}, states);
  check_tensor(op, "committed", committed, kLong, {slots}, states);
  check_tensor(op, "lengths", lengths, kLong, {slots}, states);
  check_tensor(op, "steps", steps, kLong, {slots}, states);
  check_tensor(op, "at", at, kLong, {generations, slots, places}, states);
  check_tensor(op, "turn", turn, kLong, {slots, places}, states);
  check_tensor(op, "held_states", held_states, kFloat, {generations, slots, places, s[2], s[3], s[4]},
               states);
  check_tensor(op, "held_features", held_features, features.scalar_type(),
               {branches, generations, slots, places, f[1], f[2]}, states);
  if (held_output)
    check_tensor(op, "held_output", *held_output, output.scalar_type(),
                 {branches, generations, slots, places, o[1], s[3], s[4]}, states);

  const int64_t state_size = s[2] * s[3] * s[4], feature_size = f[1] * f[2], output_size = o[1] * s[3] * s[4];
  const int64_t all = generations * slots * places;
  const auto bytes = [](const Tensor& tensor) { return static_cast<const char*>(tensor.const_data_ptr()); };
  const auto held = [](const Tensor& tensor) { return static_cast<char*>(tensor.mutable_data_ptr()); };
  const auto finite = [op](const char* name, const Tensor& tensor, int64_t row, int64_t size) {
    bool all_finite = true;
    with_floats(op, name, tensor,
                [&](const auto* values) { all_finite = is_finite(values + row * size, size); });
    return all_finite;
  };
  int64_t* steps_held = mutable_ints(at);
  int64_t* turns = mutable_ints(turn);
  for (int64_t slot = 0; slot < slots; ++slot) {
    const int64_t done = ints(committed)[slot], length = ints(lengths)[slot], step0 = ints(steps)[slot];
    const int64_t end = std::min(length, done + rows - 1);
    STD_TORCH_CHECK(end <= s[1] && ints(row_offsets)[slot] >= 0 && ints(row_offsets)[slot] + end <= packed,
                    op, ": row_offsets must give slot ", slot, " at least ", end, " of the ", packed,
                    " rows, got row ", ints(row_offsets)[slot]);
    for (int64_t j = std::max<int64_t>(done - 1, 0); j < end; ++j) {
      const int64_t row = ints(row_offsets)[slot] + j, step = step0 + j;
      const int64_t place = slot * places + step % rows;
      const int64_t generation = (turns[place] + 1) % generations;
      const int64_t index = generation * slots * places + place;
      turns[place] = generation;
      bool usable = true;
      std::memcpy(held(held_states) + index * state_size * 4,
                  bytes(states) + (slot * s[1] + j) * state_size * 4, state_size * 4);
      for (int64_t branch = 0; branch < branches; ++branch) {
        const int64_t from = branch * packed + row, to = branch * all + index;
        usable = usable && finite("features", features, from, feature_size) &&
                 finite("output", output, from, output_size);
        const int64_t feature_bytes = feature_size * static_cast<int64_t>(features.element_size());
        std::memcpy(held(held_features) + to * feature_bytes, bytes(features) + from * feature_bytes,
                    feature_bytes);
        if (!held_output) continue;
        const int64_t output_bytes = output_size * static_cast<int64_t>(output.element_size());
        std::memcpy(held(*held_output) + to * output_bytes, bytes(output) + from * output_bytes,
                    output_bytes);
      }
      steps_held[index] = usable ? step : -1;
    }
  }
}

void find_rows(const Tensor& at, const Tensor& turn, const Tensor& steps, const Tensor& places,
               const Tensor& ahead) {
  constexpr const char* op = "find_rows";
  constexpr ScalarType kLong = ScalarType::Long;
  STD_TORCH_CHECK(at.dim() == 3 && at.size(0) >= 1 && at.size(2) >= 2, op,
                  ": at must be [G, S, M + 1] with G and M at least 1");
  const int64_t generations = at.size(0), slots = at.size(1), width = at.size(2), rows = width - 1;
  check_tensor(op, "at", at, kLong, {generations, slots, width}, at);
  check_tensor(op, "turn", turn, kLong, {slots, width}, at);
  check_tensor(op, "steps", steps, kLong, {slots}, at);
  check_tensor(op, "places", places, kLong, {generations, slots, rows}, at);
  check_tensor(op, "ahead", ahead, kLong, {slots}, at);
  for (int64_t slot = 0; slot < slots; ++slot) {
    const auto find = [&](int64_t entry, int64_t turns_on) -> int64_t {
      const int64_t step = ints(steps)[slot] - 1 + entry;
      const int64_t place = slot * width + (step % rows + rows) % rows;
      const int64_t generation = (ints(turn)[place] + turns_on) % generations;
      const int64_t index = generation * slots * width + place;
      return ints(at)[index] == step ? index : -1;
    };
    int64_t count = 0;
    while (count + 1 < rows && find(count + 1, 0) >= 0) ++count;
    mutable_ints(ahead)[slot] = count;
    for (int64_t generation = 0; generation < generations; ++generation)
      for (int64_t entry = 0; entry < rows; ++entry)
        mutable_ints(places)[(generation * slots + slot) * rows + entry] =
            count > 0 && entry <= count ? find(entry, generation) : -1;
  }
}

Tensor tally_round(const Tensor& output, const Tensor& next_states, const Tensor& gap_sq,
                   const Tensor& committed, const Tensor& lengths, const Tensor& steps,
                   const Tensor& deviation) {
  constexpr const char* op = "tally_round";
  constexpr ScalarType kFloat = ScalarType::Float, kLong = ScalarType::Long;
  STD_TORCH_CHECK(next_states.dim() == 4, op, ": next_states must have 4 dimensions, got ",
                  next_states.dim());
  STD_TORCH_CHECK(gap_sq.dim() == 2, op, ": gap_sq must have 2 dimensions, got ", gap_sq.dim());
  STD_TORCH_CHECK(output.is_contiguous() && next_states.is_contiguous(), op,
                  ": output and next_states must be contiguous");
  const int64_t slots = next_states.size(0), drafts = gap_sq.size(1), num_steps = deviation.numel();
  check_tensor(op, "gap_sq", gap_sq, kFloat, {slots, drafts}, next_states);
  check_tensor(op, "committed", committed, kLong, {slots}, next_states);
  check_tensor(op, "lengths", lengths, kLong, {slots}, next_states);
  check_tensor(op, "steps", steps, kLong, {slots}, next_states);
  check_tensor(op, "deviation", deviation, kFloat, {num_steps}, next_states);
  for (int64_t slot = 0; slot < slots; ++slot) {
    const int64_t tested = std::min({ints(committed)[slot], ints(lengths)[slot] - 1, drafts});
    for (int64_t j = 0; j < tested; ++j) {
      const float gap = const_floats(gap_sq)[slot * drafts + j];
      const int64_t step = std::min(ints(steps)[slot] + j, num_steps - 1);
      floats(deviation)[step] += std::isfinite(gap) ? gap : 1e30f;
    }
  }
  bool finite = true;
  with_floats(op, "output", output, [&](const auto* values) { finite = is_finite(values, output.numel()); });
  finite = finite && is_finite(const_floats(next_states), next_states.numel());
  Tensor result = empty_on(steps, {1}, kLong);
  *mutable_ints(result) = finite;
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(free_kernels, CPU, library) {
  library.impl("advance_drafts_cpu", TORCH_BOX(&advance_drafts));
  library.impl("keep_rows_cpu", TORCH_BOX(&keep_rows));
  library.impl("find_rows_cpu", TORCH_BOX(&find_rows));
  library.impl("tally_round_cpu", TORCH_BOX(&tally_round));
}

}  // namespace free_kernels
