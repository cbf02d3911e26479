
#include <cstdint>

#include "../checks.h"
#include "packing_kernels.h"

namespace free_kernels {
namespace {

cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

void check_launch(const char* op, cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, op, ": CUDA launch failed: ", cudaGetErrorString(error));
}

// What a grid can have in that direction.
void check_grid(const char* op, const char* name, int64_t value, int64_t most) {
  STD_TORCH_CHECK(value <= most, op, ": ", name, " must be at most ", most, " on a GPU, got ", value);
}

constexpr int64_t kMostAcross = INT32_MAX, kMostDeep = 65535;

// 16 bytes at a time where every row of every operand starts on a 16-byte border, else an element at a time.
int access_unit(int64_t row_bytes, size_t element_size, std::initializer_list<const void*> bases) {
  bool aligned = row_bytes % 16 == 0;
  for (const void* base : bases) aligned = aligned && reinterpret_cast<uintptr_t>(base) % 16 == 0;
  return aligned ? 16 : static_cast<int>(element_size);
}

void pack(const PackInputs& inputs, const PackShape& shape, const PackOutputs& outputs) {
  check_grid("pack_drafts", "num_rows", inputs.num_rows, kMostAcross);
  const int32_t device = inputs.states.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const void* states = inputs.states.const_data_ptr();
  void* x = outputs.x.mutable_data_ptr();
  const PackLaunch launch{states,
                          ints(inputs.lengths),
                          ints(inputs.steps),
                          ints(inputs.labels),
                          ints(inputs.timesteps),
                          x,
                          mutable_ints(outputs.t),
                          mutable_ints(outputs.y),
                          mutable_ints(outputs.row_offsets),
                          shape.slots,
                          shape.draft_length,
                          shape.num_steps,
                          inputs.num_rows,
                          shape.row_bytes,
                          inputs.null_label.value_or(0),
                          inputs.null_label.has_value(),
                          access_unit(shape.row_bytes, inputs.states.element_size(), {states, x})};
  check_launch("pack_drafts", launch_pack(launch, current_stream(device)));
}

void commit(const CommitTensors& tensors, const CommitShape& shape) {
  check_grid("commit_drafts", "the number of slots", shape.slots, kMostAcross);
  check_grid("commit_drafts", "parent's number of branches", shape.branches, kMostDeep - 1);
  const int32_t device = tensors.draft_states.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Tensor plan =
      empty_on(tensors.draft_states, {shape.slots, sizeof(CommitPlan) / sizeof(int64_t)}, ScalarType::Long);
  CommitLaunch launch{};
  launch.committed = ints(tensors.committed);
  launch.next_states = tensors.next_states.const_data_ptr();
  launch.draft_states = tensors.draft_states.const_data_ptr();
  launch.features = tensors.features.const_data_ptr();
  launch.row_offsets = ints(tensors.row_offsets);
  launch.state = tensors.state.mutable_data_ptr();
  launch.previous = tensors.previous.mutable_data_ptr();
  launch.parent = tensors.parent.mutable_data_ptr();
  launch.steps = mutable_ints(tensors.steps);
  launch.images = mutable_ints(tensors.images);
  launch.labels = mutable_ints(tensors.labels);
  launch.samples = tensors.samples.mutable_data_ptr();
  launch.all_labels = ints(tensors.all_labels);
  launch.queue = mutable_ints(tensors.queue);
  launch.plan = static_cast<CommitPlan*>(plan.mutable_data_ptr());
  launch.slots = shape.slots;
  launch.draft_length = shape.draft_length;
  launch.branches = shape.branches;
  launch.rows = shape.rows;
  launch.num_images = shape.num_images;
  launch.num_steps = shape.num_steps;
  launch.state_bytes = shape.state_bytes;
  launch.feature_bytes = shape.feature_bytes;
  launch.state_unit =
      access_unit(shape.state_bytes, tensors.draft_states.element_size(),
                  {launch.next_states, launch.draft_states, launch.state, launch.previous, launch.samples});
  launch.feature_unit =
      access_unit(shape.feature_bytes, tensors.features.element_size(), {launch.features, launch.parent});
  check_launch("commit_drafts", launch_commit(launch, current_stream(device)));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(free_kernels, CUDA, library) {
  library.impl("pack_drafts", TORCH_BOX(&pack_drafts<pack>));
  library.impl("commit_drafts", TORCH_BOX(&commit_drafts<commit>));
}

}  // namespace free_kernels
