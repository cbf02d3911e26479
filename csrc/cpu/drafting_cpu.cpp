#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "floats.h"
#include "round_parts.h"

namespace free_kernels {
namespace {

// Rows of fewer elements are not worth a thread.
constexpr int64_t kGrain = 1 << 15;
constexpr int64_t kColumns = 8;

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
      const float clean = clipped(column[4] * state[e] + column[5] * output[e], clip);
      mean[e] = column[7] * state[e] + column[6] * clean;
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
  const float *noise, *columns;
  const int64_t* rows;
  int64_t first, end;
  Guidance guidance;
  float clip;
};

template <typename T>
void advance_slot(int64_t slot, const Drafting& drafting, const T* output, const Shape& shape, float* said) {
  const int64_t size = shape.state(), drafts = shape.length - 1;
  for (int64_t j = drafting.first; j < drafting.end; ++j) {
    const int64_t row = drafting.rows[slot * shape.width + j];
    if (row < 0) continue;
    const int64_t place = slot * shape.length + j, draft = slot * drafts + j;
    float* state = drafting.states + place * size;
    read_output(output, row, shape, drafting.guidance, said);
    transition(state, said, drafting.columns + place * kColumns, drafting.noise + place * size, drafting.clip,
               shape, drafting.mean + draft * size, drafting.std + draft * size, state + size);
  }
}

}  // namespace

void advance_drafts(const Tensor& states, const Tensor& mean, const Tensor& std, const Tensor& noise,
                    const Tensor& columns, const Tensor& output, const Tensor& rows, int64_t first,
                    int64_t end, double guidance_scale, int64_t guidance_channels, double clip) {
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
  for (int64_t slot = 0; slot < s[0]; ++slot)
    for (int64_t j = first; j < end; ++j) {
      const int64_t row = ints(rows)[slot * shape.width + j];
      STD_TORCH_CHECK(row < shape.rows, op, ": rows must be below ", shape.rows, ", got ", row);
    }

  const Drafting drafting{floats(states),
                          floats(mean),
                          floats(std),
                          const_floats(noise),
                          const_floats(columns),
                          ints(rows),
                          first,
                          end,
                          {static_cast<float>(guidance_scale), guidance_channels},
                          static_cast<float>(clip)};
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, shape.state() * (end - first)));
  with_floats(op, "output", output, [&](const auto* values) {
    torch::stable::parallel_for(0, s[0], grain, [&](int64_t from, int64_t to) {
      std::vector<float> said(shape.output());
      for (int64_t slot = from; slot < to; ++slot) advance_slot(slot, drafting, values, shape, said.data());
    });
  });
}

Opened open_round(const Tensor& state, const Tensor& current, const Tensor& timesteps, const Tensor& table,
                  int64_t length) {
  constexpr const char* op = "open_round";
  constexpr ScalarType kFloat = ScalarType::Float, kLong = ScalarType::Long;
  STD_TORCH_CHECK(state.dim() == 4, op, ": state must have 4 dimensions, got ", state.dim());
  const auto s = state.sizes();
  const int64_t slots = s[0], num_steps = timesteps.numel(), size = s[1] * s[2] * s[3];
  STD_TORCH_CHECK(length >= 1 && num_steps >= 1, op,
                  ": length and the number of timesteps must be at least 1, got ", length, " and ",
                  num_steps);
  check_tensor(op, "state", state, kFloat, {slots, s[1], s[2], s[3]}, state);
  check_tensor(op, "current", current, kLong, {slots}, state);
  check_steps(op, current, "current");
  check_tensor(op, "timesteps", timesteps, kLong, {num_steps}, state);
  check_tensor(op, "table", table, kFloat, {num_steps, kColumns}, state);
  Tensor steps = empty_on(state, {slots, length}, kLong);
  Tensor network_steps = empty_on(state, {slots, length}, kLong);
  Tensor columns = empty_on(state, {slots, length, kColumns}, kFloat);
  Tensor states = empty_on(state, {slots, length, s[1], s[2], s[3]}, kFloat);
  Tensor mean = empty_on(state, {slots, length - 1, s[1], s[2], s[3]}, kFloat);
  Tensor std = empty_on(state, {slots, length - 1, s[1], s[2], s[3]}, kFloat);
  for (int64_t slot = 0; slot < slots; ++slot) {
    const int64_t first = ints(current)[slot];
    for (int64_t j = 0; j < length; ++j) {
      const int64_t step = std::min(first + j, num_steps - 1), place = slot * length + j;
      mutable_ints(steps)[place] = step;
      mutable_ints(network_steps)[place] = ints(timesteps)[step];
      std::copy_n(const_floats(table) + step * kColumns, kColumns, floats(columns) + place * kColumns);
    }
    std::copy_n(const_floats(state) + slot * size, size, floats(states) + slot * length * size);
  }
  return {steps, network_steps, columns, states, mean, std};
}

