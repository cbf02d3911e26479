#include "checks.h"

#include <sstream>
#include <string>
#include <utility>

namespace free_kernels {
namespace {

constexpr ScalarType kLong = ScalarType::Long;

std::string describe(ScalarType dtype, const int64_t* sizes, size_t dim, const std::string& device) {
  std::ostringstream text;
  text << torch::headeronly::toString(dtype) << " [";
  for (size_t i = 0; i < dim; ++i) text << (i ? ", " : "") << sizes[i];
  text << "] on " << device;
  return text.str();
}

void check_float(const char* op, const char* name, const Tensor& tensor, int64_t dim) {
  const ScalarType dtype = tensor.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
                  op, ": ", name, " must be float32, float16 or bfloat16, got ",
                  torch::headeronly::toString(dtype));
  STD_TORCH_CHECK(tensor.dim() == dim, op, ": ", name, " must have ", dim, " dimensions, got ", tensor.dim());
  STD_TORCH_CHECK(tensor.is_contiguous(), op, ": ", name, " must be contiguous");
}

void check_positive(const char* op, const char* name, int64_t value) {
  STD_TORCH_CHECK(value >= 1, op, ": ", name, " must be at least 1, got ", value);
}

// Integers that a call checks, then reads again and writes: none may change under another name.
void check_apart(const char* op, std::initializer_list<std::pair<const char*, const Tensor*>> integers) {
  constexpr size_t kWritten = 4;
  for (size_t i = 0; i < kWritten; ++i) {
    const auto& [name, tensor] = integers.begin()[i];
    for (size_t j = i + 1; j < integers.size(); ++j) {
      const auto& [other_name, other] = integers.begin()[j];
      const auto* from = static_cast<const int64_t*>(tensor->const_data_ptr());
      const auto* other_from = static_cast<const int64_t*>(other->const_data_ptr());
      STD_TORCH_CHECK(from + tensor->numel() <= other_from || other_from + other->numel() <= from, op, ": ",
                      name, " and ", other_name, " must not share memory");
    }
  }
}

}  // namespace

void check_layout(const char* op, const char* name, const Tensor& tensor, ScalarType dtype,
                  std::initializer_list<int64_t> shape, const Tensor& same_device_as) {
  const auto sizes = tensor.sizes();
  bool fits =
      tensor.scalar_type() == dtype && sizes.size() == shape.size() && same_device(tensor, same_device_as);
  for (size_t i = 0; fits && i < shape.size(); ++i) fits = sizes[i] == shape.begin()[i];
  STD_TORCH_CHECK(fits, op, ": ", name, " must be ",
                  describe(dtype, shape.begin(), shape.size(), device_name(same_device_as)), ", got ",
                  describe(tensor.scalar_type(), sizes.data(), sizes.size(), device_name(tensor)));
}

void check_tensor(const char* op, const char* name, const Tensor& tensor, ScalarType dtype,
                  std::initializer_list<int64_t> shape, const Tensor& same_device_as) {
  check_layout(op, name, tensor, dtype, shape, same_device_as);
  STD_TORCH_CHECK(tensor.is_contiguous(), op, ": ", name, " must be contiguous");
}

PackShape check_pack(const PackInputs& inputs) {
  constexpr const char* op = "pack_drafts";
  const Tensor& states = inputs.states;
  check_float(op, "states", states, 5);
  const auto sizes = states.sizes();
  const int64_t slots = sizes[0];
  check_tensor(op, "lengths", inputs.lengths, kLong, {slots}, states);
  check_tensor(op, "steps", inputs.steps, kLong, {slots}, states);
  check_tensor(op, "labels", inputs.labels, kLong, {slots}, states);
  STD_TORCH_CHECK(inputs.timesteps.dim() == 1, op, ": timesteps must have 1 dimension, got ",
                  inputs.timesteps.dim());
  const int64_t num_steps = inputs.timesteps.size(0);
  check_tensor(op, "timesteps", inputs.timesteps, kLong, {num_steps}, states);
  check_positive(op, "the number of slots", slots);
  check_positive(op, "the draft length", sizes[1]);
  check_positive(op, "the number of timesteps", num_steps);
  STD_TORCH_CHECK(inputs.num_rows >= 0, op, ": num_rows must be at least 0, got ", inputs.num_rows);
  const int64_t row_bytes = sizes[2] * sizes[3] * sizes[4] * static_cast<int64_t>(states.element_size());
  return {slots, sizes[1], num_steps, inputs.null_label ? 2 : 1, row_bytes};
}

