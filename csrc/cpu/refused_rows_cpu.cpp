#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <tuple>

#include "../checks.h"
#include "floats.h"
#include "round_parts.h"

namespace free_kernels {
namespace {

// What the further rows of a drafter's call are made of, by number.
struct FurtherRows {
  const int64_t *latest, *before, *chosen;
  int64_t slots, width, held;
  int64_t number(int64_t i) const { return chosen ? chosen[i] : i; }
  int64_t now(const char* op, int64_t number) const {
    return row(op, latest[number % slots * width + number / slots]);
  }
  int64_t past(const char* op, int64_t number) const {
    return number < slots ? row(op, before[number]) : now(op, number - slots);
  }
  // A row that is not there may be any.
  int64_t row(const char* op, int64_t place) const {
    STD_TORCH_CHECK(place < held, op, ": latest and before must be below ", held, ", got ", place);
    return std::max<int64_t>(place, 0);
  }
};

// How many further rows there are: those chosen of so many, or all. The first row that is held stands for
// those that are not there, so it has to be.
int64_t further_rows(const char* op, const std::optional<Tensor>& chosen, int64_t numbers, int64_t held,
                     const Tensor& like) {
  const int64_t count = chosen ? chosen->numel() : numbers;
  STD_TORCH_CHECK(held >= 1 || count == 0, op, ": features must have at least 1 row, got ", held);
  if (!chosen) return count;
  check_tensor(op, "chosen", *chosen, ScalarType::Long, {count}, like);
  for (int64_t i = 0; i < count; ++i)
    STD_TORCH_CHECK(ints(*chosen)[i] >= 0 && ints(*chosen)[i] < numbers, op, ": chosen must be in [0, ",
                    numbers, "), got ", ints(*chosen)[i]);
  return count;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> join_rows(
    const Tensor& feature, const Tensor& previous, const Tensor& state, const Tensor& t, const Tensor& y,
    const Tensor& asked, const Tensor& features, const Tensor& before, const Tensor& latest,
    const Tensor& timesteps, const Tensor& labels, int64_t drafts, std::optional<int64_t> null_label,
    const std::optional<Tensor>& chosen) {
  constexpr const char* op = "join_rows";
  constexpr ScalarType kFloat = ScalarType::Float, kLong = ScalarType::Long;
  STD_TORCH_CHECK(feature.dim() == 3, op, ": feature must have 3 dimensions, got ", feature.dim());
  STD_TORCH_CHECK(state.dim() == 4, op, ": state must have 4 dimensions, got ", state.dim());
  STD_TORCH_CHECK(features.dim() == 4, op, ": features must have 4 dimensions, got ", features.dim());
  STD_TORCH_CHECK(latest.dim() == 2 && timesteps.dim() == 2, op,
                  ": latest and timesteps must have 2 dimensions");
  const auto f = feature.sizes(), s = state.sizes();
  const int64_t inputs = f[0], branches = features.size(0), held = features.size(1);
  const int64_t slots = latest.size(0), width = latest.size(1), length = timesteps.size(1);
  check_tensor(op, "feature", feature, feature.scalar_type(), {inputs, f[1], f[2]}, feature);
  check_tensor(op, "previous", previous, kFloat, {inputs, s[1], s[2], s[3]}, feature);
  check_tensor(op, "state", state, kFloat, {inputs, s[1], s[2], s[3]}, feature);
  check_tensor(op, "t", t, kLong, {inputs}, feature);
  check_tensor(op, "y", y, kLong, {inputs}, feature);
  check_tensor(op, "asked", asked, kFloat, {held, s[1], s[2], s[3]}, feature);
  check_tensor(op, "features", features, features.scalar_type(), {branches, held, f[1], f[2]}, feature);
  check_tensor(op, "before", before, kLong, {slots}, feature);
  check_tensor(op, "latest", latest, kLong, {slots, width}, feature);
  check_tensor(op, "timesteps", timesteps, kLong, {slots, length}, feature);
  check_tensor(op, "labels", labels, kLong, {slots}, feature);
  STD_TORCH_CHECK(drafts >= 1 && drafts <= std::min(width, length), op, ": drafts must be in [1, ",
                  std::min(width, length), "], got ", drafts);
  STD_TORCH_CHECK(branches == (null_label ? 2 : 1), op,
                  ": null_label must be given exactly where features have 2 branches");
  const int64_t count = further_rows(op, chosen, drafts * slots, held, feature);
  const int64_t rows = inputs + branches * count;
  const FurtherRows further{ints(latest), ints(before), chosen ? ints(*chosen) : nullptr, slots, width, held};
  const int64_t state_size = s[1] * s[2] * s[3], size = f[1] * f[2];
  Tensor out_feature = empty_on(feature, {rows, f[1], f[2]}, feature.scalar_type());
  Tensor out_previous = empty_on(feature, {rows, s[1], s[2], s[3]}, kFloat);
  Tensor out_state = empty_on(feature, {rows, s[1], s[2], s[3]}, kFloat);
  Tensor out_t = empty_on(feature, {rows}, kLong), out_y = empty_on(feature, {rows}, kLong);
  std::copy_n(const_floats(previous), inputs * state_size, floats(out_previous));
  std::copy_n(const_floats(state), inputs * state_size, floats(out_state));
  std::copy_n(ints(t), inputs, mutable_ints(out_t));
  std::copy_n(ints(y), inputs, mutable_ints(out_y));
  const auto each = [&](const auto& take) {
    for (int64_t branch = 0; branch < branches; ++branch)
      for (int64_t i = 0; i < count; ++i) take(branch, further.number(i), inputs + branch * count + i);
  };
  each([&](int64_t branch, int64_t number, int64_t to) {
    const int64_t slot = number % slots;
    std::copy_n(const_floats(asked) + further.past(op, number) * state_size, state_size,
                floats(out_previous) + to * state_size);
    std::copy_n(const_floats(asked) + further.now(op, number) * state_size, state_size,
                floats(out_state) + to * state_size);
    mutable_ints(out_t)[to] = ints(timesteps)[slot * length + number / slots];
    mutable_ints(out_y)[to] = branch ? *null_label : ints(labels)[slot];
  });
  with_floats(op, "feature", feature, [&](const auto* given) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(given)>>;
    T* out = static_cast<T*>(out_feature.mutable_data_ptr());
    std::copy_n(given, inputs * size, out);
    with_floats(op, "features", features, [&](const auto* rows_held) {
      each([&](int64_t branch, int64_t number, int64_t to) {
        const auto* from = rows_held + (branch * held + further.past(op, number)) * size;
        for (int64_t e = 0; e < size; ++e) out[to * size + e] = static_cast<T>(to_float(from[e]));
      });
    });
  });
  return {out_feature, out_previous, out_state, out_t, out_y};
}

Tensor row_errors(const Tensor& drafted, const Tensor& features, const Tensor& latest, int64_t drafts,
                  int64_t inputs, const std::optional<Tensor>& chosen) {
  constexpr const char* op = "row_errors";
  STD_TORCH_CHECK(features.dim() == 4, op, ": features must have 4 dimensions, got ", features.dim());
  STD_TORCH_CHECK(latest.dim() == 2, op, ": latest must have 2 dimensions, got ", latest.dim());
  const auto f = features.sizes();
  const int64_t branches = f[0], held = f[1], slots = latest.size(0), width = latest.size(1),
                size = f[2] * f[3];
  STD_TORCH_CHECK(drafts >= 1 && drafts <= width, op, ": drafts must be in [1, ", width, "], got ", drafts);
  STD_TORCH_CHECK(inputs >= 0, op, ": inputs must be at least 0, got ", inputs);
  const int64_t count = further_rows(op, chosen, drafts * slots, held, features);
  check_tensor(op, "features", features, features.scalar_type(), {branches, held, f[2], f[3]}, features);
  check_tensor(op, "latest", latest, ScalarType::Long, {slots, width}, features);
  check_tensor(op, "drafted", drafted, drafted.scalar_type(), {inputs + branches * count, f[2], f[3]},
               features);
  const FurtherRows further{ints(latest), nullptr, chosen ? ints(*chosen) : nullptr, slots, width, held};
  Tensor out = empty_on(drafted, {branches, drafts, slots, f[2], f[3]}, drafted.scalar_type());
  with_floats(op, "drafted", drafted, [&](const auto* given) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(given)>>;
    T* errors = static_cast<T*>(out.mutable_data_ptr());
    if (chosen) std::memset(errors, 0, branches * drafts * slots * size * sizeof(T));
    with_floats(op, "features", features, [&](const auto* exact) {
      for (int64_t branch = 0; branch < branches; ++branch)
        for (int64_t i = 0; i < count; ++i) {
          const int64_t number = further.number(i);
          const auto* row = exact + (branch * held + further.now(op, number)) * size;
          const T* there = given + (inputs + branch * count + i) * size;
          T* error = errors + (branch * drafts * slots + number) * size;
          for (int64_t e = 0; e < size; ++e) {
            const float difference = to_float(static_cast<T>(to_float(row[e]))) - to_float(there[e]);
            const T rounded = static_cast<T>(difference);
            error[e] = std::isfinite(to_float(rounded)) ? rounded : static_cast<T>(0.0f);
          }
        }
    });
  });
  return out;
}

double distance_sq(const float* a, const float* b, int64_t count) {
  return sum(count, [&](int64_t e) { return (a[e] - b[e]) * (a[e] - b[e]); });
}

Tensor correct_features(const Tensor& drafted, const Tensor& errors, const Tensor& state,
                        const Tensor& previous, const Tensor& asked, const Tensor& latest, int64_t draft,
                        const std::optional<Tensor>& active) {
  constexpr const char* op = "correct_features";
  constexpr ScalarType kFloat = ScalarType::Float, kLong = ScalarType::Long;
  STD_TORCH_CHECK(drafted.dim() == 3, op, ": drafted must have 3 dimensions, got ", drafted.dim());
  STD_TORCH_CHECK(errors.dim() == 5, op, ": errors must have 5 dimensions, got ", errors.dim());
  STD_TORCH_CHECK(state.dim() == 4 && asked.dim() == 4, op, ": state and asked must have 4 dimensions");
  STD_TORCH_CHECK(latest.dim() == 2, op, ": latest must have 2 dimensions, got ", latest.dim());
  const auto d = drafted.sizes(), s = state.sizes();
  const int64_t branches = errors.size(0), drafts = errors.size(1), slots = errors.size(2), rows = s[0];
  const int64_t size = d[1] * d[2], state_size = s[1] * s[2] * s[3], width = latest.size(1),
                held = asked.size(0);
  check_tensor(op, "drafted", drafted, drafted.scalar_type(), {branches * rows, d[1], d[2]}, drafted);
  check_tensor(op, "errors", errors, drafted.scalar_type(), {branches, drafts, slots, d[1], d[2]}, drafted);
  check_tensor(op, "state", state, kFloat, {rows, s[1], s[2], s[3]}, drafted);
  check_tensor(op, "previous", previous, kFloat, {rows, s[1], s[2], s[3]}, drafted);
  check_tensor(op, "asked", asked, kFloat, {held, s[1], s[2], s[3]}, drafted);
  check_tensor(op, "latest", latest, kLong, {slots, width}, drafted);
  if (active) check_tensor(op, "active", *active, kLong, {rows}, drafted);
  STD_TORCH_CHECK(active || rows == slots, op, ": state must have a row for each of the ", slots,
                  " slots, got ", rows);
  STD_TORCH_CHECK(draft >= 0 && draft < std::min(drafts, width), op, ": draft must be in [0, ",
                  std::min(drafts, width), "), got ", draft);
  Tensor out = empty_on(drafted, {branches * rows, d[1], d[2]}, drafted.scalar_type());
  with_floats(op, "drafted", drafted, [&](const auto* given) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(given)>>;
    T* to = static_cast<T*>(out.mutable_data_ptr());
    const T* wrong = static_cast<const T*>(errors.const_data_ptr());
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t slot = active ? ints(*active)[i] : i;
      STD_TORCH_CHECK(slot >= 0 && slot < slots, op, ": active must be in [0, ", slots, "), got ", slot);
      const int64_t place = ints(latest)[slot * width + draft];
      STD_TORCH_CHECK(place < held, op, ": latest must be below ", held, ", got ", place);
      const float* own = const_floats(state) + i * state_size;
      const bool serves =
          place >= 0 && distance_sq(own, const_floats(asked) + place * state_size, state_size) <
                            distance_sq(own, const_floats(previous) + i * state_size, state_size);
      for (int64_t branch = 0; branch < branches; ++branch) {
        const int64_t row = (branch * rows + i) * size;
        const T* error = wrong + ((branch * drafts + draft) * slots + slot) * size;
        if (!serves) {
          std::copy_n(given + row, size, to + row);
          continue;
        }
        for (int64_t e = 0; e < size; ++e)
          to[row + e] = static_cast<T>(to_float(given[row + e]) + to_float(error[e]));
      }
    }
  });
  return out;
}

}  // namespace

