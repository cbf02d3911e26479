// Rows of a table that depends on timestep and label.
#pragma once

#include <cstdint>
#include <vector>

#include "../checks.h"

namespace free_kernels {

// The table's row of each of `count` pairs; see `table_rows` in Python.
inline std::vector<int64_t> table_index(const char* op, const Tensor& rows, const Tensor& row_of_timestep,
                                        const Tensor& row_of_label, const Tensor& t, const Tensor& y,
                                        int64_t count) {
  constexpr ScalarType kLong = ScalarType::Long;
  const int64_t held = rows.size(0);
  const int64_t timesteps = row_of_timestep.numel(), labels = row_of_label.numel();
  check_tensor(op, "row_of_timestep", row_of_timestep, kLong, {timesteps}, rows);
  check_tensor(op, "row_of_label", row_of_label, kLong, {labels}, rows);
  check_tensor(op, "t", t, kLong, {count}, rows);
  check_tensor(op, "y", y, kLong, {count}, rows);
  const int64_t *steps = ints(t), *classes = ints(y), *of_step = ints(row_of_timestep),
                *of_class = ints(row_of_label);
  std::vector<int64_t> index(count);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t step = steps[i], label = classes[i];
    STD_TORCH_CHECK(step >= 0 && step < timesteps, op, ": t must be in [0, ", timesteps, "), got ", step);
    STD_TORCH_CHECK(label >= 0 && label < labels, op, ": y must be in [0, ", labels, "), got ", label);
    index[i] = of_step[step] + of_class[label];
    STD_TORCH_CHECK(index[i] >= 0 && index[i] < held, op, ": t and y must give a row in [0, ", held,
                    "), got ", index[i]);
  }
  return index;
}

}  // namespace free_kernels