namespace {

std::tuple<Tensor, Tensor> draft_rows(const Tensor& states, const Tensor& timesteps, int64_t draft,
                                      int64_t branches, const std::optional<Tensor>& active) {
  constexpr const char* op = "draft_rows";
  constexpr ScalarType kFloat = ScalarType::Float, kLong = ScalarType::Long;
  STD_TORCH_CHECK(states.dim() == 5, op, ": states must have 5 dimensions, got ", states.dim());
  const auto s = states.sizes();
  const int64_t slots = s[0], length = s[1], size = s[2] * s[3] * s[4];
  check_tensor(op, "states", states, kFloat, {slots, length, s[2], s[3], s[4]}, states);
  check_tensor(op, "timesteps", timesteps, kLong, {slots, length}, states);
  STD_TORCH_CHECK(draft >= 0 && draft < length, op, ": draft must be in [0, ", length, "), got ", draft);
  STD_TORCH_CHECK(branches == 1 || branches == 2, op, ": branches must be 1 or 2, got ", branches);
  const int64_t rows = active ? active->numel() : slots;
  if (active) check_tensor(op, "active", *active, kLong, {rows}, states);
  Tensor state = empty_on(states, {branches * rows, s[2], s[3], s[4]}, kFloat);
  Tensor t = empty_on(states, {branches * rows}, kLong);
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t slot = active ? ints(*active)[i] : i;
    STD_TORCH_CHECK(slot >= 0 && slot < slots, op, ": active must be in [0, ", slots, "), got ", slot);
    const int64_t place = slot * length + draft;
    for (int64_t branch = 0; branch < branches; ++branch) {
      std::copy_n(const_floats(states) + place * size, size, floats(state) + (branch * rows + i) * size);
      mutable_ints(t)[branch * rows + i] = ints(timesteps)[place];
    }
  }
  return {state, t};
}

}  // namespace

Tensor renew_slots(const Tensor& steps, const Tensor& images, const Tensor& numbers, const Tensor& indices,
                   const Tensor& rounds) {
  constexpr const char* op = "renew_slots";
  constexpr ScalarType kLong = ScalarType::Long;
  STD_TORCH_CHECK(steps.dim() == 1, op, ": steps must have 1 dimension, got ", steps.dim());
  const int64_t slots = steps.size(0), count = numbers.numel();
  check_tensor(op, "steps", steps, kLong, {slots}, steps);
  check_tensor(op, "images", images, kLong, {slots}, steps);
  check_tensor(op, "numbers", numbers, kLong, {count}, steps);
  check_tensor(op, "indices", indices, kLong, {slots}, steps);
  check_tensor(op, "rounds", rounds, kLong, {slots}, steps);
  Tensor fresh = empty_on(steps, {slots}, ScalarType::Bool);
  bool* is_fresh = static_cast<bool*>(fresh.mutable_data_ptr());
  for (int64_t slot = 0; slot < slots; ++slot) {
    const int64_t image = std::max<int64_t>(ints(images)[slot], 0);
    STD_TORCH_CHECK(image < count, op, ": images[", slot, "] must be below ", count, ", got ", image);
    is_fresh[slot] = ints(steps)[slot] == 0;
    mutable_ints(indices)[slot] = ints(numbers)[image];
    mutable_ints(rounds)[slot] = is_fresh[slot] ? 0 : ints(rounds)[slot] + 1;
  }
  return fresh;
}

Tensor tally_round(const Tensor& output, const Tensor& next_states, const Tensor& gap_sq,
                   const Tensor& committed, const Tensor& lengths, const Tensor& steps,
                   const Tensor& deviation) {
  constexpr const char* op = "tally_round";
  constexpr ScalarType kFloat = ScalarType::Float, kLong = ScalarType::Long;
  STD_TORCH_CHECK(next_states.dim() == 4, op, ": next_states must have 4 dimensions, got ",
                  next_states.dim());
  STD_TORCH_CHECK(gap_sq.dim() == 2, op, ": gap_sq must have 2 dimensions, got ", gap_sq.dim());
  STD_TORCH_CHECK(output.is_contiguous(), op, ": output must be contiguous");
  const auto n = next_states.sizes();
  check_tensor(op, "next_states", next_states, kFloat, {n[0], n[1], n[2], n[3]}, next_states);
  const int64_t slots = n[0], drafts = gap_sq.size(1), num_steps = deviation.numel();
  check_tensor(op, "gap_sq", gap_sq, kFloat, {slots, drafts}, next_states);
  check_tensor(op, "committed", committed, kLong, {slots}, next_states);
  check_tensor(op, "lengths", lengths, kLong, {slots}, next_states);
  check_tensor(op, "steps", steps, kLong, {slots}, next_states);
  check_tensor(op, "deviation", deviation, kFloat, {num_steps}, next_states);
  STD_TORCH_CHECK(num_steps >= 1, op, ": deviation must be of at least 1 step, got 0");
  check_steps(op, steps);
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

STABLE_TORCH_LIBRARY_IMPL(free_kernels, CPU, library) {
  library.impl("advance_drafts_cpu", TORCH_BOX(&advance_drafts));
  library.impl("open_round_cpu", TORCH_BOX(&open_round));
  library.impl("draft_rows_cpu", TORCH_BOX(&draft_rows));
  library.impl("renew_slots_cpu", TORCH_BOX(&renew_slots));
  library.impl("tally_round_cpu", TORCH_BOX(&tally_round));
}

}  // namespace free_kernels