void keep_rows(const Tensor& states, const Tensor& features, const Tensor& output, const Tensor& row_offsets,
               const Tensor& committed, const Tensor& lengths, const Tensor& steps, const Tensor& at,
               const Tensor& held_states, const Tensor& held_features) {
  constexpr const char* op = "keep_rows";
  constexpr ScalarType kFloat = ScalarType::Float, kLong = ScalarType::Long;
  STD_TORCH_CHECK(states.dim() == 5, op, ": states must have 5 dimensions, got ", states.dim());
  STD_TORCH_CHECK(features.dim() == 3, op, ": features must have 3 dimensions, got ", features.dim());
  STD_TORCH_CHECK(output.dim() == 4, op, ": output must have 4 dimensions, got ", output.dim());
  STD_TORCH_CHECK(at.dim() == 2, op, ": at must have 2 dimensions, got ", at.dim());
  STD_TORCH_CHECK(held_features.dim() == 5, op, ": held_features must have 5 dimensions, got ",
                  held_features.dim());
  const auto s = states.sizes(), f = features.sizes(), o = output.sizes();
  const int64_t slots = s[0], places = at.size(1), rows = places - 1;
  const int64_t branches = held_features.size(0);
  STD_TORCH_CHECK(rows >= 1 && branches >= 1 && f[0] % branches == 0, op,
                  ": at must be [S, M + 1] with M at least 1, and features [B R, T, D], got at with ", places,
                  " columns, ", f[0], " rows of features and ", branches, " branches");
  const int64_t packed = f[0] / branches;
  check_tensor(op, "states", states, kFloat, {slots, s[1], s[2], s[3], s[4]}, states);
  check_tensor(op, "features", features, features.scalar_type(), {f[0], f[1], f[2]}, states);
  check_tensor(op, "output", output, output.scalar_type(), {f[0], o[1], s[3], s[4]}, states);
  check_tensor(op, "row_offsets", row_offsets, kLong, {slots + 1}, states);
  check_tensor(op, "committed", committed, kLong, {slots}, states);
  check_tensor(op, "lengths", lengths, kLong, {slots}, states);
  check_tensor(op, "steps", steps, kLong, {slots}, states);
  check_steps(op, steps);
  check_tensor(op, "at", at, kLong, {slots, places}, states);
  check_tensor(op, "held_states", held_states, kFloat, {slots, places, s[2], s[3], s[4]}, states);
  check_tensor(op, "held_features", held_features, features.scalar_type(),
               {branches, slots, places, f[1], f[2]}, states);

  const int64_t state_size = s[2] * s[3] * s[4], feature_size = f[1] * f[2], output_size = o[1] * s[3] * s[4];
  const int64_t all = slots * places;
  const auto bytes = [](const Tensor& tensor) { return static_cast<const char*>(tensor.const_data_ptr()); };
  const auto held = [](const Tensor& tensor) { return static_cast<char*>(tensor.mutable_data_ptr()); };
  const auto finite = [op](const char* name, const Tensor& tensor, int64_t row, int64_t size) {
    bool all_finite = true;
    with_floats(op, name, tensor,
                [&](const auto* values) { all_finite = is_finite(values + row * size, size); });
    return all_finite;
  };
  int64_t* steps_held = mutable_ints(at);
  for (int64_t slot = 0; slot < slots; ++slot) {
    const int64_t done = ints(committed)[slot], length = ints(lengths)[slot], step0 = ints(steps)[slot];
    const int64_t end = std::min(length, done + rows - 1);
    STD_TORCH_CHECK(end <= s[1] && ints(row_offsets)[slot] >= 0 && ints(row_offsets)[slot] <= packed - end,
                    op, ": row_offsets must give slot ", slot, " at least ", end, " of the ", packed,
                    " rows, got row ", ints(row_offsets)[slot]);
    for (int64_t j = std::max<int64_t>(done - 1, 0); j < end; ++j) {
      const int64_t row = ints(row_offsets)[slot] + j, step = step0 + j;
      const int64_t index = slot * places + step % rows;
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
      }
      steps_held[index] = usable ? step : -1;
    }
  }
}