CommitShape check_commit(const CommitTensors& tensors, int64_t num_steps) {
  constexpr const char* op = "commit_drafts";
  const Tensor& draft_states = tensors.draft_states;
  check_float(op, "draft_states", draft_states, 5);
  check_float(op, "features", tensors.features, 3);
  STD_TORCH_CHECK(tensors.parent.dim() == 4, op, ": parent must have 4 dimensions, got ",
                  tensors.parent.dim());
  STD_TORCH_CHECK(tensors.samples.dim() == 4, op, ": samples must have 4 dimensions, got ",
                  tensors.samples.dim());
  const auto sizes = draft_states.sizes();
  const int64_t slots = sizes[0], c = sizes[2], h = sizes[3], w = sizes[4];
  const auto feature = tensors.features.sizes();
  const int64_t branches = tensors.parent.size(0), num_images = tensors.samples.size(0);
  check_positive(op, "the number of slots", slots);
  check_positive(op, "the draft length", sizes[1]);
  check_positive(op, "parent's number of branches", branches);
  check_positive(op, "the number of images", num_images);
  check_positive(op, "num_steps", num_steps);
  STD_TORCH_CHECK(feature[0] >= branches && feature[0] % branches == 0, op,
                  ": features must have a positive multiple of parent's ", branches,
                  " branches as rows, got ", feature[0]);
  const ScalarType dtype = draft_states.scalar_type();
  check_tensor(op, "committed", tensors.committed, kLong, {slots}, draft_states);
  check_tensor(op, "next_states", tensors.next_states, dtype, {slots, c, h, w}, draft_states);
  check_tensor(op, "features", tensors.features, tensors.features.scalar_type(),
               {feature[0], feature[1], feature[2]}, draft_states);
  check_tensor(op, "row_offsets", tensors.row_offsets, kLong, {slots + 1}, draft_states);
  check_tensor(op, "state", tensors.state, dtype, {slots, c, h, w}, draft_states);
  check_tensor(op, "previous", tensors.previous, dtype, {slots, c, h, w}, draft_states);
  check_tensor(op, "parent", tensors.parent, tensors.features.scalar_type(),
               {branches, slots, feature[1], feature[2]}, draft_states);
  check_tensor(op, "steps", tensors.steps, kLong, {slots}, draft_states);
  check_tensor(op, "images", tensors.images, kLong, {slots}, draft_states);
  check_tensor(op, "labels", tensors.labels, kLong, {slots}, draft_states);
  check_tensor(op, "samples", tensors.samples, dtype, {num_images, c, h, w}, draft_states);
  check_tensor(op, "all_labels", tensors.all_labels, kLong, {num_images}, draft_states);
  check_tensor(op, "queue", tensors.queue, kLong, {1}, draft_states);
  check_apart(op, {{"steps", &tensors.steps},
                   {"images", &tensors.images},
                   {"labels", &tensors.labels},
                   {"queue", &tensors.queue},
                   {"committed", &tensors.committed},
                   {"row_offsets", &tensors.row_offsets},
                   {"all_labels", &tensors.all_labels}});
  return {slots,
          sizes[1],
          branches,
          feature[0] / branches,
          num_images,
          num_steps,
          c * h * w * static_cast<int64_t>(draft_states.element_size()),
          feature[1] * feature[2] * static_cast<int64_t>(tensors.features.element_size())};
}

PackOutputs empty_pack_outputs(const PackInputs& inputs, const PackShape& shape) {
  const Tensor& states = inputs.states;
  const auto sizes = states.sizes();
  const int64_t rows = shape.branches * inputs.num_rows;
  return {empty_on(states, {rows, sizes[2], sizes[3], sizes[4]}, states.scalar_type()),
          empty_on(states, {rows}, kLong), empty_on(states, {rows}, kLong),
          empty_on(states, {shape.slots + 1}, kLong)};
}

}  // namespace free_kernels