void find_rows(const Tensor& at, const Tensor& steps, const Tensor& places, const Tensor& before,
               const Tensor& ahead) {
  constexpr const char* op = "find_rows";
  constexpr ScalarType kLong = ScalarType::Long;
  STD_TORCH_CHECK(at.dim() == 2 && at.size(1) >= 2, op, ": at must be [S, M + 1] with M at least 1");
  STD_TORCH_CHECK(places.dim() == 2, op, ": places must have 2 dimensions, got ", places.dim());
  const int64_t slots = at.size(0), all = at.size(1), rows = all - 1, width = places.size(1);
  STD_TORCH_CHECK(width < rows, op, ": places must be [S, W] with W below M = ", rows, ", got W = ", width);
  check_tensor(op, "at", at, kLong, {slots, all}, at);
  check_tensor(op, "steps", steps, kLong, {slots}, at);
  check_steps(op, steps);
  check_tensor(op, "places", places, kLong, {slots, width}, at);
  check_tensor(op, "before", before, kLong, {slots}, at);
  check_tensor(op, "ahead", ahead, kLong, {slots}, at);
  for (int64_t slot = 0; slot < slots; ++slot) {
    const int64_t first = ints(steps)[slot];
    int64_t *own = mutable_ints(at) + slot * all, *found = mutable_ints(places) + slot * width;
    // The rows of the image before.
    if (first == 0) std::fill_n(own, all, -1);
    int64_t count = 0;
    for (; count < width && own[(first + count) % rows] == first + count; ++count)
      found[count] = slot * all + (first + count) % rows;
    std::fill(found + count, found + width, -1);
    mutable_ints(ahead)[slot] = count;
    const int64_t last = (first - 1 + rows) % rows;
    mutable_ints(before)[slot] = first > 0 && own[last] == first - 1 ? slot * all + last : -1;
  }
}

STABLE_TORCH_LIBRARY_IMPL(free_kernels, CPU, library) {
  library.impl("correct_features_cpu", TORCH_BOX(&correct_features));
  library.impl("join_rows_cpu", TORCH_BOX(&join_rows));
  library.impl("row_errors_cpu", TORCH_BOX(&row_errors));
  library.impl("keep_rows_cpu", TORCH_BOX(&keep_rows));
  library.impl("find_rows_cpu", TORCH_BOX(&find_rows));
}

}  // namespace free_kernels
